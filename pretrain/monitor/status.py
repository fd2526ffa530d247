"""``python -m pretrain status``: is a run alive, how far is it, when will it be done. Reads the run directory only."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from unfold.pretrain.checkpoint.manifest import checkpoint_directories, peek_manifest
from unfold.pretrain.errors import UserError
from unfold.pretrain.monitor.ledger import in_words, read_ledger, shares
from unfold.pretrain.safety.alive import HEARTBEAT_SECONDS, HEARTBEATS, LOCK, STACKS
from unfold.pretrain.safety.faults import Rollback, read_quarantine

EXIT_CODES = {"starting": 0, "running": 0, "finished": 0, "stopped": 3, "dead": 4, "hung": 5}
EXIT_CODES_TEXT = "exit codes: 0 starting, running or finished; 1 not a run; 3 stopped, its state saved; 4 dead; 5 hung"
ENDED = ("finished", "stopped", "dead")
CLEAR = "\033[H\033[J"  # of the terminal: each look replaces the one before
SILENT_SECONDS = 4 * HEARTBEAT_SECONDS  # a rank that gave no sign of life for so long is taken for gone
RECENT = 20  # steps that rate and time left are measured over
TAIL_BYTES = 1 << 18  # of metrics.jsonl, several hundred steps; the file of a long run is not read whole
LEAST_LIMIT = 300.0  # seconds without progress in training that are never called a hang
FACTOR_OF_A_STEP = 20  # nor are so many usual steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--once", action="store_true", help="print once, instead of again and again until the run has ended")
    parser.add_argument("--json", action="store_true", help="one JSON object per look, for programs")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default 5)")


@dataclass(frozen=True)
class Status:
    """What a run directory tells of its run; None where it does not tell.

    Attributes:
        state: starting (alive, no step done yet), running, hung (alive, but nothing gets on), finished (the last step is
            done and saved), stopped (not alive, its last step is saved: it goes on from there) or dead (not alive, work
            after the last checkpoint is lost).
        why: in words, what the state was concluded from; '' where nothing is to say.
        step, steps: done, and to do in all.
        phase: what the main rank is doing: start, training, validation, saving, rollback.
        ranks, hosts: that gave a sign of life lately.
        progress_s: seconds since the rank that is furthest behind got on.
        raw_tokens_per_s, step_s: over the last steps, validations and pauses for checkpoints aside.
        left_s: for the remaining steps at that rate.
        loss, valid_loss, valid_step: of the last step, and of the last validation and its step.
        checkpoint_step, checkpoint_age_s: of the newest checkpoint whose files are there in full size.
        checkpoint_error: why the last save failed; '' when it did not.
        skipped: steps without an update among the last few hundred.
        goodput: share of the time since the first start that trained; spent: seconds of it by what they went to (see
            :mod:`unfold.pretrain.monitor.goodput`).
        stage: of a run with stages, the last step's number and name.
        rollbacks: of the whole run; last_rollback: the newest one in words, '' for none.
    """

    state: str
    why: str
    step: int
    steps: int
    phase: str | None
    ranks: int
    hosts: int
    progress_s: float | None
    raw_tokens_per_s: float | None
    step_s: float | None
    left_s: float | None
    loss: float | None
    valid_loss: float | None
    valid_step: int | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    checkpoint_error: str
    skipped: int
    rollbacks: int
    last_rollback: str
    goodput: float | None
    spent: dict[str, float]
    stage: str = ""


def read_status(run_dir: Path) -> Status:
    """Look at a run.

    Raises:
        UserError: the directory is not there, holds no run, or its configuration is damaged.
    """
    config = _read_config(run_dir)
    steps, hang_minutes = config["train"]["steps"], config.get("faults", {}).get("hang_minutes", 30.0)
    lines = _tail(run_dir / "metrics.jsonl")
    step = lines[-1]["step"] if lines else 0
    rate, step_s = _rate(lines[-RECENT:])
    saved, age = _newest_checkpoint(run_dir)
    beats = _heartbeats(run_dir)
    main = next((b for b in beats if b["rank"] == 0), None)
    alive, why = _is_alive(run_dir, beats)
    waited = time.time() - min((b["progress"] for b in beats), default=time.time())
    if alive:
        state, trouble = ("starting" if not step else "running"), _hangs(beats, waited, step_s, hang_minutes)
        state, why = ("hung", trouble) if trouble else (state, why)
    else:
        state, why = _how_it_ended(run_dir, step, steps, saved, why, beats)
    validated = next((m for m in reversed(lines) if m.get("valid_loss") is not None), {})
    fresh = [b for b in beats if time.time() - b["alive"] < SILENT_SECONDS] if alive else []
    rollbacks, ledger = read_quarantine(run_dir).rollbacks, read_ledger(run_dir)
    return Status(
        state=state,
        why=why,
        step=step,
        steps=steps,
        phase=main["phase"] if alive and main else None,
        ranks=len(fresh),
        hosts=len({b["host"] for b in fresh}),
        progress_s=waited if alive and beats else None,
        raw_tokens_per_s=rate,
        step_s=step_s,
        left_s=(steps - step) * step_s if step_s is not None else None,
        loss=lines[-1].get("loss") if lines else None,
        valid_loss=validated.get("valid_loss"),
        valid_step=validated.get("step"),
        checkpoint_step=saved,
        checkpoint_age_s=age,
        checkpoint_error=next((m.get("checkpoint_error", "") for m in reversed(lines) if "checkpoint_s" in m), ""),
        skipped=sum(bool(m.get("skipped")) for m in lines),
        rollbacks=len(rollbacks),
        last_rollback=_in_words(rollbacks[-1]) if rollbacks else "",
        goodput=shares(ledger["spent"]).get("training", 0.0) if ledger else None,
        spent=ledger["spent"] if ledger else {},
        stage=" ".join(str(lines[-1][name]) for name in ("stage", "stage_name") if name in lines[-1]) if lines else "",
    )


def _in_words(rollback: Rollback) -> str:
    return f"step {rollback.step}: {rollback.reason}, samples {rollback.first}..{rollback.stop - 1} left out"


def _read_config(run_dir: Path) -> dict:
    """config.yaml as it stands there: checking it in full takes longer than everything else together."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: {'is a file' if run_dir.exists() else 'does not exist'}; give a run directory")
    path = run_dir / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
        if isinstance(tree["train"]["steps"], int):
            return tree
        reason = "train.steps is not a number"
    except FileNotFoundError:
        started = (run_dir / LOCK).exists() or (run_dir / "launch").exists()
        more = "; its job has not begun to train" if started else ""
        raise UserError(f"{run_dir}: is not a run directory (it has no config.yaml{more})") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "train.steps is missing"
    raise UserError(f"{path}: is damaged ({reason}); restore it from the manifest of a checkpoint")


