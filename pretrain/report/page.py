"""The parts of the report page: headline figures, charts, samples, checkpoints, configuration. All text is escaped here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from html import escape

import numpy as np

from unfold.model.kinds import describe_kinds
from unfold.pretrain.config import RunConfig, flatten
from unfold.pretrain.config.reference import sections
from unfold.pretrain.monitor.ledger import in_words, read_ledger, shares
from unfold.pretrain.monitor.status import duration
from unfold.pretrain.report.curves import AXES, Chart, Curve, draw, hover_data, make_curve, number, smoothing_window
from unfold.pretrain.report.runs import Run, parameters
from unfold.pretrain.report.sample import Picture, describe, draw_grid, draw_strip, kind_class, kind_name
from unfold.pretrain.report.titles import FROM_ZERO, KNOWN, NOT_DRAWN, OWN_UNITS, PARTED, TITLES, UNITS

COLOURS, DASHES = 6, 4
CURVE_BYTES = 1_800_000  # room for all curves of a page; the number of buckets follows from it
MOST_LAYERS = 8  # of a metric by layer that are drawn, spread evenly
MOST_OTHERS = 60  # metrics without a chart of their own design that are drawn


@dataclasses.dataclass(frozen=True)
class Figure:
    """One headline figure: what it is, the value, a remark, and a part done in 0 .. 1 to draw as a bar."""

    label: str
    value: str
    detail: str = ""
    part: float | None = None


def text(value) -> str:
    return escape(str(value), quote=True)


def figures(run: Run) -> list[Figure]:
    """The headline of one run."""
    config, done = run.config, run.steps
    planned = config.train.steps
    seconds = run.median("seconds")
    if done >= planned:
        state = "finished"
    else:
        state = f"{duration((planned - done) * seconds)} left at the median step time" if seconds else ""
    found = [Figure("Steps done", f"{done:,} / {planned:,}", state, min(done / planned, 1.0))]
    found.append(_loss("Validation loss, last", run.last("valid_loss")))
    found.append(_best(run))
    found.append(_loss("Train loss, last step", run.last("loss")))
    tokens, rate = run.last("raw_tokens"), run.median("raw_tokens_per_s")
    found.append(Figure("Raw tokens seen", _or_dash(tokens), f"{config.at(done).data.raw_tokens:,} per sample"))
    spent = f"{duration(float(run.hours[-1]) * 3600)} in steps" if run.hours is not None else ""
    found.append(Figure("Raw tokens/s, median", _or_dash(rate), spent))
    ledger = read_ledger(run.directory)
    trained = shares(ledger["spent"]).get("training", 0.0) if ledger else None
    rest = in_words(ledger["spent"]).partition("; ")[2] if ledger else "not recorded"
    found.append(Figure("Goodput", "–" if trained is None else f"{100 * trained:.1f} %", rest, trained))
    count = parameters(config.model)
    shape = f"{config.model.layers} layers, width {config.model.hidden_size}, {config.precision}"
    found.append(Figure("Parameters", _or_dash(count), shape))
    gist = config.gist
    if config.model.attention == "gist":
        sizes = " x ".join(map(str, gist.chunk_sizes))
        detail = f"chunk sizes {sizes}: {gist.ratio}x compression; recall {gist.recall}"
        if gist.choices:
            detail += f"; samples drew among {', '.join(' x '.join(map(str, c.chunk_sizes)) for c in gist.choices)}"
    else:
        detail = "no gists, no compression"
    if config.model.layer_attention:
        detail += f"; layers: {describe_kinds(config.model.layer_kinds)}"
    found.append(Figure("Attention", config.model.attention, detail))
    return found


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def _loss(label: str, loss: float | None, detail: str = "") -> Figure:
    if loss is None:
        return Figure(label, "–", "not measured yet")
    perplexity = number(math.exp(loss)) if loss < 700 else "beyond all bounds"
    return Figure(label, f"{loss:.4f}", f"perplexity {perplexity}{detail}")


def _best(run: Run) -> Figure:
    best = run.best("valid_loss")
    return _loss("Validation loss, best", best and best[0], f", step {best[1]:,}" if best else "")


def headline(runs: list[Run]) -> str:
    """Tiles for one run, a table for several."""
    columns = [figures(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(f'<div class="card"><dt>{text(f.label)}</dt><dd>{_figure(f)}</dd></div>' for f in columns[0])
        return f'<dl class="figures">{tiles}</dl>'
    scores = [run.best("valid_loss") for run in runs]
    lowest = min((s[0] for s in scores if s), default=None)
    head = "".join(f'<th scope="col">{_key(style(i))} {text(run.name)}</th>' for i, run in enumerate(runs))
    body = []
    for row in zip(*columns):
        is_best = row[0].label.endswith("best")
        cells = [
            f"<td>{_figure(f, ' ★' if is_best and score and score[0] == lowest else '')}</td>" for f, score in zip(row, scores)
        ]
        body.append(f'<tr><th scope="row">{text(row[0].label)}</th>{"".join(cells)}</tr>')
    table = f'<table class="compared"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    note = "★ lowest validation loss. Losses compare only where data and tokenizer are the same."
    return f'<div class="card scroll headline">{table}<p class="muted"><small>{note}</small></p></div>'


def _figure(figure: Figure, mark: str = "") -> str:
    detail = f'<div class="detail">{text(figure.detail)}</div>' if figure.detail else ""
    bar = "" if figure.part is None else f'<div class="bar"><i style="width:{figure.part * 100:.1f}%"></i></div>'
    return f'<span class="value">{text(figure.value)}{mark}</span>{detail}{bar}'


def style(index: int) -> str:
    """CSS classes of a run's colour and dashes: told apart without seeing colours."""
    return f"c{index % COLOURS} d{index % DASHES}"


