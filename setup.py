"""The rooms lie beside `unfold/` in a checkout and inside it in a wheel; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

ROOMS = ("kernels", "model", "pretrain", "data_prep", "launch")

setup(
    packages=["unfold"]
    + [f"unfold.{room}" for room in ROOMS]
    + [f"unfold.{room}.{part}" for room in ROOMS for part in find_namespace_packages(room, exclude=["*__pycache__*"])],
    package_dir={"unfold": "unfold"} | {f"unfold.{room}": room for room in ROOMS},
)
