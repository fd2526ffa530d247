"""Chunk sizes that samples draw: the same draws, losses and losses by choice under every layout, and after a resume; and what the
run is used for afterwards takes any of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.integration.runs import series, train
from unfold.model.config import sizes_name
from unfold.model.gist import Recall, build_layout, interleave
from unfold.model.visibility import IGNORED
from unfold.pretrain.checkpoint.load import find_run, load_model
from unfold.pretrain.command import main
from unfold.pretrain.config import load_config
from unfold.pretrain.data.choices import drawn
from unfold.pretrain.errors import UserError
from unfold.pretrain.train.inputs import open_inputs

CHOICES = [{"chunk_sizes": [4, 2]}, {"chunk_sizes": [8]}, {"chunk_sizes": [4, 2, 2], "weight": 2}]
NAMES = [sizes_name(tuple(choice["chunk_sizes"])) for choice in CHOICES]
STEPS = 4


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """Every raw token recalls, by the budget of its sample's own ratio, and the routing loss is taken."""
    gist = {"chunk_sizes": [4, 2], "choices": CHOICES, "recall": "all", "route_loss": 1.0, "route_queries": 16}
    train = {"steps": STEPS, "valid_every": 2, "valid_samples": 2, "valid_choices": True}
    path = tmp_path_factory.mktemp("choices") / "c.yaml"
    return tiny.config(path, gist=gist, train=train, checkpoint={"every": 2}, model={"kv_heads": 4})


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """(run directory, metrics) of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return run_dir, train(config, run_dir, 1)


def close(got, want):
    """Figures of every step, those by choice included."""
    for a, b in zip(got, want, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 * b["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-5 * b["grad_norm"]
        by_choice = {key for key in b if key.startswith("loss.")}
        assert by_choice and by_choice == {key for key in a if key.startswith("loss.")}
        for key in (*by_choice, "unfolded_tokens", "route_loss"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
        for key in ("valid_loss", *(f"valid_loss.{name}" for name in NAMES)):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5), key


@pytest.mark.parametrize(
    "ranks,layout",
    [
        (1, ["train.micro_batch=4"]),
        (2, ["parallel.zero=2", "train.micro_batch=2"]),
        (2, ["parallel.context=2"]),
        long(2, ["parallel.context=2", "train.micro_batch=4"]),
        long(2, ["parallel.context=2", "parallel.context_method=ulysses", "train.micro_batch=2"]),
        long(4, ["parallel.context=4", "parallel.context_heads=2", "train.micro_batch=2"]),
        long(2, ["parallel.tensor=2", "parallel.sequence=true", "train.micro_batch=2"]),
        long(2, ["parallel.pipeline=2"]),
        long(2, ["parallel.pipeline=2", "train.micro_batch=2"]),
        long(4, ["parallel.pipeline=2", "parallel.context=2", "train.micro_batch=2"]),
        long(2, ["parallel.zero=3"]),
    ],
)
def test_a_layout_gives_the_losses_of_one_process(config, alone, tmp_path, ranks, layout):
    """Samples of different choices share micro-batches, or are on ranks of their own."""
    close(train(config, tmp_path / "run", ranks, *layout), alone[1])


def test_a_resume_draws_the_same(config, alone, tmp_path):
    run_dir, want = alone
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    got = train(config, tmp_path / "run", 1)
    names = ["loss", "grad_norm", *(f"loss.{sizes_name(tuple(c['chunk_sizes']))}" for c in CHOICES)]
    assert series(got, *names) == series(want, *names)


def test_losses_by_choice_are_those_of_the_samples_that_drew_it(config, alone):
    """Every document is all text, so the loss of a step is the mean of them by loss tokens; and which were drawn is known."""
    settings = load_config(config)
    batch = settings.train.global_batch
    for step, line in enumerate(alone[1]):
        names = {
            sizes_name(drawn(settings.gist, settings.train.seed, n).chunk_sizes) for n in range(step * batch, (step + 1) * batch)
        }
        assert {key.removeprefix("loss.") for key in line if key.startswith("loss.")} == names
        by_choice = [line[f"loss.{name}"] for name in names]
        assert min(by_choice) <= line["loss"] * (1 + 1e-6) and line["loss"] <= max(by_choice) * (1 + 1e-6)


def test_validation_reads_held_out_samples_with_every_choice(config, alone):
    """The losses in the metrics are those of the checkpoint's model, read with these sizes."""
    run_dir, metrics = alone
    for line in metrics:
        assert all((key in line) == (line["step"] % 2 == 0) for key in ("valid_loss", "valid_loss.8"))
    found, valid = find_run(run_dir, STEPS), open_inputs(load_config(config)).valid
    model = load_model(found)
    for name, choice in zip(NAMES, CHOICES):
        builder = valid.folding(found.config.gist.with_sizes(tuple(choice["chunk_sizes"])))
        batches = [builder.build([n]) for n in range(2)]
        with torch.no_grad():
            loss = sum(model(b).item() for b in batches) / sum(int((b.labels != IGNORED).sum()) for b in batches)
        assert metrics[-1][f"valid_loss.{name}"] == pytest.approx(loss, abs=1e-5)
    assert metrics[-1]["valid_loss.4x2"] == metrics[-1]["valid_loss"]
    for wrong, lacks in ((["data.valid=[]"], "data.valid"), (["gist.choices=[]"], "gist.choices")):
        with pytest.raises(UserError, match=f"train.valid_choices: true, but there are no {lacks}"):
            load_config(config, wrong)


