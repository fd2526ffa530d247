"""SmolLM2-135M before and after a short continued pretraining with gists: its perplexity on text held out, and its export.

    apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb DOC     # or other texts, one document per file
    python -m tests.benchmarks.smollm2_gists --cache DIR --output DIR --text DOC/usr/share/doc/python3.11/html/_sources

Makes the model's Hugging Face directory (tests/benchmarks/smollm2.py), imports it, makes shards of the texts with its tokenizer,
evaluates, trains (first forgetting alone, then with recall), evaluates again on the same held-out text, and exports with proof.
What is there already is not done again, and training resumes: the same command goes on after an interruption. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.smollm2 import fetch, hf_directory

HELD_OUT = 0.08  # of the documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where downloads are kept")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="everything that is made")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="files or directories of text")
    parser.add_argument("--chunk-sizes", default="8", metavar="C,..", help="of the gists (default 8)")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--recall-steps", type=int, default=40, help="last ones of them, in which every raw token recalls")
    parser.add_argument("--raw-tokens", type=int, default=1024, help="of a sample, and of a window of the evaluation")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training; evaluation is in fp32")
    parser.add_argument("--tokens", type=int, default=24576, help="held-out raw tokens that are evaluated on")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print(json.dumps(experiment(args), indent=1))


def experiment(args: argparse.Namespace) -> dict:
    root = args.output
    if not (root / "hf" / "tokenizer.json").exists():  # written last
        hf_directory(fetch(args.cache), root / "hf")
    make(root / "imported", "pretrain", "import", "--input", root / "hf", "--chunk-sizes", args.chunk_sizes)
    if not (root / "text_valid.idx").exists():
        shards = ["--input", *args.text, "--tokenizer", root / "imported" / "tokenizer", "--output", root / "text"]
        command("data_prep", "tokenize", *shards, "--valid-fraction", HELD_OUT, "--workers", 1)
    before = evaluate(args, root / "imported", root / "before")
    command("pretrain", "train", "--config", root / "imported" / "config.yaml", "--run-dir", root / "run", *settings(args))
    after = evaluate(args, root / "run", root / "after")
    make(root / "exported", "pretrain", "export", "--run-dir", root / "run", "--dtype", "bf16")
    proof = json.loads((root / "exported" / "export_proof.json").read_text())
    steps = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": len(steps),
        "raw_tokens": steps[-1]["raw_tokens"],
        "training_s": round(sum(step["seconds"] for step in steps)),
        "perplexity": [compare(a, b, before[0], after[0]) for a, b in zip(before, after, strict=True)],
        "export_proof": {k: proof[k] for k in ("largest_logit_difference", "gist", "warnings")},
    }


def settings(args: argparse.Namespace) -> list:
    """Overrides of the imported configuration, for a run that is short."""
    root = args.output
    chosen = {
        "data.train": f"[{root / 'text_train'}]",
        "data.valid": f"[{root / 'text_valid'}]",
        "data.raw_tokens": args.raw_tokens,
        "precision": args.precision,
        "gist.recall": "all",
        "train.recall_after": args.steps - args.recall_steps,
        "train.steps": args.steps,
        "train.global_batch": args.batch,
        "train.valid_every": 0,
        "optimizer.lr": args.lr,
        "parallel.zero": 1,
        "checkpoint.every": 20,
        "checkpoint.keep": 1,
        "monitor.wandb": "false",
    }
    return [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]


def evaluate(args: argparse.Namespace, run_dir: Path, output: Path) -> list[dict]:
    """Results of ``evaluate perplexity``: dense, forget and recall."""
    data = ["--data", args.output / "text_valid", "--length", args.raw_tokens, "--max-tokens", args.tokens]
    if not (output / "perplexity.json").exists():
        gists = ["--mode", "dense", "forget", "recall", "--chunk-sizes", args.chunk_sizes]
        command("pretrain", "evaluate", "perplexity", "--run-dir", run_dir, *data, *gists, "--output", output)
    return json.loads((output / "perplexity.json").read_text())["results"]


def compare(before: dict, after: dict, dense_before: dict, dense_after: dict) -> dict:
    """A row of the table: perplexity before and after, and as a multiple of that of dense attention at the time."""
    return {
        "name": before["name"],
        "before": round(before["perplexity"], 3),
        "to_dense_before": round(before["perplexity"] / dense_before["perplexity"], 3),
        "after": round(after["perplexity"], 3),
        "to_dense_after": round(after["perplexity"] / dense_after["perplexity"], 3),
        "after_to_before": round(after["perplexity"] / before["perplexity"], 4),
        "unfolded": [round(before["unfolded"], 1), round(after["unfolded"], 1)],
    }


def make(directory: Path, *arguments) -> None:
    """Run a command that makes a directory whole or not at all, unless it is there."""
    if not directory.exists():
        command(*arguments, "--output", directory)


def command(package: str, *arguments) -> None:
    subprocess.run([sys.executable, "-m", package, *map(str, arguments)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
