"""What of the configuration says how a run is watched."""

from __future__ import annotations

from dataclasses import dataclass

from unfold.model.settings import Natural, NotNegative, Settings, option

MOST_PROFILED = 100  # steps; a trace of more needs more memory than anybody can look at


@dataclass(frozen=True)
class MonitorConfig(Settings):
    """Where the figures go besides metrics.jsonl, and what is measured besides the usual."""

    wandb: bool = option(True, "also log to Weights & Biases; offline, into the run directory, when no API key is set")
    project: str = option("unfold", "W&B project")
    name: str = option("", "W&B run name; empty takes the run directory's name")
    tensorboard: bool = option(False, "also write TensorBoard event files, into tensorboard/ of the run directory")
    profile_steps: tuple[int, ...] = option(
        (), "[first, last]: steps of which every rank writes a PyTorch profiler trace into profile/; empty: none"
    )
    attention_mass: bool = option(True, "with every validation, measure which kinds of keys attention goes to")
    routing: bool = option(True, "with every validation, measure how much of what attention looks for recall selects")
    attention_logits: bool = option(
        False, "with every validation, measure the largest attention logits, saturated softmax and entropy"
    )
    norms_every: Natural = option(
        0, "steps between measures of the norms of gradients, updates and weights by layer and kind; 0: never"
    )
    memory_snapshot: tuple[int, ...] = option(
        (), "steps after which every rank writes a snapshot of its GPU's memory into memory/; none: no snapshot"
    )
    memory_when_out: bool = option(False, "write such a snapshot when an allocation fails")
    flight_recorder: Natural = option(
        0, "last collectives of each rank that PyTorch's flight recorder keeps, to be written when the run hangs; 0: none"
    )
    peak_tflops: NotNegative = option(
        0.0, "peak of one device, for the MFU; 0: by the GPU's name, and no MFU where that is not known"
    )

    def misfits(self) -> list[str]:
        errors = []
        given = list(self.profile_steps)
        if given and (len(given) != 2 or not 1 <= given[0] <= given[1]):
            errors.append(f"profile_steps: {given} is not [first, last] with 1 <= first <= last, counted from 1")
        elif given and given[1] - given[0] >= MOST_PROFILED:
            errors.append(f"profile_steps: {given} are {given[1] - given[0] + 1} steps, more than {MOST_PROFILED}")
        if wrong := [step for step in self.memory_snapshot if step < 1]:
            errors.append(f"memory_snapshot: {wrong} are no steps, which are counted from 1")
        return errors
