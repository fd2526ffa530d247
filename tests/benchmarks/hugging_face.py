"""Speed and memory of ``pretrain import`` and ``pretrain export`` on a model with random weights (Llama-3.2-1B's shape).

    python -m tests.benchmarks.hugging_face --root DIR [--layers 16]

Makes a Hugging Face directory in bf16, sharded, imports it and exports it again. Memory is the process's anonymous memory, and
its resident memory, which also counts what is mapped of files. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from unfold.model.config import ModelConfig
from unfold.model.hf.keys import hf_config
from unfold.model.hf.names import entries
from unfold.pretrain.checkpoint.tensors import Chunk, write_tensor_file

READ = """
import json, sys, time
from pathlib import Path
from unfold.model.hf.keys import model_config
from unfold.pretrain.hf.import_weights import NewRows, WeightFiles, write_checkpoint_weights
source = Path(sys.argv[1])
config = model_config(json.loads((source / "config.json").read_text()))
began = time.monotonic()
weights, rows = WeightFiles(source), NewRows(config.vocab_size - 4, config.vocab_size, {})
write_checkpoint_weights(weights, config, rows, None, Path(sys.argv[2]), 5 * 10**9, lambda text: None)
print(time.monotonic() - began)
"""

WRITE = """
import sys, time, torch
from pathlib import Path
from unfold.pretrain.hf.export_weights import write_weights
from unfold.pretrain.checkpoint.load import find_run
from unfold.pretrain.checkpoint.tensors import TensorDirectory
run = find_run(Path(sys.argv[1]), None)
began = time.monotonic()
write_weights(TensorDirectory(run.directory), run.config.model, torch.bfloat16, Path(sys.argv[2]), "2GB")
print(time.monotonic() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="new directory; removed at the end")
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    args.root.mkdir(parents=True)
    try:
        print(json.dumps(measure(args.root, args.layers), indent=1))
    finally:
        shutil.rmtree(args.root)


def measure(root: Path, layers: int) -> dict:
    shape = dict(hidden_size=2048, heads=32, kv_heads=8, head_dim=64, ffn_size=8192, max_position=131072)
    config = ModelConfig(128256, layers=layers, tied_embeddings=True, **shape)
    size = make_model(root / "hf", config)
    result = {"parameters": size // 2, "weights_MB": size / 1e6, "disk_write_MB_per_s": disk_speed(root, size)}
    for name in ("read", "written"):
        (root / name).mkdir()
    parts = {
        "import, weights only": ("-c", READ, root / "hf", root / "read"),
        "import": ("-m", "pretrain", "import", "--input", root / "hf", "--output", root / "imported"),
        "export, weights only": ("-c", WRITE, root / "imported", root / "written"),
        "export, with proof": ("-m", "pretrain", "export", "--run-dir", root / "imported", "--output", root / "out"),
    }
    for name, arguments in parts.items():
        part = watch(*arguments)
        printed = part.pop("output").splitlines()[-1]
        part["MB_per_s"] = size / 1e6 / (float(printed) if "weights only" in name else part["seconds"])
        result[name] = part
        print(name, json.dumps(part), file=sys.stderr, flush=True)
    return result


def make_model(directory: Path, config: ModelConfig) -> int:
    """Random weights in two shards, and a tokenizer with an id for every row; returns the bytes of the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(config, "bfloat16", None, None, None)))
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    fill = lambda shape: noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)
    shapes = {n: torch.Size(s) for e in entries(config) for n, s in zip(e.theirs, e.their_shapes(config))}
    chunks = [Chunk(n, (0,) * len(s), tuple(s), torch.bfloat16, lambda s=s: fill(s)) for n, s in shapes.items()]
    halves = {"model-1.safetensors": chunks[: len(chunks) // 2], "model-2.safetensors": chunks[len(chunks) // 2 :]}
    for name, part in halves.items():
        write_tensor_file(directory / name, part, parts=False)
    places = {chunk.name: name for name, part in halves.items() for chunk in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return sum(chunk.bytes for chunk in chunks)


def disk_speed(root: Path, size: int) -> float:
    """MB/s of writing as much with one write call after another, to the disk."""
    data = torch.zeros(2**24, dtype=torch.uint8)
    chunk = Chunk("x", (0,), (size,), torch.uint8, lambda: data.repeat(-(-size // len(data)))[:size])
    began = time.monotonic()
    write_tensor_file(root / "plain.safetensors", [chunk])
    (root / "plain.safetensors").unlink()
    return size / 1e6 / (time.monotonic() - began)


def watch(*arguments) -> dict:
    """Run Python with arguments; returns seconds, what it printed and the largest memory seen, in MB."""
    began = time.monotonic()
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = {"anonymous_MB": 0.0, "resident_MB": 0.0}

    def look() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            values = {line.split(":")[0]: float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Rss") or
                      line.startswith("VmRSS")}  # fmt: skip
            peak["anonymous_MB"] = max(peak["anonymous_MB"], values.get("RssAnon", 0.0))
            peak["resident_MB"] = max(peak["resident_MB"], values.get("VmRSS", 0.0))
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    output = process.communicate()[0].strip()
    thread.join()
    assert process.returncode == 0, arguments
    return {"seconds": time.monotonic() - began, "output": output, **peak}


if __name__ == "__main__":
    main()
