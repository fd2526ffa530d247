"""The commands of ``python -m pretrain``: their flags, and what each one does."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from unfold.pretrain.config import add_overrides
from unfold.pretrain.errors import UserError, check_flags
from unfold.pretrain.evaluate.command import add_arguments as add_evaluate_arguments
from unfold.pretrain.generate import add_arguments as add_generate_arguments
from unfold.pretrain.monitor.status import EXIT_CODES_TEXT, status_command
from unfold.pretrain.monitor.status import add_arguments as add_status_arguments
from unfold.pretrain.plan.command import add_arguments as add_plan_arguments
from unfold.pretrain.plan.command import plan_command

NAME = "python -m pretrain"


def build_parser(name: str = NAME, programs: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """The whole command line. programs: name -> help of others that are listed beside these commands."""
    parser = argparse.ArgumentParser(prog=name, description="Train and use gist-attention language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for program, what in (programs or {}).items():
        commands.add_parser(program, help=what, add_help=False)

    train = commands.add_parser("train", help="train, or resume, a run", description="Train; a second call resumes.")
    train.add_argument("--config", type=Path, required=True, metavar="YAML", help="the run's configuration")
    train.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="where everything of the run is written")
    add_overrides(train)

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    export.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
    export.add_argument("--step", type=int, help="checkpoint to export (default: the newest whole one)")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    export.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="a safetensors file that is full gets no further tensor (5GB)"
    )
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: the run's precision)")
    export.add_argument(
        "--adapter", type=Path, metavar="BASE_DIR", help="write the run's adapters alone, for PEFT, beside this exported model"
    )

    importing = commands.add_parser("import", help="make a checkpoint of a Hugging Face directory, for train.init_from")
    add_import_arguments(importing)

    generate = commands.add_parser("generate", help="continue a text with a run's model or an exported one")
    add_generate_arguments(generate)

    add_checkpoints_arguments(commands.add_parser("checkpoints", help="list, verify, show, prune or convert checkpoints"))

    average = commands.add_parser("average", help="average the weights of a run's checkpoints, or take the average that it kept")
    average.add_argument("--run-dir", type=Path, required=True, metavar="DIR")
    which = average.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=int, metavar="N", help="of the N newest whole checkpoints")
    which.add_argument("--steps", type=int, nargs="+", metavar="N", help="of the checkpoints of these steps")
    which.add_argument("--exponential", action="store_true", help="the one that checkpoint.average_decay kept, of the newest")
    average.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make, like that of import")

    plan = commands.add_parser("plan", help="memory, communication and time of a run on a cluster, without GPUs")
    add_plan_arguments(plan)

    add_evaluate_arguments(commands.add_parser("evaluate", help="measure a model: perplexity, passkey, tasks, documents"))

    report = commands.add_parser("report", help="write report.html for one run, or for several to compare")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="DIR")

    about = "Look at a run without disturbing it; again and again until it has ended."
    status = commands.add_parser("status", help="is a run alive, how far is it", description=about, epilog=EXIT_CODES_TEXT)
    add_status_arguments(status)

    commands.add_parser("config-reference", help="print every configuration key, as in docs/configuration.md")
    return parser


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="HF_DIR", help="directory with config.json and safetensors")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to make; train.init_from takes it")
    parser.add_argument(
        "--chunk-sizes", default="", metavar="C,..", help="gist.chunk_sizes of the configuration that is written (default 8,4)"
    )
    parser.add_argument(
        "--gist-levels", type=int, metavar="N", help="gist ids in the vocabulary (default 4); 0: none, a dense model"
    )
    links_help = "link ids in the vocabulary, for linked contexts (default 0; the paper's 5)"
    parser.add_argument("--links", type=int, default=0, metavar="N", help=links_help)
    rows_help = "rows of new gists and links (default: the mean of all rows)"
    parser.add_argument("--gist-rows", type=Path, metavar="FILE", help=rows_help)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="made by import-tokenizer (default: made now)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the checkpoint's weights (default: as they are)")


def add_checkpoints_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--step", type=int, help="the checkpoint meant (default: --verify all, else the newest whole one)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="read every file and compare it with its hash")
    action.add_argument("--show", action="store_true", help="print what a checkpoint holds")
    action.add_argument("--prune", action="store_true", help="remove checkpoints beyond --keep and --keep-every")
    action.add_argument("--convert", type=Path, metavar="FILE", help="write a checkpoint as one safetensors file")
    parser.add_argument("--keep", type=int, metavar="N", help="--prune: newest whole ones that stay (default 1)")
    parser.add_argument("--keep-every", type=int, metavar="M", help="--prune: multiples of M stay")
    parser.add_argument("--optimizer", action="store_true", help="--convert: the optimizer's moments too, not only weights")


def _log_to_stderr() -> None:
    """DeepSpeed binds its log to stdout when it is imported; stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401


