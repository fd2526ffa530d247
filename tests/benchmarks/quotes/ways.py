"""What is compared: ways of going on from a dense model, each a set of the project's own settings."""

from __future__ import annotations

from dataclasses import dataclass, field

DENSE = "dense"


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        label: in tables.
        settings: dotted keys of the configuration -> values.
        stages: (part of the steps, settings of a stage); what comes after the last one is as ``settings`` has it.
        longer: so many times the steps.
    """

    label: str
    settings: dict = field(default_factory=dict)
    stages: tuple[tuple[float, dict], ...] = ()
    longer: float = 1.0

    @property
    def dense(self) -> bool:
        """Whether it has no gists."""
        return self.settings.get("model.attention") == "dense"

    def tree(self, steps: int, chunk_sizes: tuple[int, ...]) -> dict:
        """Its part of a configuration; sections are dicts. steps: of all of the run."""
        levels = len(chunk_sizes)
        tree: dict = {"gist": {"chunk_sizes": list(chunk_sizes)}, "train": {"steps": steps}}
        for key, value in self.settings.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        if tree["gist"].get("route_loss") and levels > 1:
            tree["gist"] |= {"own_group": True, "recall_from": levels}
        tree["train"]["stages"] = [{"until": max(1, round(part * steps)), **stage} for part, stage in self.stages]
        return tree


ALL = {"gist.recall": "all"}
ROUTED = {**ALL, "gist.route_loss": 1.0, "gist.route_far": True}
WIDE = ((1 / 3, {"unfold_all": True}),)


def shrinking(ratio: int) -> tuple[tuple[float, dict], ...]:
    """Stages after WIDE whose budgets are eight, four and two times the usual one, a sixth of the steps each."""
    return (*WIDE, *((1 / 3 + (i + 1) / 6, {"budget_ratio": max(1, ratio // times)}) for i, times in enumerate((8, 4, 2))))


def ways_of(chunk_sizes: tuple[int, ...]) -> dict[str, Way]:
    """All ways, those that tell most first."""
    ratio = 1
    for size in chunk_sizes:
        ratio *= size
    shares = {**ROUTED, "gist.unfold_share": 0.25}
    return {
        DENSE: Way("dense attention", {"model.attention": "dense"}),
        "paper": Way("forgetting, then recall: the paper's way", ALL, ((0.5, {"recall": "none"}),)),
        "recipe": Way("taught to route, everything unfolded in the first third", ROUTED, WIDE),
        "share": Way("the same, and in a quarter of the samples to the end", shares, WIDE),
        "shrink": Way("taught to route, budgets that shrink by stages", ROUTED, shrinking(ratio)),
        "logits": Way("a quarter to the end, and taught by dense attention's logits", {**shares, "distill.logits": 1.0}, WIDE),
        "everything": Way("everything unfolded (bound)", {**ALL, "gist.unfold_all": True}),
        "hidden": Way(
            "a quarter to the end, and taught by dense attention's hidden states", {**shares, "distill.hidden": 1.0}, WIDE
        ),
        "twice": Way("taught to route, twice the budget (bound)", {**ROUTED, "gist.budget_ratio": max(1, ratio // 2)}, WIDE),
        "four": Way("taught to route, four times the budget (bound)", {**ROUTED, "gist.budget_ratio": max(1, ratio // 4)}, WIDE),
        "longer": Way("taught to route, twice the steps", ROUTED, WIDE, longer=2.0),
        "forget": Way("gists only", {"gist.recall": "none"}),
        "start": Way("recall from the start, without the loss", ALL),
        "no-wide": Way("taught to route, nothing unfolded whole", ROUTED),
        "half": Way("taught to route, half of the samples unfold all to the end", {**ROUTED, "gist.unfold_share": 0.5}, WIDE),
        "joint": Way("quarter, shrinking budgets, dense attention's logits", {**shares, "distill.logits": 1.0}, shrinking(ratio)),
        "both": Way("a quarter to the end, and shrinking budgets", shares, shrinking(ratio)),
        "both-longer": Way("a quarter to the end, and shrinking budgets, twice the steps", shares, shrinking(ratio), longer=2.0),
        "half-longer": Way(
            "half to the end, and shrinking budgets, twice the steps",
            {**ROUTED, "gist.unfold_share": 0.5},
            shrinking(ratio),
            longer=2.0,
        ),
        "dense-longer": Way("dense attention, twice the steps", {"model.attention": "dense"}, longer=2.0),
    }
