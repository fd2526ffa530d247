"""Adapters go to PEFT and come from it: the same logits on both sides, and what does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.integration.runs import train
from unfold.pretrain.checkpoint.load import load_run
from unfold.pretrain.command import main

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "c.yaml"
    return tiny.config(path, train={"steps": 2, "valid_every": 0, "valid_samples": 1}, data={"raw_tokens": 64})


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    """A run without adapters, and its export."""
    root = tmp_path_factory.mktemp("base")
    train(config, root / "run", 1)
    assert main(["export", "--run-dir", str(root / "run"), "--output", str(root / "hf")]) == 0
    return root


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_an_adapter_trained_here_loads_in_peft(config, base, tmp_path, capsys):
    lora = ["lora.rank=4", "train.trainable=gists", f"train.init_from={base / 'run'}", "optimizer.lr=1e-2", "parallel.tensor=2"]
    train(config, tmp_path / "run", 2, *lora)
    arguments = ["export", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--output", str(tmp_path / "adapter"), "--adapter", str(base / "hf")]) == 0
    assert main([*arguments, "--output", str(tmp_path / "merged")]) == 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    ids = torch.randint(10, 500, (1, 48))
    ids[0, 5] = load_run(tmp_path / "run", None).tokenizer.gist_ids[0]  # a row that was trained
    before = logits(plain, ids)
    with_adapter = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), ids)
    torch.testing.assert_close(with_adapter, merged, atol=1e-5, rtol=1e-5)
    assert (merged - before).abs().max() > 1e-3
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (keys["peft_type"], keys["r"], keys["lora_alpha"]) == ("LORA", 4, 16)
    assert main(["export", "--run-dir", str(base / "run"), "--output", str(tmp_path / "x"), "--adapter", str(base / "hf")]) == 1
    assert "has no adapters (lora.rank: 0)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def from_peft(base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    kind = LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": [3, 4]},
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32), kind)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(0.1)
    model.save_pretrained(base / "peft")
    return base / "peft", model.eval()


SAME = ["lora.rank=3", "lora.alpha=6", "lora.rslora=true", f"lora.targets={TARGETS}"]


@pytest.mark.parametrize("ranks,layout", [(1, []), (2, ["parallel.tensor=2"])])
def test_an_adapter_of_peft_is_where_a_run_begins(config, base, from_peft, tmp_path, ranks, layout):
    directory, theirs = from_peft
    start = [f"lora.init_from={directory}", f"train.init_from={base / 'run'}", "optimizer.lr=1e-12", *layout]
    train(config, tmp_path / "run", ranks, *SAME, *start)
    assert main(["export", "--run-dir", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoModelForCausalLM

    ids = torch.randint(10, 500, (1, 48))
    ids[0, :2] = torch.tensor([3, 4])
    ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32), ids)
    torch.testing.assert_close(ours, logits(theirs, ids), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(config, base, from_peft, tmp_path):
    from unfold.pretrain.config import load_config
    from unfold.pretrain.errors import UserError
    from unfold.pretrain.hf.adapter import read_adapter

    run = load_config(config, [*SAME, f"lora.init_from={from_peft[0]}"])

    def refused(directory, told, settings=run):
        with pytest.raises(UserError) as error:
            read_adapter(directory, settings)
        assert told in str(error.value), error.value

    refused(from_peft[0], "set lora.rank=3", load_config(config, [*SAME, "lora.rank=8"]))
    refused(tmp_path, "holds no adapter_config.json")
    for change, told in (({"use_dora": True}, "use_dora: True"), ({"peft_type": "IA3"}, "is of the kind IA3")):
        shutil.copytree(from_peft[0], tmp_path / told[:3])
        keys = json.loads((from_peft[0] / "adapter_config.json").read_text()) | change
        (tmp_path / told[:3] / "adapter_config.json").write_text(json.dumps(keys))
        refused(tmp_path / told[:3], told)
    (tmp_path / "use" / "adapter_config.json").write_text((from_peft[0] / "adapter_config.json").read_text())
    (tmp_path / "use" / "adapter_model.safetensors").write_bytes(b"torn")
    refused(tmp_path / "use", "cannot be read")