# Each command's modules are imported late: a wrong setting is told before the heavy libraries load.


def _train(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.config import load_config

    config = load_config(args.config, args.overrides)
    _log_to_stderr()
    from unfold.pretrain.train.trainer import train

    train(config, args.run_dir)
    return iter(())


def _export(args: argparse.Namespace) -> Iterator[str]:
    _log_to_stderr()
    if args.adapter:
        from unfold.pretrain.hf.adapter import export_adapter

        export_adapter(args.run_dir, args.step, args.output, args.adapter)
        return iter(())
    from unfold.pretrain.hf.export import export

    export(args.run_dir, args.step, args.output, args.dtype, args.max_shard_size)
    return iter(())


def _import(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.hf.import_model import import_model

    yield f"{import_model(args)}\n"


def _generate(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.generate import check, generate

    check(args)
    if args.run_dir:
        _log_to_stderr()
    yield from generate(args)
    yield "\n"


def _checkpoints(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.checkpoint.command import run_command

    return (f"{line}\n" for line in run_command(args))


def _average(args: argparse.Namespace) -> Iterator[str]:
    _log_to_stderr()
    from unfold.pretrain.checkpoint.average import average

    yield f"{average(args.run_dir, args.last, args.steps, args.output)}\n"


def _plan(args: argparse.Namespace) -> Iterator[str]:
    _log_to_stderr()
    return (f"{line}\n" for line in plan_command(args))


def _evaluate(args: argparse.Namespace) -> Iterator[str]:
    _log_to_stderr()
    from unfold.pretrain.evaluate.command import evaluate

    return (f"{line}\n" for line in evaluate(args))


def _report(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.report.command import write_report

    yield f"{write_report(args.run_dirs)}\n"


def _config_reference(args: argparse.Namespace) -> Iterator[str]:
    from unfold.pretrain.config.reference import reference_page

    yield reference_page()


# What each command does, as pieces of text for stdout.
COMMANDS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "train": _train,
    "export": _export,
    "import": _import,
    "generate": _generate,
    "checkpoints": _checkpoints,
    "average": _average,
    "plan": _plan,
    "evaluate": _evaluate,
    "report": _report,
    "status": status_command,
    "config-reference": _config_reference,
}


def main(argv: Sequence[str] | None = None, name: str = NAME, programs: Mapping[str, str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = build_parser(name, programs).parse_args(argv)
    # Notes of libraries to their own developers; none concerns a user of this program.
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed|deepspeed|pydantic)")
    try:
        check_flags(args)
        for piece in COMMANDS[args.command](args):
            try:
                print(piece, end="", flush=True)
            except BrokenPipeError:  # the reader of our output has gone: nothing to report to
                sys.stdout = open(os.devnull, "w")
                return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks meet the same error; one tells it
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(argv: Sequence[str] | None = None, name: str = NAME, programs: Mapping[str, str] | None = None) -> NoReturn:
    """Run a command as the whole of this process."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to lose a text
    sys.exit(main(argv, name, programs))
