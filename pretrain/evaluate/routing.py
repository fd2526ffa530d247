"""``evaluate routing``: how much of what attention looks for recall selects, by layer and by distance, for any model and text."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unfold.pretrain.errors import UserError
from unfold.pretrain.evaluate.output import COLOURS, Written, cost_table, new_figure, table, write_json
from unfold.pretrain.evaluate.perplexity import add_text_arguments, packs, read_windows, run_pack
from unfold.pretrain.evaluate.subject import add_subject_arguments

if TYPE_CHECKING:
    from unfold.pretrain.monitor.routing import RoutingMeasure


def add_arguments(parser: ArgumentParser) -> None:
    """The sub-command's flags."""
    add_subject_arguments(parser)
    add_text_arguments(parser)


def routing(args: Namespace) -> Iterator[str]:
    """Measure and write; yields lines to print.

    Raises:
        UserError: the model, the data or a length cannot be used, or another mode than recall is asked for.
    """
    if args.mode and args.mode != ["recall"]:
        raise UserError(f"--mode {' '.join(args.mode)}: only recall selects anything; leave it out")
    args.mode = ["recall"]
    subject, length, windows = read_windows(args)
    from unfold.model.decode.cost import Recorder
    from unfold.pretrain.monitor.probe import looking
    from unfold.pretrain.monitor.routing import RoutingMeasure

    results = []
    for variant in subject.variants:
        recorder = Recorder(subject.model.head_weight.device)
        measure = RoutingMeasure(variant.recalling("all"), subject.model.config.layers, once=False)
        with looking(subject.model, measure.look):
            for group in packs(windows):
                run_pack(subject, variant, group)
        if not measure.by_layer():
            raise UserError(f"--length {length}: in windows of so few tokens no gist stands before any; give a greater length")
        results.append({**variant.to_dict(), **summary(measure), "cost": recorder.to_dict()})
    tokens = sum(map(len, windows))
    content = {**subject.to_dict(), "data": args.data, "length": length, "tokens": tokens, "results": results}
    with Written(args.output) as written:
        write_json(args.output / "routing.json", content)
        draw(args.output / "routing.png", subject.name, results)
    yield f"{subject.name}: {tokens:,} raw tokens in {len(windows):,} windows of at most {length:,}"
    for result in results:
        yield ""
        yield from table(*rows(result))
    yield ""
    yield from cost_table(results)
    yield ""
    yield written.files("routing.json", "routing.png")


def summary(measure: RoutingMeasure) -> dict:
    """A variant's entry in the results."""
    by_distance = measure.by_distance.sum(0).tolist()
    filled = [i for i, (_, best) in enumerate(by_distance) if best]
    return {
        "overall": measure.overall(),
        "layers": measure.by_layer(),
        "distances": [
            {"from": 2**i, "to": 2 ** (i + 1), "coverage": by_distance[i][0] / by_distance[i][1], "mass": by_distance[i][1]}
            for i in filled
        ],
    }


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a variant's table: a layer each, then all."""
    levels = len(result["chunk_sizes"])
    names = ("coverage", "far_coverage", "hit")
    titles = [f"{name.replace('_', ' ')}{f' {level}' if levels > 1 else ''}" for name in names for level in range(levels)]
    cell = lambda x: "-" if x is None else f"{x:.3f}"
    lines = []
    for layer in result["layers"]:
        figures = [layer[name][level] for name in names for level in range(levels)]
        lines.append([str(layer["layer"]), *map(cell, figures), cell(layer["neighbour_distance"])])
    overall = result["overall"]
    figures = [overall.get(f"{name}_{level}") for name in names for level in range(levels)]
    lines.append(["all", *map(cell, figures), cell(overall.get("neighbour_distance"))])
    return [f"{result['name']}: layer", *titles, "neighbours apart"], lines


def draw(path: Path, name: str, results: list[dict]) -> None:
    """Coverage of level 0 by layer, all and far away, and by distance: a colour per variant."""
    figure, ((by_layer, by_distance),) = new_figure(11, 4.5, columns=2)
    for i, result in enumerate(results):
        colour, layers = COLOURS[i % len(COLOURS)], [entry["layer"] for entry in result["layers"]]
        for kind, style in (("far_coverage", "-"), ("coverage", "--")):
            values = [entry[kind][0] for entry in result["layers"]]
            label = f"{result['name']}, {'outside of the window' if kind == 'far_coverage' else 'all chunks'}"
            by_layer.plot(layers, values, style, color=colour, marker="o", markersize=4, label=label)
        ends = [d["to"] for d in result["distances"]]
        by_distance.plot(ends, [d["coverage"] for d in result["distances"]], "-", color=colour, marker="o", markersize=4,
                         label=result["name"])  # fmt: skip
    by_layer.set(title=f"{name}: coverage by layer", xlabel="layer", ylabel="mass selected / mass of the best", ylim=(0, 1.02))
    by_layer.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 1.5
    by_distance.set(title="coverage by distance", xlabel="raw tokens between chunk and query (end of bucket)")
    by_distance.set_ylim(0, max(1.02, by_distance.get_ylim()[1]))  # far from the best choice a bucket may hold more than 1
    by_distance.set_xscale("log", base=2)
    for axes in (by_layer, by_distance):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