def _key(css: str, marks: bool = False) -> str:
    circle = '<circle cx="15" cy="6" r="4"/>' if marks else ""
    return (
        f'<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true"><path class="line {css}" d="M0 6L30 6"/>'
        f'<g class="marks {css}">{circle}</g></svg>'
    )


def charts(runs: list[Run]) -> tuple[list[Chart], int]:
    """All charts of the page, and how many metrics were left out because there are too many."""
    axes = axis_names(runs)
    there = {key: None for run in runs for key in run.metrics if len(run.finite(key))}
    parted: dict[str, list[str]] = {prefix: [] for prefix in PARTED}
    for key in there:
        if prefix := next((p for p in PARTED if key.startswith(p)), None):
            parted[prefix].append(key)
    parts = {key for keys in parted.values() for key in keys}
    parted = {prefix: _some_layers(keys) for prefix, keys in parted.items()}
    others = [
        key
        for key in there
        if key not in KNOWN and key not in parts and not key.startswith(NOT_DRAWN) and not key.endswith(".of_step")
    ]
    shown = others[:MOST_OTHERS]
    total = len(runs) * (len(shown) + len(parts) + 5)
    # One bucket takes about 35 bytes per axis in the pictures and 45 in the script's data.
    buckets = int(min(max(CURVE_BYTES / (total * (35 * len(axes) + 45)), 30), 400))
    x = [_axes(run, axes) for run in runs]

    def curves(key: str, smoothed: bool, name: str = "") -> list[Curve]:
        made = []
        for i, run in enumerate(runs):
            if key in run.metrics:
                made.append(make_curve(name or run.name, style(i), x[i], run.metrics[key], buckets, smoothed))
        return [c for c in made if c]

    result = _loss_charts(runs, curves)
    result.append(Chart("Learning rate", "learning rate", curves("lr", False), from_zero=True))
    result.append(Chart("Gradient norm", "norm, before clipping", curves("grad_norm", True)))
    result.append(Chart("Throughput", "raw tokens/s", curves("raw_tokens_per_s", True), from_zero=True))
    for prefix, keys in parted.items():
        result += _parted_charts(runs, prefix, keys, curves)
    for key in shown:
        unit = _unit(key)
        result.append(Chart(TITLES.get(key, key), unit, curves(key, True), from_zero=bool(unit)))
    return [chart for chart in result if chart.curves], len(others) - len(shown)


