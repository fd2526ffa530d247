"""Stages of a run, and what is drawn for every sample."""

from collections import Counter

import numpy as np
import pytest
import yaml

from unfold.model.gist import GistConfig, interleave
from unfold.model.gist.recall import RECALLS, ROUTES, UNFOLDS_ALL
from unfold.pretrain.config import load_config, parse_config, parse_saved, saved_settings
from unfold.pretrain.data.blend import Arranged
from unfold.pretrain.data.flags import plain_flags, sample_flags
from unfold.pretrain.data.samples import TokenSource
from unfold.pretrain.data.stretches import stretches_of
from unfold.pretrain.data.tokenizer import load_tokenizer
from unfold.pretrain.errors import UserError
from unfold.pretrain.plan.report import packing_lines
from unfold.pretrain.safety.faults import Quarantine, Rollback
from unfold.pretrain.train.inputs import open_inputs


def config_of(tiny, path, *overrides, **sections):
    return load_config(tiny.config(path / "c.yaml", **sections), list(overrides))


def test_a_stage_holds_until_its_step(tiny, tmp_path):
    stages = [{"until": 3, "recall": "none"}, {"until": 5, "topk": 2, "unfold_share": 0.5}]
    config = config_of(tiny, tmp_path, train={"steps": 8, "stages": stages}, gist={"recall": "all", "budget_ratio": 4})
    found = [config.at(step).folding for step in range(1, 9)]
    assert [g.recall for g in found] == ["none"] * 3 + ["all"] * 5
    assert [(g.topk, g.budget_ratio) for g in found] == [(None, 4)] * 3 + [(2, None)] * 2 + [(None, 4)] * 3
    assert found[-1] == config.gist
    again = load_config(_written(config, tmp_path))
    assert again == config