def test_the_report_draws_them_together(alone):
    assert not main(["report", str(alone[0])])
    page = (alone[0] / "report.html").read_text()
    assert "Loss by chunk sizes" in page and "samples drew among 4 x 2, 8, 4 x 2 x 2" in page
    assert "Validation loss by chunk sizes" in page


@pytest.mark.parametrize("sizes", ["8", "4,2,2"])
def test_generation_and_evaluation_take_any_choice(alone, tiny, tmp_path, capsys, sizes):
    run_dir = str(alone[0])
    asked = ["generate", "--run-dir", run_dir, "--prompt", "The people " * 8, "--max-new-tokens", "3", "--stats"]
    assert not main(asked)
    assert "gists 4,2," in capsys.readouterr().err
    assert not main([*asked, "--chunk-sizes", sizes])
    assert f"gists {sizes}," in capsys.readouterr().err
    data = [
        "--data",
        str(tiny.valid),
        "--length",
        "64",
        "--max-tokens",
        "128",
        "--mode",
        "forget",
        "--output",
        str(tmp_path / "p"),
    ]
    assert not main(["evaluate", "perplexity", "--run-dir", run_dir, "--chunk-sizes", sizes, "4,2", *data])
    made = json.loads((tmp_path / "p" / "perplexity.json").read_text())
    assert sizes.split(",") == [str(size) for size in made["results"][0]["chunk_sizes"]]


def test_an_export_names_its_default_and_takes_any_choice(alone, tmp_path):
    """Logits of transformers are those of the run's model, read with the same sizes."""
    import transformers

    assert not main(["export", "--run-dir", str(alone[0]), "--output", str(tmp_path / "hf")])
    entry = json.loads((tmp_path / "hf" / "config.json").read_text())["gist"]
    assert (
        entry["chunk_sizes"] == [4, 2]
        and entry["choices"] == [c["chunk_sizes"] for c in CHOICES]
        and len(entry["token_ids"]) == 3
    )
    how = {"trust_remote_code": True, "attn_implementation": "gist"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **how).eval()
    found = find_run(alone[0], None)
    ours, tokenizer = load_model(found), found.tokenizer
    raw = torch.arange(60) % 300 + 20
    for choice in CHOICES:
        gist = found.config.gist.with_sizes(tuple(choice["chunk_sizes"]))
        made = interleave(raw.numpy(), [60], tokenizer.word_starts, gist, tokenizer.gist_ids[: gist.levels])
        layout = build_layout(torch.from_numpy(made.level)[None], torch.from_numpy(made.doc)[None], gist)
        want = ours.logits(torch.from_numpy(made.ids)[None], layout, Recall.of(layout, gist))[0, made.raw]
        with torch.no_grad():
            out = theirs(raw[None], gist_chunk_sizes=choice["chunk_sizes"], use_cache=True)
        sure = 60 - 8 - 8 // 2  # the last chunk may still grow where text goes on
        torch.testing.assert_close(out.logits[0, :sure], want[:sure], rtol=0, atol=2e-5)
        text = theirs.generate(raw[None], gist_chunk_sizes=choice["chunk_sizes"], max_new_tokens=3, do_sample=False)
        assert text.shape[0] == 1 and 60 < text.shape[1] <= 63
    with pytest.raises(ValueError, match=r"gist_chunk_sizes: \[2, 2, 2, 2\].*3 token_ids"):
        theirs(raw[None], gist_chunk_sizes=[2, 2, 2, 2])
    with pytest.raises(ValueError, match="begin a new one"):
        theirs(raw[None], gist_chunk_sizes=[3], past_key_values=out.past_key_values)
