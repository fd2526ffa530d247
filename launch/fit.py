"""Whether a configuration can be trained on so many ranks, and whether what it reads is there."""

from __future__ import annotations

import glob
from pathlib import Path

from unfold.pretrain.config import RunConfig, accumulation_steps, changes_on_resume, saved_settings
from unfold.pretrain.errors import UserError


def check_ranks(config: RunConfig, ranks: int, given: str) -> None:
    """Refuse a number of ranks that the parallel layout or the global batch cannot be divided by.

    given: how the user gave the number, e.g. ``--nodes 2 x --gpus-per-node 8``.
    """
    parallel = config.parallel
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if ranks % model_size:
        raise UserError(
            f"{given} = {ranks} rank(s), which parallel.tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.context} = {model_size} does not divide; {-(-ranks // model_size) * model_size} ranks would do"
        )
    try:
        accumulation_steps(config, ranks // model_size)
    except UserError as error:
        raise UserError(f"{given} = {ranks} rank(s): {error}") from None


def heads_between_nodes(config: RunConfig, nodes: int, ranks: int) -> str:
    """What to say where context ranks that trade heads for sequence do not lie in one node; '' where they do, or there are none.

    ranks: of a node. Such a group is every tensor-th of tensor x heads ranks that follow one another.
    """
    parallel = config.parallel
    heads, tensor = parallel.heads_ranks, parallel.tensor
    if nodes == 1 or heads == 1 or ranks % (tensor * heads) == 0:
        return ""
    fitting = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or ranks % (tensor * n) == 0))
    if config.model.attention == "dense":  # has no gists to exchange
        would_do = f"parallel.context: {fitting}"
    else:
        would_do = f"parallel.context_heads: {fitting}"
        would_do += " with context_method: gists" if parallel.context_method == "ulysses" else ""
    return (
        f"the {heads} context ranks that trade heads for sequence, with {tensor} tensor-parallel rank(s) each, do not lie in one "
        f"node of {ranks} rank(s), and what they trade goes over the network; {would_do} would keep it in a node"
    )


def missing_data(config: RunConfig) -> list[str]:
    """What the configuration reads and is not there, one line each; URLs and globs that match something are taken as there."""
    missing = []
    tokenizer = Path(config.data.tokenizer)
    if not tokenizer.is_dir():
        missing.append(f"data.tokenizer: {tokenizer} is no directory")
    for setting in ("train", "valid"):
        for entry in getattr(config.data, setting):
            names = {text.removesuffix(".bin").removesuffix(".idx") for text in (entry, entry.rpartition(" weight=")[0] or entry)}
            if "://" not in entry and not any(Path(f"{n}.bin").is_file() or glob.glob(f"{n}.bin", recursive=True) for n in names):
                missing.append(f"data.{setting}: {min(names, key=len)}.bin does not exist")
    if config.train.init_from and not Path(config.train.init_from).is_dir():
        missing.append(f"train.init_from: {config.train.init_from} is no directory")
    return missing


def check_data(config: RunConfig) -> None:
    """Raises UserError with all of :func:`missing_data`."""
    if missing := missing_data(config):
        where = f"looked for from {Path.cwd()}; make it with `python -m data_prep`, or correct the path"
        raise UserError(f"{'; '.join(missing)} ({where})")


def check_resume(config: RunConfig, run_dir: Path) -> None:
    """Refuse settings that the run in the directory would refuse, before they wait in a queue.

    Raises:
        UserError: names the settings that differ.
    """
    saved = run_dir / "config.yaml"
    if not saved.is_file() or not any((run_dir / "checkpoints").glob("step-*")):
        return
    old, _ = saved_settings(run_dir)  # what is damaged is told by the run itself
    if old is None:
        raise UserError(f"{saved}: is damaged, and no checkpoint tells the run's settings; use a new run directory")
    changes = changes_on_resume(old, config.to_dict())
    if not config.model.vocab_size:
        changes.pop("model.vocab_size", None)  # 0 follows the tokenizer
    allowed = config.train.allow_changes
    refused = [line for key, line in changes.items() if not any(key == a or key.startswith(f"{a}.") for a in allowed)]
    if refused:
        raise UserError(
            f"--run-dir {run_dir}: holds a run with other settings: {'; '.join(refused)}. Use the run's settings, name what may "
            "change in train.allow_changes, or use a new run directory"
        )