def _written(config, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    return path


def test_stages_may_stand_on_the_command_line(tiny, tmp_path):
    config = config_of(tiny, tmp_path, "train.steps=9", "train.stages=[{until: 3, unfold_all: true}, {until: 6}]")
    assert [s.until for s in config.train.stages] == [3, 6]
    assert config.at(3).folding.unfold_all and not config.at(4).folding.unfold_all


@pytest.mark.parametrize(
    "stages,said",
    [
        ([{"until": 4}, {"until": 4}], "train.stages.1.until: 4 is not after the stage before it, which ends with step 4"),
        ([{"until": 40}], r"train.stages.0.until: 40 is beyond train.steps \(10\)"),
        ([{"until": 4, "recal": "all"}], "train.stages.0.recal: unknown key; did you mean train.stages.0.recall?"),
        ([{"until": 4, "recall": "some"}], "train.stages.0.recall: 'some' is not one of none, suffix, all"),
        ([{"until": 4, "topk": 2, "top_p": 0.5}], "train.stages.0.topk, top_p: set at most one of them"),
        ([{"until": 4, "forget_share": 0.8}], "train.stages.0.unfold_share: 0.5 and forget_share"),
        ([{"until": 4, "route_loss": float("inf")}], "train.stages.0.route_loss: inf is not a finite number"),
        ([{"until": True}], "train.stages.0.until: true is no number"),
        ([3], "train.stages.0: 3 is no section of settings"),
    ],
)
def test_stages_that_cannot_be(tiny, tmp_path, stages, said):
    with pytest.raises(UserError, match=said):
        config_of(tiny, tmp_path, train={"steps": 10, "stages": stages}, gist={"recall": "all", "unfold_share": 0.5})


def test_the_setting_that_stages_replaced(tiny, tmp_path):
    with pytest.raises(UserError, match="train.recall_after: unknown key; write train.stages"):
        config_of(tiny, tmp_path, "train.recall_after=4")
    config = config_of(tiny, tmp_path, train={"steps": 10}, gist={"recall": "all"}).to_dict()
    del config["train"]["stages"]
    config["train"]["recall_after"] = 4
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    old, notes = saved_settings(tmp_path)
    assert notes == [] and [(s["until"], s["recall"]) for s in old["train"]["stages"]] == [(4, "none")]
    assert parse_saved(config, "manifest.json").train.stages[0].until == 4


@pytest.fixture
def sample():
    gist = GistConfig((4, 2), recall="all", route_loss=1.0, route_queries=20)
    ids = np.arange(100)
    made = interleave(ids, [60, 5, 35], np.ones(200, bool), gist, [150, 151])
    return gist, made, np.zeros(len(made.ids), bool)


def test_draws_are_a_function_of_seed_and_sample(sample):
    gist, made, suffix = sample
    draw = lambda seed, number: sample_flags(made, suffix, gist, seed, number).tolist()
    assert draw(1, 5) == draw(1, 5) and draw(1, 5) != draw(2, 5) and draw(1, 5) != draw(1, 6)


def test_queries_have_a_gist_before_them(sample):
    gist, made, suffix = sample
    flags = sample_flags(made, suffix, gist, 1, 0)
    raw = made.level < 0
    assert (flags[~raw] == 0).all() and (flags[raw] & RECALLS).all() and not (flags & UNFOLDS_ALL).any()
    routed = np.flatnonzero(flags & ROUTES)
    assert len(routed) == 20
    for token in routed:
        assert (made.level[:token][made.doc[:token] == made.doc[token]] == 0).any()


def test_shares_of_samples(sample):
    gist, made, suffix = sample
    mixed = GistConfig((4, 2), recall="all", forget_share=0.25, unfold_share=0.5)
    drawn = [sample_flags(made, suffix, mixed, 3, number) for number in range(400)]
    forget = np.mean([not flags.any() for flags in drawn])
    unfold = np.mean([bool((flags & UNFOLDS_ALL).any()) for flags in drawn])
    assert abs(forget - 0.25) < 0.08 and abs(unfold - 0.5) < 0.08
    assert set(np.concatenate(drawn)) == {0, RECALLS, RECALLS | UNFOLDS_ALL}


def test_suffixes_alone_recall(sample):
    _, made, suffix = sample
    suffix[-20:] = made.level[-20:] < 0
    flags = plain_flags(made, suffix, GistConfig((4, 2), recall="suffix"))
    assert (flags.astype(bool) == suffix).all()
    assert not plain_flags(made, suffix, GistConfig((4, 2))).any()


LENGTHS = {"until": 6, "raw_tokens": 64}, {"until": 9, "raw_tokens": 160, "global_batch": 2}, {"until": 11, "recall": "all"}


def staged_source(tiny, tokenizer, stages, *left_out, entries=None, base=400, steps=40, seed=3):
    """A source and the stretches of a run's samples, of which a quarantine leaves out ranges."""
    train = {"steps": steps, "global_batch": 4, "stages": list(stages)}
    entries = entries or [str(tiny.train)]
    data = {"train": entries, "tokenizer": str(tiny.tokenizer), "raw_tokens": base}
    config = parse_config({"data": data, "train": train, "gist": {"chunk_sizes": [4, 2]}})
    quarantine = Quarantine([Rollback(1, "bad", *ends) for ends in left_out])
    source = TokenSource(entries, base, seed, tokenizer, "data.train")
    return config, source.along(stretches_of(config, quarantine.number)), quarantine


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny.tokenizer, 2)


def read_tokens(config, source, number, steps):
    """How often each token was read in the first steps; every sample has its stage's length."""
    seen = Counter()
    for step in range(1, steps + 1):
        stage = config.stage(step)
        for index in range(stage.samples_after(step - 1), stage.samples_after(step)):
            pieces = source.segments(number(index))
            assert sum(p.length for p in pieces) == stage.config.data.raw_tokens
            seen.update((p.document, t) for p in pieces for t in range(p.offset, p.offset + p.length))
    return seen


@pytest.mark.parametrize("left_out", [(), ((3, 5), (21, 23)), ((22, 26),)])
def test_no_token_is_read_twice_at_a_border(tiny, tokenizer, left_out):
    config, source, quarantine = staged_source(tiny, tokenizer, LENGTHS, *left_out)
    tokens = sum(int(shard.lengths.sum()) for shard in source._shards)
    steps = next(s for s in range(1, 40) if config.stage(s).raw_tokens_after(s) > 0.8 * tokens)
    assert config.stage(steps).number == 4 or steps > 11
    seen = read_tokens(config, source, quarantine.number, steps)
    assert max(seen.values()) == 1
    # Nothing lies between what was read: the last stage alone has left windows of this epoch, and samples were left out.
    stream = source._sources[0].stream(Arranged())
    stream._enter_epoch(0)
    starts = dict(zip(stream._order.tolist(), (stream._ends - stream._run_tokens[stream._order]).tolist()))
    places = np.sort([starts[document] + token for document, token in seen])
    lost = 64 * sum(n < source._stretches[1].begin for ends in left_out for n in range(*ends))
    border = config.stage(9).raw_tokens_after(9)
    assert (places < border + lost).sum() == border