def _some_layers(keys: list[str]) -> list[str]:
    """Of a metric by layer (keys that end in a number) at most MOST_LAYERS, the first and the last among them."""
    if len(keys) <= MOST_LAYERS or not all(key.rpartition(".")[2].isdigit() for key in keys):
        return keys
    return [keys[round(i)] for i in np.linspace(0, len(keys) - 1, MOST_LAYERS)]


def _parted_charts(runs: list[Run], prefix: str, keys: list[str], curves) -> list[Chart]:
    """A metric's parts: for one run all in one picture, for several a picture per part."""
    title, before, unit = PARTED[prefix]
    names = {key: key.removeprefix(prefix).replace("_", " ") for key in keys}
    zero = prefix in FROM_ZERO
    if len(runs) > 1:
        return [Chart(f"{before} {names[key]}", unit, curves(key, False), from_zero=zero) for key in keys]
    if all(name.isdigit() for name in names.values()):
        names = {key: f"layer {name}" for key, name in names.items()}
    together = [replace(c, style=style(i)) for i, key in enumerate(keys) for c in curves(key, False, names[key])]
    return [Chart(title, unit, together, from_zero=zero)]


def _loss_charts(runs: list[Run], curves) -> list[Chart]:
    entropies = {}
    for run in runs:
        if run.unigram_entropy is not None:
            entropies.setdefault(round(run.unigram_entropy, 4), []).append(run)
    lines = []
    for value, those in entropies.items():
        whose = "" if len(entropies) == 1 else " (" + ", ".join(run.name for run in those) + ")"
        several = ", mean over the shards" if any(len(run.config.data.train) > 1 for run in those) else ""
        lines.append((value, f"unigram entropy of the training data{several}{whose}: {value:.3f}"))
    unit, references = "loss, nats per token", tuple(lines)
    if len(runs) == 1:
        both = curves("loss", True, "train") + [replace(c, style="c1 d0") for c in curves("valid_loss", False, "validation")]
        return [Chart("Loss", unit, both, wide=True, references=references)]
    train = Chart("Train loss", unit, curves("loss", True), wide=True, references=references)
    return [train, Chart("Validation loss", unit, curves("valid_loss", False), wide=True, references=references)]


def _smoothing(runs: list[Run]) -> str:
    """What lines and the faint parts behind them are."""
    windows = sorted({smoothing_window(len(run.metrics["step"])) for run in runs})
    if windows == [1]:
        return ""
    spans = " or ".join(f"{w:,}" for w in windows)
    return (
        f"Noisy curves: the line is the mean over {spans} steps around each step; faint behind it every step, in long runs "
        "the range from the smallest to the largest value of neighbouring steps. Point at a curve for its values."
    )


def _unit(key: str) -> str:
    """What a metric's name tells of its unit; '' for nothing."""
    return OWN_UNITS.get(key) or next((unit for suffix, unit in UNITS if key.endswith(suffix)), "")


def axis_names(runs: list[Run]) -> list[str]:
    """The x axes that every run can be drawn on."""
    names = ["step"]
    if all("raw_tokens" in run.metrics and np.isfinite(run.metrics["raw_tokens"]).all() for run in runs):
        names.append("tokens")
    return names + (["hours"] if all(run.hours is not None for run in runs) else [])


def _axes(run: Run, names: list[str]) -> dict[str, np.ndarray]:
    values = {"step": run.metrics["step"], "tokens": run.metrics.get("raw_tokens"), "hours": run.hours}
    return {name: values[name] for name in names}


