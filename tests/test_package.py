"""unfold as a package: a wheel works from anywhere, beside Hugging Face's `kernels` too, and declares what it imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT, TinyData
from tests.integration.runs import read_metrics
from tests.test_frame import ALLOWED, python_files

# What transformers imports of that package where its version is one that it accepts.
KERNELS_NAMES = (
    "CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties register_kernel_mapping "
    "replace_kernel_forward_from_hub use_kernel_mapping get_kernel kernelize use_kernel_forward_from_hub use_kernelized_func"
).split()
KERNELS_VERSION = "0.18.2"
STAND_IN = """
class {}:
    def __init__(self, *args, **kwargs): ...
    def __call__(self, decorated): return decorated
"""
USE = """
import sys, transformers.models.llama.modeling_llama
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() == (sys.argv.pop(1) == "kernels")
from pathlib import Path
import unfold
assert Path(unfold.__file__).parent.parent == Path(sys.argv.pop(1)), unfold.__file__
from unfold import GistConfig, build_layout, compressed_attention, interleave
from unfold.__main__ import run
run()
"""


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory) -> Path:
    """A directory into which a wheel, built from a copy of the sources, is installed."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in (*ALLOWED, "unfold"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(source / "dist"), str(source)]
    for words in (build, ["install", "--no-deps", "--no-index", "--find-links", str(source / "dist"), "-t", str(site), "unfold"]):
        done = subprocess.run(pip + words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return site


@pytest.fixture(scope="module")
def kernels_site(tmp_path_factory) -> Path:
    """A stand-in for Hugging Face's `kernels`: its name, a version that transformers accepts, and the names it imports."""
    site = tmp_path_factory.mktemp("kernels")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("".join(map(STAND_IN.format, KERNELS_NAMES)))
    info = site / f"kernels-{KERNELS_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_VERSION}\n")
    (info / "top_level.txt").write_text("kernels\n")
    return site


@pytest.mark.parametrize(
    ("where", "kernels"), [("root", True), ("elsewhere", False), pytest.param("elsewhere", True, marks=pytest.mark.long)]
)
def test_models_and_training_work(tiny: TinyData, wheel_site, kernels_site, tmp_path, where, kernels):
    """A model of transformers is imported, then two steps are trained, in one process that has loaded both."""
    config = tiny.config(tmp_path / "config.yaml", train={"steps": 2, "valid_every": 0, "global_batch": 2})
    path = [str(kernels_site)] * kernels + [str(wheel_site)] * (where == "elsewhere")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    cwd, home = (ROOT, ROOT) if where == "root" else (tmp_path, wheel_site)
    train = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", USE, "kernels" if kernels else "none", str(home), *train]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["step"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_the_console_command_leads_to_every_program(wheel_site, kernels_site, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{kernels_site}{os.pathsep}{wheel_site}"}
    for words, told in (
        ((), ("prep", "train", "import", "export", "generate", "evaluate", "report", "status", "plan", "launch")),
        (("prep",), ("usage: unfold prep", "train-tokenizer")),
        (("launch",), ("usage: unfold launch", "doctor")),
        (("train",), ("usage: unfold train", "--run-dir")),
    ):
        command = [sys.executable, wheel_site / "bin" / "unfold", *words, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and all(word in done.stdout for word in told), (words, done.stdout, done.stderr)


def test_scripts_for_slurm_come_with_the_wheel(wheel_site, tiny, tmp_path):
    config = tiny.config(tmp_path / "config.yaml")
    slurm = ["launch", "slurm", "--config", config, "--run-dir", tmp_path / "run", "--nodes", "1", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(wheel_site)}
    command = [sys.executable, "-m", "unfold", *map(str, slurm)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "-m unfold.pretrain train" in done.stdout, done.stderr


def declared() -> dict[str, list[Requirement]]:
    """Requirements of training ('') and of every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_pins_are_one_set_of_what_is_declared():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    pins = {normal(name): version for name, version in pins.items()}
    known = {"unfold"}
    for requirement in (r for group in declared().values() for r in group if r.name != "unfold"):
        known.add(normal(requirement.name))
        assert requirement.specifier.contains(pins[normal(requirement.name)]), f"{requirement}: pinned otherwise"
    assert set(pins) <= known, f"pinned, but not declared: {set(pins) - known}"


# Nobody but the program itself loads these, so whoever does has it.
LOADED_BY = {"model/hf/vllm_plugin.py": {"vllm"}}


@pytest.mark.parametrize("room", ALLOWED)
def test_what_is_imported_is_declared(room):
    """What a module imports at its top is declared for training, or for data preparation; what comes late may be an extra."""
    groups = {name: {normal(r.name) for r in group} for name, group in declared().items()}
    base = groups[""] | (groups["prep"] if room == "data_prep" else set())
    late = set().union(*groups.values()) | {"flash-linear-attention"}  # compared with on GPU machines that have it
    owners = packages_distributions() | {"fla": ["flash-linear-attention"], "rouge": ["rouge"]}
    for path in python_files(room):
        hosts = LOADED_BY.get(path.relative_to(ROOT).as_posix(), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"unfold"} - hosts:
                distributions = {normal(d) for d in owners.get(name, [f"nothing that is installed has {name}"])}
                assert distributions & (late if node.col_offset else base), f"{path.relative_to(ROOT)} imports {name}"