def test_samples_of_a_stage_stay_when_some_are_left_out(tiny, tokenizer):
    """A rollback changes nothing of what was read before it, also in its own stage."""
    config, before, _ = staged_source(tiny, tokenizer, LENGTHS)
    _, after, quarantine = staged_source(tiny, tokenizer, LENGTHS, (13, 15))
    assert all(before.segments(n) == after.segments(n) for n in range(24))
    assert [quarantine.number(n) for n in (23, 24)] == [25, 26], "two more numbers belong to the first stage"
    assert sum(p.length for p in after.segments(25)) == 64 and sum(p.length for p in after.segments(26)) == 160


def test_stages_of_one_length_change_no_sample(tiny, tokenizer):
    stages = {"until": 5, "recall": "none"}, {"until": 9, "global_batch": 8, "lr": 1e-4}
    _, staged, _ = staged_source(tiny, tokenizer, stages)
    plain = TokenSource([str(tiny.train)], 400, 3, tokenizer, "data.train")
    assert all(staged.segments(n) == plain.segments(n) for n in range(200))
    assert staged.fingerprint_until(100) == plain.fingerprint_until(100)


def test_a_run_whose_last_stage_ends_it_may_go_on(tiny, tokenizer):
    """train.steps may be raised on resume: what was read stays, and the rest follows on it."""
    _, short, _ = staged_source(tiny, tokenizer, LENGTHS[:2], steps=9)
    config, longer, quarantine = staged_source(tiny, tokenizer, LENGTHS[:2], steps=30)
    assert all(short.segments(n) == longer.segments(n) for n in range(60))
    assert max(read_tokens(config, longer, quarantine.number, 30).values()) == 1


def test_a_leg_goes_on_in_the_next_epoch(tiny, tokenizer):
    config, source, _ = staged_source(
        tiny, tokenizer, ({"until": 100, "raw_tokens": 300}, {"until": 200, "raw_tokens": 64}), steps=300
    )
    per_epoch = source._sources[0].stream(Arranged()).tokens // 300
    assert 400 > per_epoch > 100, "the first stage takes more than an epoch"
    first = Counter(
        (p.document, t) for n in range(per_epoch) for p in source.segments(n) for t in range(p.offset, p.offset + p.length)
    )
    assert max(first.values()) == 1 and source._sources[0].stream(Arranged()).tokens - len(first) < 300
    second = [p for n in range(per_epoch, 800) for p in source.segments(n)]
    again = Counter((p.document, t) for p in second for t in range(p.offset, p.offset + p.length))
    assert max(again.values()) <= (400 - per_epoch + 400) * 300 // source._sources[0].stream(Arranged()).tokens + 1


def test_weights_of_a_stage(tiny, tokenizer):
    entries = [f"{tiny.train} weight=3", f"{tiny.valid} weight=1"]
    stages = {"until": 10, "weights": [1, 1]}, {"until": 20, "weights": [0, 1], "raw_tokens": 64}
    _, source, _ = staged_source(tiny, tokenizer, stages, entries=entries)
    assert [source.counters(n) for n in (40, 80, 120)] == [[20, 20], [20, 60], [50, 70]]
    border = len(source._sources[0].stream(Arranged())._lengths)
    assert all(p.document >= border for n in range(40, 80) for p in source.segments(n))
    with pytest.raises(UserError, match="data.train: .* has no weight, but train.stages have weights"):
        staged_source(tiny, tokenizer, ({"until": 5, "weights": [1, 2]},), entries=[str(tiny.train), str(tiny.valid)])


def test_a_change_of_weights_that_moves_windows_is_noticed(tiny, tokenizer):
    """The windows of a stage are drawn among as many as it is planned to give, which later weights of the same stage decide."""
    stages = ({"until": 30, "raw_tokens": 64},)
    sources = [
        staged_source(tiny, tokenizer, stages, entries=[f"{tiny.train} weight=3{more}", f"{tiny.valid} weight=1"])[1]
        for more in ("", ",60:1", ",130:1")
    ]
    prints = [source.fingerprint_until(20) for source in sources]
    assert prints[0] != prints[1] and prints[0] == prints[2]


