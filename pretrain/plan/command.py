"""``python -m pretrain plan``: what a configuration would do on a cluster, without GPUs and without starting ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from unfold.pretrain.config import add_overrides, load_config
from unfold.pretrain.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="the run's configuration")
    add_overrides(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="all GPUs; one rank runs on each")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: 8")
    parser.add_argument("--gpu", metavar="NAME", help="a known GPU, e.g. H100-80GB")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU in GiB, for one that is not known")
    parser.add_argument(
        "--host-memory", type=float, default=0.0, metavar="GB", help="memory of one node in GiB, for offloading; 0: not checked"
    )
    parser.add_argument(
        "--network", type=float, default=50.0, metavar="GB/S",
        help="what each GPU can send to other nodes, in 10^9 bytes/s (default: 50, a port of 400 Gb/s for each)",
    )  # fmt: skip
    parser.add_argument(
        "--suffix", type=float, default=0.1, metavar="PART",
        help="part of a sample's raw tokens that recall under gist.recall: suffix (default: 0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--compare",
        choices=("dense", "none"),
        default="dense",
        help="what stands beside the plan: the same run with dense attention",
    )


def plan_command(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the plan that the arguments ask for. Raises UserError for what is wrong or does not fit."""
    # PyTorch and DeepSpeed take seconds to load: a wrong argument is told before.
    from unfold.pretrain.plan.hardware import GIB, Cluster, find_gpu

    if not 0 < args.suffix <= 1:
        raise UserError(f"--suffix {args.suffix:g}: is not a part of a sample, above 0 and at most 1; 0.1 is a tenth")
    gpu = find_gpu(args.gpu, args.gpu_memory)
    cluster = Cluster(gpu, args.gpus, args.gpus_per_node, args.host_memory * GIB, args.network * 1e9)
    config = load_config(args.config, args.overrides)
    from unfold.pretrain.plan.make import Planner, with_known_vocabulary
    from unfold.pretrain.plan.ranks import Division
    from unfold.pretrain.plan.report import report, stage_table

    config, planner = with_known_vocabulary(config), Planner(cluster, args.suffix)
    Division.of(config, cluster.gpus)  # names the stage whose batch cannot be divided
    plans = [planner.plan(stage.config) for stage in config.stages]
    for stage, plan in zip(config.stages, plans):
        planner.check_fits(plan, f"stage {stage.title}: " if len(plans) > 1 else "", stage.place)
    stage, plan = max(zip(config.stages, plans), key=lambda both: both[1].fullest.total)
    if len(plans) > 1:
        yield from stage_table(config.stages, plans, stage)
    config = stage.config
    dense = planner.dense(config) if args.compare == "dense" and config.model.attention == "gist" else None
    yield from report(str(args.config), plan, dense, planner.usable, stage.steps)
