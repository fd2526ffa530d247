"""Sharded safetensors: what is written is read, by us and by torch.distributed.checkpoint, and damage is named."""

import hashlib
import json
import math
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from unfold.pretrain.checkpoint import tensors
from unfold.pretrain.checkpoint.state import rectangles
from unfold.pretrain.checkpoint.tensors import INDEX, Chunk, TensorDirectory, index_entries, write_index, write_tensor_file
from unfold.pretrain.errors import UserError


def write_in_runs(directory, tensors: dict[str, torch.Tensor], cuts: dict[str, list[int]], indexed: bool) -> None:
    """As ranks do: each run of a tensor's elements is cut into rectangles, of which a file holds one of each tensor."""
    index = {}
    for rank in range(max(len(c) for c in cuts.values()) - 1):
        files = {}
        for name, tensor in tensors.items():
            at, flat = cuts[name][rank], tensor.reshape(-1)
            for which, (offsets, shape) in enumerate(rectangles(at, cuts[name][rank + 1], tuple(tensor.shape))):
                values = flat[at : at + math.prod(shape)]
                at += len(values)
                files.setdefault(which, []).append(Chunk(name, offsets, shape, tensor.dtype, lambda v=values: v))
        for which, chunks in files.items():
            name = f"shard-{rank}-{which}.safetensors"
            write_tensor_file(directory / name, chunks)
            index[name] = index_entries(chunks)
    if indexed:
        facts = write_index(directory, index)
        assert facts["sha256"] == hashlib.sha256((directory / INDEX).read_bytes()).hexdigest()


@pytest.fixture(params=[False, True], ids=["headers", "index"])
def written(tmp_path, request):
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5),
        "vector": torch.randn(11),
        "state": torch.randint(0, 256, (8,), dtype=torch.uint8),
        "half": torch.randn(4, 6).bfloat16(),
    }
    cuts = {"matrix": [0, 3, 22, 35], "vector": [0, 11, 11, 11], "state": [0, 0, 8, 8], "half": [0, 1, 23, 24]}
    write_in_runs(tmp_path, tensors, cuts, request.param)
    return tmp_path, tensors


def test_every_run_is_covered_once():
    draw = np.random.default_rng(0)
    for _ in range(300):
        shape = tuple(int(n) for n in draw.integers(1, 8, size=draw.integers(1, 3)))
        start, stop = sorted(int(n) for n in draw.integers(0, math.prod(shape) + 1, size=2))
        numbers = torch.arange(math.prod(shape)).view(shape)
        parts = list(rectangles(start, stop, shape))
        covered = [numbers[tuple(slice(o, o + n) for o, n in zip(*part))].flatten().tolist() for part in parts]
        assert sum(covered, []) == list(range(start, stop)) and len(parts) <= 3


def test_read_whole_and_in_parts(written):
    directory, tensors = written
    source = TensorDirectory(directory)
    assert source.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor) and source.dtype(name) == tensor.dtype
    assert torch.equal(source.read("matrix", (2, 1), (4, 3)), tensors["matrix"][2:6, 1:4])


def test_torch_distributed_checkpoint_reads_the_same_directory(written):
    directory, tensors = written
    state = {name: torch.zeros_like(t) for name, t in tensors.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_safetensors_reads_a_file(tmp_path):
    value = torch.randn(3, 4)
    facts = write_tensor_file(tmp_path / "a.safetensors", [Chunk("x", (0, 0), (3, 4), torch.float32, lambda: value)])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], value)
    assert facts["bytes"] == (tmp_path / "a.safetensors").stat().st_size


def test_the_hash_is_that_of_the_file_whose_tensors_are_of_many_pieces(tmp_path, monkeypatch):
    """Hashed beside the writing: values made for one chunk may be gone from memory before their hash is done."""
    monkeypatch.setattr(tensors, "PIECE", 1 << 12)
    sizes = (5, 1 << 10, 1 << 14, 0, 70001)
    chunks = [Chunk(str(n), (0,), (n,), torch.float32, lambda n=n: torch.full((n,), float(n))) for n in sizes]
    facts = write_tensor_file(tmp_path / "a.safetensors", chunks)
    written = (tmp_path / "a.safetensors").read_bytes()
    assert facts == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    assert {int(k): len(v) for k, v in load_file(tmp_path / "a.safetensors").items()} == {n: n for n in sizes}


