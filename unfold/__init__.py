"""Pretraining of language models with hierarchical gist sparse attention: the one import name, and the public names.

The parts are ``unfold.kernels``, ``unfold.model``, ``unfold.pretrain``, ``unfold.data_prep`` and ``unfold.launch``. In a checkout
their folders lie beside this one, in a wheel they lie inside it.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path

_here = _Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout
    __path__.append(str(_here.parent))

# Name -> where it is defined. Loaded when first asked for: `unfold --help` must not load PyTorch.
_PUBLIC = {
    "compressed_attention": "kernels.compressed",
    "recall_attention": "kernels.unfold",
    "decode_attention": "kernels.decode",
    "Intervals": "kernels.intervals",
    "GistConfig": "model.gist",
    "interleave": "model.gist",
    "build_layout": "model.gist",
    "Recall": "model.gist",
    "ModelConfig": "model.config",
    "build_model": "model.transformer",
    "MicroBatch": "model.visibility",
    "Decoder": "model.decode.generation",
    "Sampling": "model.decode.generation",
    "Part": "model.gist.parts",
    "PartStore": "model.decode.store",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unfold' has no attribute {name!r}")
    return getattr(_import_module(f"unfold.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