def charts_section(runs: list[Run]) -> tuple[str, list[dict]]:
    """HTML of the charts, and the data that the script shows under the pointer."""
    axes = axis_names(runs)
    # Runs with different batches compare by tokens, the unit of budgets; one run reads best by step.
    per_step = {tuple(s.config.train.global_batch * s.config.data.raw_tokens for s in run.config.stages) for run in runs}
    chosen = "tokens" if len(per_step) > 1 and "tokens" in axes else "step"
    parts = ['<h2 id="curves">Curves</h2><span class="muted">x axis: </span>']
    for name in axes:
        checked = " checked" if name == chosen else ""
        parts.append(f'<input class="pick" type="radio" name="axis" id="axis-{name}"{checked}><label for="axis-{name}">')
        parts.append(f"{AXES[name]}</label>")
    note = _smoothing(runs)
    parts.append(f'<p class="muted remark"><small>{text(note)}</small></p>' if note else "")
    parts.append('<div class="charts">')
    data: list[dict] = []
    made, left_out = charts(runs)
    for chart in made:
        pictures = "".join(draw(chart, axis, len(data)) for axis in axes)
        data += [hover_data(curve) for curve in chart.curves]
        legend = "".join(f"<li>{_key(c.style, c.points)}{text(c.name)}</li>" for c in chart.curves)
        wide = " wide" if chart.wide else ""
        parts.append(
            f'<figure class="card chart{wide}"><figcaption><h3>{text(chart.title)}</h3>'
            f'<ul class="legend">{legend if len(chart.curves) > 1 else ""}</ul></figcaption>{pictures}</figure>'
        )
    parts.append("</div>")
    if left_out:
        parts.append(f'<p class="muted">{left_out} more metrics are in metrics.jsonl and not drawn here.</p>')
    return "".join(parts), data


def sample_section(sample: Picture, config: RunConfig, names: list[str] | None) -> str:
    """What tokens see, for people who have never met gists. names: the runs it stands for, when there are several."""
    query = int(np.flatnonzero(sample.level < 0)[-1])
    whose = f" – {', '.join(names)}" if names else ""
    pairs = int(np.tril(sample.doc[:, None] == sample.doc[None]).sum())
    kinds = [(kind_class(k), kind_name(k)) for k in range(sample.levels + 2) if (sample.kinds() == k).any()]
    kinds += [("hidden-cell", "earlier, but not seen")] if sample.levels else []
    legend = "".join(f'<li><span class="swatch {css}"></span>{text(name)}</li>' for css, name in kinds)
    legend += '<li><span class="swatch later"></span>later, or of another document</li>'
    limit = len(sample.level) - 1
    return (
        f'<section class="card explained"><h3>What a token sees{text(whose)}</h3>{_story(config)}'
        f'<p class="muted"><small>{text(sample.origin)} {len(sample.level)} tokens, gists included; '
        f"{int(sample.mask.sum()):,} of {pairs:,} pairs of a token and an earlier one (or itself) are visible.</small></p>"
        f'<ul class="legend">{legend}</ul><div class="sample"><div><p class="says">{text(describe(sample, query))}</p>'
        f'<input type="range" min="0" max="{limit}" value="{query}" disabled aria-label="token that looks">'
        f'<p class="muted"><small>Move the slider, or click a token: grey tokens are those it does not see.</small></p>'
        f"{draw_strip(sample, query, 'the sample')}</div><div>{draw_grid(sample, query)}</div></div></section>"
    )


def _story(config: RunConfig) -> str:
    gist, model = config.gist, config.model
    others = f" Of the layers are: {describe_kinds(model.layer_kinds)}." if model.layer_attention else ""
    if model.attention != "gist":
        seen = "Dense attention: every token sees itself and all tokens before it in its document. There are no gists."
        return f"<p>{seen}{others}</p>"
    if others:
        others += " What is told here, and shown beside it, is that of gist layers; in the others gists are seen by nobody else."
    folds = [
        f"{'About every' if gist.word_aware else 'Every'} {gist.chunk_sizes[0]} raw tokens are folded into a level-0 gist (g0)"
    ]
    folds += [f"every {c} level-{i} gists into a level-{i + 1} gist (g{i + 1})" for i, c in enumerate(gist.chunk_sizes[1:])]
    neighbours = f"the {gist.n_prev} before" if gist.n_prev > 1 else "the one before" if gist.n_prev else ""
    window = f"its own chunk{' and ' + neighbours if neighbours else ''}"
    gists = " Of the level below it a gist sees what it folds, and nothing before that." if gist.own_group else ""
    sinks = f"the document's first {gist.sink} tokens (sinks), " if gist.sink else ""
    recall = ""
    if gist.recall != "none":
        recall = f" Forgetting alone is pictured; recall ({gist.recall}) also unfolds the chunks whose gists score best."
    return (
        f"<p>{', '.join(folds)}. A token sees {sinks}the raw tokens of {window}, and gists instead of everything older: "
        f"that is <em>forgetting</em>.{gists} In the grid, a row is a token that looks, a column a token that is seen."
        f"{text(recall)}{others}</p>"
    )