def test_a_tensor_that_cannot_be_made_ends_the_file_and_its_threads(tmp_path):
    before = threading.active_count()
    chunks = [Chunk("x", (0,), (9,), torch.float32, lambda: torch.zeros(9)), Chunk("y", (0,), (9,), torch.float32, lambda: 1 / 0)]
    with pytest.raises(ZeroDivisionError):
        write_tensor_file(tmp_path / "a.safetensors", chunks)
    assert threading.active_count() == before


def test_misfits_are_named(written):
    directory, _ = written
    source = TensorDirectory(directory)
    with pytest.raises(UserError, match="holds no tensor other"):
        source.expect("other", (1,))
    with pytest.raises(UserError, match=r"matrix is \[7, 5\], this model needs \[7, 6\]"):
        source.expect("matrix", (7, 6))
    (directory / INDEX).unlink(missing_ok=True)
    (directory / "shard-1-0.safetensors").unlink()
    with pytest.raises(UserError, match="holds 19 of the 24 elements of half"):
        TensorDirectory(directory)
    (directory / "shard-0-0.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="shard-0-0.safetensors: is damaged"):
        TensorDirectory(directory)


@pytest.mark.parametrize("written", [True], indirect=True)
def test_with_an_index_a_file_is_opened_when_it_is_read(written):
    directory, tensors = written
    for path in directory.glob("shard-*"):
        if not path.name.startswith("shard-1"):
            path.unlink()
    source = TensorDirectory(directory)
    assert torch.equal(source.read("matrix", (1, 0), (3, 5)), tensors["matrix"][1:4]) and source.dtype("half") == torch.bfloat16
    with pytest.raises(UserError, match="shard-0-0.safetensors: is damaged"):
        source.read("matrix")


@pytest.mark.parametrize("written", [True], indirect=True)
def test_an_index_that_is_wrong_is_named(written):
    directory, _ = written
    entries = json.loads((directory / INDEX).read_text())
    entries["shard-1-0.safetensors"]["other"] = ["F32", [0], [3]]
    write_index(directory, entries)
    with pytest.raises(UserError, match=f"shard-1-0.safetensors: does not hold what {INDEX} says of other"):
        TensorDirectory(directory).read("other")
    entries["shard-1-0.safetensors"]["other"] = ["F32", [0], [3, 3]]
    for text in ("{", json.dumps(entries)):
        (directory / INDEX).write_text(text)
        with pytest.raises(UserError, match=f"{INDEX}: is damaged"):
            TensorDirectory(directory)


@pytest.mark.parametrize("written", [True], indirect=True)
def test_headers_are_held_against_the_index(written):
    directory, _ = written
    TensorDirectory(directory).check_headers()
    right = json.loads((directory / INDEX).read_text())
    file = next(f for f, held in right.items() if "half" in held)

    def changed(place: int, value):
        entries = json.loads(json.dumps(right))
        entries[file]["half"][place] = value
        write_index(directory, entries)
        return TensorDirectory(directory)

    other = changed(0, "F16")
    with pytest.raises(UserError, match=rf"{file}: does not hold what {INDEX} says \(1 tensors; half"):
        other.check_headers()
    with pytest.raises(UserError, match="half .it is BF16, not F16"):
        other.read("half")
    write_index(directory, right)
    write_tensor_file(directory / "stray.safetensors", [Chunk("x", (0,), (2,), torch.float32, lambda: torch.zeros(2))])
    with pytest.raises(UserError, match=r"stray.safetensors: .* x \['F32', \[0\], \[2\]\], .* says nothing of it"):
        TensorDirectory(directory).check_headers()
