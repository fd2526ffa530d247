"""Parts that were read before, within a limit of bytes: what was used last stays."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from unfold.model.decode.generation import Decoder
from unfold.model.gist.parts import Part

LIMIT = 4 << 30
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class PartStore:
    """Parts by the tokens that they were read from; a document that is not there is read.

    Where keys and values lie is the decoder's choice (``raw_cache``): those of raw tokens, most bytes, may stay in host memory.

    Args:
        decoder: reads documents.
        limit: most bytes of keys and values that are kept in memory; a part that is larger is used and not kept.
        directory: where parts are kept beyond this process too, a safetensors file each, within the same limit; None: nowhere.
            Parts of other models and tokenizers may lie there too, and count.

    Attributes:
        read: documents that the model had to read.
        bytes: of the parts in memory.
    """

    def __init__(self, decoder: Decoder, limit: int = LIMIT, directory: Path | None = None):
        if limit < 1:
            raise ValueError(f"limit: {limit} bytes; give at least 1")
        self.decoder, self.limit, self.directory = decoder, limit, directory
        self.identity = decoder.identity  # all weights are read for it: not while a document is waited for
        self.read = self.bytes = 0
        self._parts: OrderedDict[str, Part] = OrderedDict()  # least recently used first
        if directory:
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, tokens: Sequence[int]) -> Part:
        """The part of a document of raw tokens. Raises ValueError where it cannot be read: see :meth:`Decoder.read_part`."""
        name = self.identity.of_tokens(tokens)
        if name in self._parts:
            self._parts.move_to_end(name)
            return self._parts[name]
        part = self._load(name)
        if part is None:
            part = self.decoder.read_part(tokens)
            self.read += 1
            self._save(name, part)
        if part.bytes > self.limit:
            return part
        self._parts[name] = part
        self.bytes += part.bytes
        while self.bytes > self.limit:
            self.bytes -= self._parts.popitem(last=False)[1].bytes
        return part

    def _load(self, name: str) -> Part | None:
        path = self.directory and self.directory / f"{name}.safetensors"
        if not path or not path.exists():
            return None
        part = Part.load(path, self.identity)
        os.utime(path)  # used now
        return part.to(self.decoder.device, self.decoder.raw_on_host)

    def _save(self, name: str, part: Part) -> None:
        if not self.directory or part.bytes > self.limit:
            return
        part.save(self.directory / f"{name}.safetensors")
        used = []
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # another process may have removed it
                if NAME.fullmatch(path.name):
                    used.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        used.sort()
        total = sum(size for _, size, _ in used)
        for _, size, path in used[:-1]:  # the last one is the new one
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