def test_a_source_is_as_long_as_the_stages_need_that_it_weighs_in(tiny, tokenizer):
    """The held-out speeches are shorter than the last stage's samples, to which they give none."""
    entries = [f"{tiny.train} weight=3", f"{tiny.valid} weight=1"]
    short = TokenSource([str(tiny.valid)], 64, 1, tokenizer, "data.train").tokens
    data = {"train": entries, "tokenizer": str(tiny.tokenizer), "raw_tokens": short + 1}

    def opened(*stages, **more):
        train = {"steps": 20, "global_batch": 2, "stages": list(stages)}
        model = {"max_position": short + 1}
        return open_inputs(parse_config({"data": data | more, "train": train, "model": model, "gist": {"chunk_sizes": [4, 2]}}))

    first, last = {"until": 10, "raw_tokens": 64}, {"until": 20, "weights": [1, 0]}
    assert opened(first, last).source_samples(40, lambda n: n) == [35, 5]
    opened(first, train=[f"{tiny.train} weight=3", f"{tiny.valid} weight=1,20:0"])
    for stages in (
        (first,),
        (first, last | {"weights": [1, 0.1]}),
        (last | {"until": 10}, first | {"until": 20, "raw_tokens": short + 1}),
    ):
        with pytest.raises(UserError, match=f"hold {short} tokens, less than one sample of data.raw_tokens = {short + 1}"):
            opened(*stages)


ARRANGED = (
    {"until": 4, "raw_tokens": 64},
    {"until": 8, "raw_tokens": 160, "packing": "best_fit", "length_weights": [[2000, 2]]},
    {"until": 12, "raw_tokens": 160},
    {"until": 16, "raw_tokens": 160, "packing": "best_fit", "length_weights": [[2000, 2]]},
)


def test_a_stage_may_pack_otherwise_and_weigh_documents(tiny, tokenizer):
    """Each way of arranging documents is a stream of its own, which goes on where an earlier stage left it."""
    config, source, _ = staged_source(tiny, tokenizer, ARRANGED)
    samples = {stage.number: range(stage.samples, stage.samples_after(stage.last)) for stage in config.stages}
    at = lambda *stages: [source.segments(n) for stage in stages for n in samples[stage]]
    # Those of the stages that cut windows are the samples of a run that has no others in between, and the packed ones too.
    windows = staged_source(tiny, tokenizer, ({"until": 4, "raw_tokens": 64}, {"until": 8, "raw_tokens": 160}))[1]
    assert at(1, 3) == [windows.segments(n) for n in range(32)]
    packed = {"raw_tokens": 160, "packing": "best_fit", "length_weights": [[2000, 2]]}
    alone = staged_source(tiny, tokenizer, ({"until": 4, **packed}, {"until": 9, "raw_tokens": 64}, {"until": 13, **packed}))[1]
    assert at(2, 4) == [alone.segments(n) for n in (*range(16), *range(36, 52))]
    read = Counter((p.document, p.offset) for pieces in at(2, 4) for p in pieces)
    assert max(read.values()) <= 2 and all(sum(p.length for p in pieces) <= 160 for pieces in at(2, 4))
    assert all(
        sum(p.length for p in pieces) == config.stage(n).config.data.raw_tokens
        for n in (1, 9)
        for pieces in at(config.stage(n).number)
    )


def test_a_plan_tells_how_a_stage_packs():
    config = parse_config({"data": {"train": ["x"], "tokenizer": "t"}, "train": {"steps": 40, "stages": list(ARRANGED)}})
    lines = [text for text in packing_lines(config.stages)]
    assert lines == [f"stage {n}: documents packed as best_fit, length weights [[2000, 2.0]]" for n in (2, 4)]


def test_length_weights_of_a_stage_are_checked(tiny):
    stages = [{"until": 4, "length_weights": [[9, 2], [8, 3]]}]
    with pytest.raises(UserError, match=r"train.stages.0.length_weights: .* are not weights above 0 by rising tokens"):
        parse_config({"data": {"train": ["x"], "tokenizer": "t"}, "train": {"steps": 9, "stages": stages}})
