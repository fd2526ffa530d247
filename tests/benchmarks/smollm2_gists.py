"""SmolLM2-135M after continued pretraining on the same tokens in several ways: perplexity, coverage, passkey, questions.

    apt-get download python3.11-doc && dpkg-deb -x python3.11-doc_*.deb DOC     # or other texts, one document per file
    python -m tests.benchmarks.smollm2_gists --cache DIR --output DIR --text DOC/usr/share/doc/python3.11/html/_sources

Makes the model's Hugging Face directory (tests/benchmarks/smollm2.py), imports it, makes shards of the texts with its tokenizer,
trains every arm, evaluates the checkpoints of all on the same held-out text, and exports those with gists, with proof. What is
there already is not done again, and training resumes: the same command goes on after an interruption. Arms may also be trained
by several commands at a time (--arms). Prints one JSON object; writes results.json and table.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.docs_questions import write_questions
from tests.benchmarks.smollm2 import fetch, hf_directory

HELD_OUT = 0.08  # of the documents
ROUTED_TOKENS = 65536  # raw tokens at most for coverage, which takes longer than perplexity
TASK = "qa_docs.jsonl"  # of the output, where pages of Python's documentation are among the texts
ROUTED = {"gist.recall": "all", "gist.route_loss": 0.3, "gist.route_far": "true"}
# Steps are parts of all of them. The paper forgets first, and recalls in the last fifth; the recipe unfolds everything in the
# first third, where gists learn to be found at the full weight.
WIDE = "{{until: {third}, unfold_all: true, route_loss: 1.0}}"
WIDE_FIRST = f"[{WIDE}]"
# As in launch/configs/routed/: budgets shrink to the usual one, a quarter unfolds everything to the end. The window is 64 tokens.
WINDOWED = {**ROUTED, "gist.own_group": "true", "gist.unfold_share": 0.25}
SHRINKING_8 = f"[{WIDE}, {{{{until: {{nine_twentieths}}, budget_ratio: 2}}}}, {{{{until: {{three_fifths}}, budget_ratio: 4}}}}]"
SHRINKING_16 = f"[{WIDE}, {{{{until: {{nine_twentieths}}, budget_ratio: 4}}}}, {{{{until: {{three_fifths}}, budget_ratio: 8}}}}]"
ARMS = {
    "dense": {"model.attention": "dense"},
    "paper_8": {"gist.chunk_sizes": "[8]", "gist.recall": "all", "train.stages": "[{{until: {four_fifths}, recall: none}}]"},
    "recipe_8": {"gist.chunk_sizes": "[8]", **ROUTED, "train.stages": WIDE_FIRST},
    "recipe_4x4": {
        "gist.chunk_sizes": "[4, 4]",
        **ROUTED,
        "gist.own_group": "true",
        "gist.recall_from": 2,
        "train.stages": WIDE_FIRST,
    },
    "recipe_16": {"gist.chunk_sizes": "[16]", **ROUTED, "train.stages": WIDE_FIRST},
    "windowed_8": {"gist.chunk_sizes": "[8]", **WINDOWED, "gist.n_prev": 8, "train.stages": SHRINKING_8},
    "windowed_4x4": {
        "gist.chunk_sizes": "[4, 4]",
        **WINDOWED,
        "gist.n_prev": 16,
        "gist.recall_from": 2,
        "train.stages": SHRINKING_16,
    },
    "distilled_8": {
        "gist.chunk_sizes": "[8]",
        **ROUTED,
        "distill.logits": 1.0,
        "distill.every": 4,
        "train.stages": WIDE_FIRST,
    },
}
USUAL = ["dense", "paper_8", "recipe_8", "recipe_4x4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where downloads are kept")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="everything that is made")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="files or directories of text")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=USUAL, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=245)
    parser.add_argument("--raw-tokens", type=int, default=1024, help="of a sample, and of a window of the evaluation")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training")
    parser.add_argument("--evaluation-dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out raw tokens that are evaluated on")
    words = "checkpoints to evaluate (default: the last); where they are there, nothing is trained"
    parser.add_argument("--at", type=int, nargs="+", metavar="STEP", help=words)
    parser.add_argument("--before", action="store_true", help="also evaluate the model as it was imported")
    parser.add_argument("--export", action="store_true", help="also export the arms with gists, with proof")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    print(json.dumps(experiment(args), indent=1))


def experiment(args: argparse.Namespace) -> dict:
    root = args.output
    if not (root / "hf" / "tokenizer.json").exists():  # written last
        hf_directory(fetch(args.cache), root / "hf")
    make(root / "imported", "pretrain", "import", "--input", root / "hf", "--chunk-sizes", "8")
    if not (root / "text_valid.idx").exists():
        shards = ["--input", *args.text, "--tokenizer", root / "imported" / "tokenizer", "--output", root / "text"]
        command("data_prep", "tokenize", *shards, "--valid-fraction", HELD_OUT, "--workers", 1)
    if not (root / TASK).exists():
        write_questions(args.text, root / TASK)
    results = {}
    if args.before:
        results["before"] = evaluate(args, "dense", 0, root / "evaluated" / "before")
    for arm in args.arms:
        run_dir = root / "runs" / arm
        steps = args.at or [args.steps]
        if not all((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists() for step in steps):
            command("pretrain", *training(args, arm))
        for step in steps:
            tokens = step * args.batch * args.raw_tokens
            found = evaluate(args, arm, step, root / "evaluated" / f"{arm}-{step}")
            results[f"{arm} {tokens}"] = {"arm": arm, "raw_tokens": tokens, **found}
        if args.export and arm != "dense":
            make(root / "exported" / arm, "pretrain", "export", "--run-dir", run_dir, "--dtype", "bf16")
    (root / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (root / "table.md").write_text("\n".join(table(results)) + "\n")
    return results


def training(args: argparse.Namespace, arm: str, **others) -> list:
    """Arguments of ``pretrain`` that train an arm: what all share, its own settings, then ``others`` (dots written ``__``)."""
    root = args.output
    parts = {"third": 1 / 3, "nine_twentieths": 0.45, "three_fifths": 0.6, "four_fifths": 0.8}
    steps = {name: round(args.steps * part) for name, part in parts.items()}
    chosen = {
        "data.train": f"[{root / 'text_train'}]",
        "data.valid": f"[{root / 'text_valid'}]",
        "data.tokenizer": root / "imported" / "tokenizer",
        "data.raw_tokens": args.raw_tokens,
        "precision": args.precision,
        "train.init_from": root / "imported",
        "train.steps": args.steps,
        "train.global_batch": args.batch,
        "train.valid_every": 0,
        "optimizer.lr": args.lr,
        "parallel.zero": 1,
        "checkpoint.every": 20,
        "checkpoint.keep": 1,
        "monitor.wandb": "false",
        **{key: value.format(**steps) if isinstance(value, str) else value for key, value in ARMS[arm].items()},
        **{key.replace("__", "."): value for key, value in others.items()},
    }
    sets = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--config", root / "imported" / "config.yaml", "--run-dir", root / "runs" / arm, *sets]


def evaluations(args: argparse.Namespace, arm: str, step: int, output: Path) -> dict[str, list]:
    """Arguments of ``pretrain`` by the kind of evaluation, for a checkpoint of an arm, or the imported model where the step is 0:
    perplexity under every mode, coverage, passkey and, where there are some, questions; of the dense arm dense alone, before
    training with gists of 8."""
    sizes = ARMS[arm].get("gist.chunk_sizes", "[8]").strip("[]").replace(" ", "")
    source = ["--run-dir", args.output / "runs" / arm, "--step", step] if step else ["--run-dir", args.output / "imported"]
    modes = ["dense"] if arm == "dense" and step else ["dense", "forget", "recall"]
    gists = ["--mode", *modes, *(["--chunk-sizes", sizes] if len(modes) > 1 else [])]
    text = lambda tokens: ["--data", args.output / "text_valid", "--length", args.raw_tokens, "--max-tokens", tokens]
    routed = text(min(args.tokens, ROUTED_TOKENS))
    keys = ["--lengths", args.raw_tokens // 2, "--depths", 0.25, 0.75, "--trials", 3]
    common = [*source, "--dtype", args.evaluation_dtype, "--output", output]
    kinds = {"perplexity": text(args.tokens) + gists, "routing": [*routed, "--chunk-sizes", sizes], "passkey": keys + gists}
    if (args.output / TASK).exists():
        kinds["tasks"] = ["--tasks", args.output / TASK, *gists]
    return {kind: ["evaluate", kind, *common, *own] for kind, own in kinds.items() if kind != "routing" or len(modes) > 1}


def findings(output: Path) -> dict:
    """What evaluations wrote into a directory, by their kind; of routing what holds for all layers."""
    found = {path.stem: json.loads(path.read_text())["results"] for path in sorted(output.glob("*.json"))}
    return found | ({"routing": found["routing"][0]["overall"]} if "routing" in found else {})


def evaluate(args: argparse.Namespace, arm: str, step: int, output: Path) -> dict:
    """Evaluate a checkpoint in all ways that are not there yet."""
    for kind, arguments in evaluations(args, arm, step, output).items():
        if not (output / f"{kind}.json").exists():
            command("pretrain", *arguments)
    return findings(output)


def table(results: dict) -> list[str]:
    """Markdown: a line per checkpoint and mode; perplexity, as a multiple of the dense arm's at the same tokens, by position."""
    results = {name: result for name, result in results.items() if "perplexity" in result}
    if not results:
        return ["nothing was evaluated"]
    dense = {r["raw_tokens"]: r["perplexity"][0]["perplexity"] for r in results.values() if r.get("arm") == "dense"}
    first = next(iter(results.values()))["perplexity"][0]["buckets"]
    spans = " | ".join(f"{b['from']}-{b['to'] - 1}" for b in first)
    lines = [f"| trained | raw tokens | read | perplexity | to dense training | {spans} | far coverage |"]
    lines.append("|" + "---|" * (6 + len(first)))
    for name, result in results.items():
        tokens = result.get("raw_tokens", 0)
        for entry in result["perplexity"]:
            times = f"{entry['perplexity'] / dense[tokens]:.3f}" if tokens in dense else "-"
            nats = " | ".join(f"{b['nats']:.3f}" for b in entry["buckets"])
            covers = result.get("routing", {}).get("far_coverage_0") if entry["mode"] == "recall" else None
            far = "-" if covers is None else f"{covers:.3f}"
            arm = result.get("arm", name)
            lines.append(f"| {arm} | {tokens:,} | {entry['name']} | {entry['perplexity']:.3f} | {times} | {nats} | {far} |")
    return lines


def make(directory: Path, *arguments) -> None:
    """Run a command that makes a directory whole or not at all, unless it is there."""
    if not directory.exists():
        command(*arguments, "--output", directory)


def command(package: str, *arguments) -> None:
    subprocess.run([sys.executable, "-m", package, *map(str, arguments)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
