"""Memory of `data_prep tokenize` on a large synthetic jsonl: parent and workers together, at their highest.

    python -m tests.benchmarks.tokenize_memory --tokenizer DIR|FILE [--gigabytes 10] [--workers 2] [--line-mb 0] [--directory DIR]

Resident memory is summed over the processes, so pages that they share count more than once. The file is removed again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_corpus(path: Path, size: int, line_bytes: int) -> None:
    """About `size` bytes of jsonl, of words that never end (so that a cache of words is put to the test)."""
    draw = random.Random(0)
    with open(path, "w") as out:
        written = 0
        while written < size:
            words = [f"w{draw.getrandbits(20):x}" if i % 50 == 0 else draw.choice(COMMON) for i in range(20_000)]
            text = " ".join(words)
            for i in range(8):  # the same words in other texts: writing must not take longer than tokenising
                line = json.dumps({"text": text[i * 500 :] * max(1, line_bytes // len(text))}) + "\n"
                out.write(line)
                written += len(line)


COMMON = "the people of the United States and their government, in order that 1861 war; peace. shall be held! (see above)".split()


def resident_mb(parent: int) -> float:
    """Resident memory of a process and its children now, in MB."""
    total = 0
    children = Path(f"/proc/{parent}/task/{parent}/children")
    for pid in [parent, *map(int, children.read_text().split())]:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--line-mb", type=float, default=0, help="length of a line; 0: about 100 kB")
    parser.add_argument("--directory", help="where there is room for the corpus and its shard")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        corpus = Path(name) / "corpus.jsonl"
        write_corpus(corpus, int(args.gigabytes * 1e9), int(args.line_mb * 1e6))
        options = ["--input", corpus, "--tokenizer", args.tokenizer, "--output", f"{name}/s", "--workers", args.workers]
        command = [sys.executable, "-m", "data_prep", "tokenize", *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        highest = 0.0
        while process.poll() is None:
            try:
                highest = max(highest, resident_mb(process.pid))
            except FileNotFoundError:
                pass  # a process ended meanwhile
            time.sleep(0.1)
        print(process.stdout.read())
        print(f"{corpus.stat().st_size / 1e9:.2f} GB, {args.workers} workers: highest resident memory {highest:.0f} MB")


if __name__ == "__main__":
    main()