def checkpoints_section(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        name = f'<th scope="row">{text(run.name)}</th>' if len(runs) > 1 else ""
        for c in run.checkpoints:
            state = f"⚠ {c.defect}" if c.defect else "whole (sizes match the manifest)"
            tokens = run.config.stage(c.step).raw_tokens_after(c.step)
            rows.append(
                f"<tr>{name}<td>{c.step:,}</td><td>{number(tokens)}</td><td>{_bytes(c.bytes)}</td><td>{text(state)}</td></tr>"
            )
        if not run.checkpoints:
            rows.append(f'<tr>{name}<td colspan="4">none yet</td></tr>')
    first = '<th scope="col">Run</th>' if len(runs) > 1 else ""
    head = first + "".join(f'<th scope="col">{t}</th>' for t in ("Step", "Raw tokens", "Size", "State"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h2 id="checkpoints">Checkpoints</h2><div class="card scroll">{table}</div>'


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def configuration_section(runs: list[Run]) -> str:
    """Sections as tables; rows in which runs differ are marked, for one run the settings that are not the default."""
    trees = [run.config.to_dict() for run in runs]
    flat = [flatten(tree) for tree in trees]
    settings = [s for _, _, those in sections() for s in those]
    defaults, docs = {s.key: s.resolved for s in settings}, {s.key: s.doc for s in settings}
    several = len(runs) > 1
    differing = [key for key in flat[0] if len({repr(f.get(key)) for f in flat}) > 1]
    head = "".join(f'<th scope="col">{text(run.name)}</th>' for run in runs)
    head = f'<thead><tr><th scope="col">Setting</th>{head}</tr></thead>' if several else ""

    def row(key: str, shown: str) -> str:
        differs = ' class="differs"' if several and key in differing else ""
        cells = []
        for f in flat:
            changed = ' class="changed"' if not several and key in defaults and f[key] != defaults[key] else ""
            cells.append(f"<td{changed}><code>{_value(f[key])}</code></td>")
        name = f'<span class="key" title="{text(docs.get(key, ""))}">{text(shown)}</span>'
        return f"<tr{differs}><td>{name}</td>{''.join(cells)}</tr>"

    parts = ['<h2 id="configuration">Configuration</h2>']
    if several:
        rows = "".join(row(key, key) for key in differing) or f'<tr><td colspan="{len(runs) + 1}">nothing</td></tr>'
        parts.append(f'<div class="card scroll"><h3>What differs</h3><table>{head}<tbody>{rows}</tbody></table></div><p></p>')
    else:
        parts.append('<p class="muted"><small>Bold: not the default. Point at a setting for what it means.</small></p>')
    groups: dict[str, list[str]] = {}
    for key in flat[0]:
        groups.setdefault(key.split(".")[0] if "." in key else "", []).append(key)
    parts.append(f'<div class="sections{" several" if several else ""}">')
    for group in sorted(groups, key=lambda g: g == ""):
        rows = "".join(row(key, key.removeprefix(f"{group}.")) for key in groups[group])
        table = f"<table>{head}<tbody>{rows}</tbody></table>"
        parts.append(f'<div class="card scroll"><h3>{text(group or "other")}</h3>{table}</div>')
    return "".join(parts) + "</div>"


def _value(value) -> str:
    if isinstance(value, list):
        return "<br>".join(text(v) for v in value) if any(isinstance(v, str) for v in value) else text(value)
    return "none" if value is None else text(str(value).lower() if isinstance(value, bool) else value if value != "" else '""')
