"""Which backend an op uses: the same policy for all of them."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def default_backend(operation: str, device_type: str) -> str:
    """The backend for a kind of device when none is named; cached, so that each choice is logged once.

    On a GPU that is Triton. What it does not serve is an error that says what would do, never another backend unasked: that could
    be a hundred times slower, and nobody would know why.
    """
    backend = "cpu" if device_type == "cpu" else "triton"
    _log.info("%s: backend %r, since the tensors are on %r", operation, backend, device_type)
    return backend


def check_backend(backend: str, backends: dict) -> None:
    """ValueError if there is no backend of that name."""
    if backend not in backends:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(backends)}")
