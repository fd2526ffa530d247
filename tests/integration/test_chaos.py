"""Chaos: runs that are killed, stopped and damaged in every way lose nothing and see no sample twice.

Every round goes on under another layout and ends in another disaster; at the end (step, samples, loss) are those of a run
that was never disturbed. The short form runs with the suite, the long one with ``-m long``.
"""

import random
import signal
from pathlib import Path

import pytest

from tests.integration.runs import Process, command, read_metrics, series, train

LAYOUTS = (
    (1, ()),
    (1, ("train.micro_batch=2",)),
    (2, ("parallel.zero=1",)),
    (2, ("parallel.zero=2", "train.micro_batch=2")),
    (2, ("parallel.zero=3",)),
    (2, ("parallel.tensor=2",)),
)
SHORT = ("sigterm while saving", "kill one rank, flip a byte")
LONG = (
    "kill all",
    "kill one rank",
    "sigterm",
    "sigterm while saving",
    "kill while saving",
    "full disk, kill all",
    "stop a rank",
    "kill all, cut a file",
    "kill one rank, flip a byte",
    "sigterm, cut a file",
)


class Chaos:
    """One run, disturbed again and again."""

    def __init__(self, config: Path, run_dir: Path, seed: int):
        self.config, self.run_dir, self.draw = config, run_dir, random.Random(seed)

    def round(self, disaster: str, ranks: int, overrides: tuple[str, ...]) -> bool:
        """Start, strike at a random moment, damage files; whether the run was still going when it struck."""
        limit = 100_000 if "full disk" in disaster else 0
        hang = ("faults.hang_minutes=0.3",) if "stop a rank" in disaster else ()
        process = Process(command(self.config, self.run_dir, ranks, *overrides, *hang), self.run_dir, limit)
        first = self._first_step(process)
        target = first + self.draw.randrange(4)
        if "while saving" in disaster:
            partial = lambda: any(self.run_dir.glob("checkpoints/.step-*.partial"))
            process.wait_for(lambda: process.steps_done() >= target and partial())
        elif limit:
            process.wait_for(lambda: process.steps_done() >= target and "FAILED" in process.text())
        else:
            process.wait_for(lambda: process.steps_done() >= target)
        struck = process.running()
        self._strike(disaster, process)
        if "cut a file" in disaster or "flip a byte" in disaster:
            self._damage(cut="cut" in disaster)
        return struck

    def _first_step(self, process: Process) -> int:
        process.wait_for(lambda: process.steps_done() > 0)
        return process.steps_done()

    def _strike(self, disaster: str, process: Process) -> None:
        if ranks := process.ranks():
            victim = self.draw.choice(ranks)
            if "sigterm" in disaster:
                victim.send_signal(signal.SIGTERM)
                assert process.end() == 0, process.text()[-3000:]
                return
            if "kill one" in disaster:
                victim.kill()
                process.end()
            elif "stop a rank" in disaster and len(ranks) > 1:
                victim.suspend()
                process.wait_for(lambda: "all stacks follow" in process.text())
                assert "gives no sign of life" in process.text(), process.text()[-3000:]
        process.kill()

    def _damage(self, cut: bool) -> None:
        """Cut or alter a file of the newest checkpoint, if an older one is left to go on from."""
        whole = sorted((self.run_dir / "checkpoints").glob("step-*"))
        if len(whole) < 2:
            return
        path = self.draw.choice(sorted(whole[-1].iterdir()))
        data = bytearray(path.read_bytes())
        place = self.draw.randrange(len(data))
        if cut:
            data = data[:place]
        else:
            data[place] ^= 1 << self.draw.randrange(8)
        path.write_bytes(data)

    def finish(self, ranks: int, overrides: tuple[str, ...]) -> list[dict]:
        """The last round: nothing happens."""
        return train(self.config, self.run_dir, ranks, *overrides)


def settings(tiny, path: Path, steps: int):
    return tiny.config(path, train={"steps": steps, "valid_every": 0}, data={"valid": []}, checkpoint={"every": 2, "keep": 4})


def check(metrics: list[dict], undisturbed: list[dict]) -> None:
    """The same steps on the same samples, losses within the parallel tolerance."""
    assert series(metrics, "step", "sample_range", "samples") == series(undisturbed, "step", "sample_range", "samples")
    for got, want in zip(metrics, undisturbed, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 2e-6 * max(1, want["loss"]), f"step {got['step']}"


def test_short_chaos(tiny, tmp_path):
    config = settings(tiny, tmp_path / "c.yaml", 16)
    chaos = Chaos(config, tmp_path / "run", 1)
    layouts = (LAYOUTS[5], LAYOUTS[4])
    for disaster, layout in zip(SHORT, layouts, strict=True):
        chaos.round(disaster, *layout)
    check(chaos.finish(*LAYOUTS[2]), train(config, tmp_path / "undisturbed"))


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
def test_long_chaos(tiny, tmp_path, seed):
    """Twenty rounds under random layouts."""
    config = settings(tiny, tmp_path / "c.yaml", 160)
    chaos, draw, struck = Chaos(config, tmp_path / "run", seed), random.Random(seed), 0
    for number in range(20):
        layout = draw.choice(LAYOUTS)
        struck += chaos.round(LONG[number % len(LONG)], *layout)
        done = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
        print(f"round {number}: {LONG[number % len(LONG)]} under {layout}: {done} steps done", flush=True)
    assert struck == 20, "a round found nothing to disturb: more steps are needed"
    check(chaos.finish(*draw.choice(LAYOUTS)), train(config, tmp_path / "undisturbed"))


@pytest.mark.long
def test_chaos_in_one_layout_is_exact_to_the_last_bit(tiny, tmp_path):
    config = settings(tiny, tmp_path / "c.yaml", 60)
    layout = (2, ("parallel.zero=2", "precision=bf16"))
    chaos = Chaos(config, tmp_path / "run", 3)
    for disaster in LONG[::2]:
        chaos.round(disaster, *layout)
    exact = ("step", "loss", "grad_norm", "sample_range")
    undisturbed = train(config, tmp_path / "undisturbed", layout[0], *layout[1])
    assert series(chaos.finish(*layout), *exact) == series(undisturbed, *exact)