def _tail(path: Path) -> list[dict]:
    """The last whole lines of a metrics file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            texts = file.read().split(b"\n")
    except OSError:
        return []
    lines = []
    for text in texts[1:] if size > TAIL_BYTES else texts:
        try:
            line = json.loads(text)
        except ValueError:  # torn by a kill, or being written right now
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _rate(lines: list[dict]) -> tuple[float | None, float | None]:
    """(raw tokens/s, seconds per step). The median step: the first one after a start takes many times longer."""
    timed = [(m["seconds"], m["raw_tokens_per_s"] * m["seconds"]) for m in lines if "seconds" in m and "raw_tokens_per_s" in m]
    if not timed:
        return None, None
    seconds = statistics.median(s for s, _ in timed)
    return statistics.median(tokens for _, tokens in timed) / seconds, seconds


def _newest_checkpoint(run_dir: Path) -> tuple[int | None, float | None]:
    for directory in checkpoint_directories(run_dir):
        try:
            return peek_manifest(directory).step, max(0.0, time.time() - (directory / "manifest.json").stat().st_mtime)
        except (UserError, OSError):  # damaged, or pruned while we look
            continue
    return None, None


def _heartbeats(run_dir: Path) -> list[dict]:
    """The last sign of life of every rank of the latest start."""
    beats = []
    for path in sorted((run_dir / HEARTBEATS).glob("rank-*.json")):
        try:
            beat = json.loads(path.read_text())
            beats.append({name: beat[name] for name in ("rank", "host", "step", "phase", "progress", "alive")})
        except (OSError, ValueError, KeyError, TypeError):  # being replaced
            continue
    newest = max((b["alive"] for b in beats), default=0.0)
    # A start with fewer ranks leaves the files of the others behind; those of a rank that fell silent are not that old.
    main = next((b for b in beats if b["rank"] == 0), None)
    began = min(main["progress"], newest - SILENT_SECONDS) if main else 0.0
    return [b for b in beats if b["alive"] >= began]


def _is_alive(run_dir: Path, beats: list[dict]) -> tuple[bool, str]:
    """Whether the main rank lives. Its lock tells for certain on its own host, and wherever locks reach over the network."""
    try:
        with open(run_dir / LOCK) as file:
            holder = file.read().strip()
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a start that comes at this very moment tries again
            except BlockingIOError:
                return True, holder
            except OSError:  # a file system without locks
                holder = ""
    except OSError:
        holder = ""
    if holder.startswith(f"host {socket.gethostname()}, "):
        return False, f"its process ({holder}) is gone"
    main = next((b for b in beats if b["rank"] == 0), None)
    if main is None:
        return False, "no rank has given a sign of life"
    silent = time.time() - main["alive"]
    return silent < SILENT_SECONDS, f"the last sign of life of rank 0 (host {main['host']}) is {duration(silent)} old"


def _hangs(beats: list[dict], waited: float, step_s: float | None, hang_minutes: float) -> str:
    """Why an alive run is called hung; '' when it is not."""
    now = time.time()
    silent = [b for b in beats if now - b["alive"] > SILENT_SECONDS]
    if silent:
        who = ", ".join(f"{b['rank']} (host {b['host']})" for b in silent)
        return f"rank {who} gives no sign of life since {duration(now - min(b['alive'] for b in silent))}"
    # Only of training steps it is known how long they take; elsewhere the watchdog's own limit holds.
    limit = 60 * hang_minutes if hang_minutes else float("inf")
    if step_s is not None and all(b["phase"] == "training" for b in beats):
        limit = min(limit, max(LEAST_LIMIT, FACTOR_OF_A_STEP * step_s))
    if waited <= limit:
        return ""
    last = min(beats, key=lambda b: b["progress"])
    return f"rank {last['rank']} (host {last['host']}) is in step {last['step']} ({last['phase']}) since {duration(waited)}"


def _how_it_ended(run_dir: Path, step: int, steps: int, saved: int | None, why: str, beats: list[dict]) -> tuple[str, str]:
    if step >= steps and saved == step:
        return "finished", ""
    if saved is not None and saved == step:
        return "stopped", "its last step is saved; the same command goes on from there"
    stacks = run_dir / STACKS
    last = max((b["alive"] for b in beats), default=0.0)
    if stacks.is_dir() and any(p.stat().st_mtime > last - SILENT_SECONDS for p in stacks.iterdir()):
        why += f"; it hung, what its threads did is in {stacks}"
    return "dead", why


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def render(status: Status, run_dir: Path) -> list[str]:
    """Lines for people."""
    part = f"step {status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.1f} %)"
    left = f", {duration(status.left_s)} left" if status.left_s and status.state == "running" else ""
    lines = [f"{run_dir}: {status.state.upper() if EXIT_CODES[status.state] else status.state}, {part}{left}"]
    row = lambda name, text: lines.append(f"  {name:<11} {text}")
    if status.why:
        row("because" if EXIT_CODES[status.state] else "process", status.why)
    if status.phase and status.progress_s is not None:
        where = f"{status.ranks} rank{'s' * (status.ranks != 1)} on {status.hosts} host{'s' * (status.hosts != 1)}"
        row("doing", f"{status.phase}, {where}, all got on within {duration(status.progress_s)}")
    if status.stage:
        row("stage", status.stage)
    if status.step:
        validated = f", validation {status.valid_loss:.4f} at step {status.valid_step:,}" if status.valid_loss is not None else ""
        row("loss", ("not finite" if status.loss is None else f"{status.loss:.4f}") + validated)
    if status.raw_tokens_per_s is not None:
        row("rate", f"{status.raw_tokens_per_s:,.0f} raw tokens/s, {status.step_s:.3g} s per step")
    saved = "none that is whole"
    if status.checkpoint_step is not None:
        saved = f"step {status.checkpoint_step:,}, {duration(status.checkpoint_age_s)} ago"
    row("checkpoint", saved + (f"; the last save FAILED: {status.checkpoint_error}" if status.checkpoint_error else ""))
    if status.goodput is not None:
        row("goodput", in_words(status.spent))
    if status.skipped:
        row("skipped", f"{status.skipped} of the last steps, without a finite loss and gradient")
    if status.rollbacks:
        row("rollbacks", f"{status.rollbacks}, the last at {status.last_rollback}")
    return lines


def status_command(args: argparse.Namespace) -> Iterator[str]:
    """Pieces of text for stdout: one look, or looks until the run has ended.

    Raises:
        UserError: as :func:`read_status`.
        SystemExit: with the state's exit code, where that is not 0.
    """
    if args.every <= 0:
        raise UserError(f"--every {args.every:g}: is not above 0")
    on_terminal = sys.stdout.isatty() and not args.once
    while True:
        status = read_status(args.run_dir)
        text = json.dumps(asdict(status)) if args.json else "\n".join(render(status, args.run_dir))
        yield f"{CLEAR if on_terminal and not args.json else ''}{text}\n"
        if args.once or status.state in ENDED:
            break
        time.sleep(args.every)
    if EXIT_CODES[status.state]:
        raise SystemExit(EXIT_CODES[status.state])
