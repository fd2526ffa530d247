"""A logits processor for vLLM, which ignores ``suppress_tokens``: ids of gists and links are never sampled.

Found through the entry point ``vllm.logits_processors`` wherever unfold is installed beside vLLM; needs vLLM and torch alone.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class ReservedTokens(LogitsProcessor):
    """Takes the ids that an export reserves out of every distribution; models that reserve none are left as they are."""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        model = vllm_config.model_config
        gist = getattr(model.hf_config, "gist", None)
        reserved = set(gist.get("reserved_ids") or ()) if isinstance(gist, dict) else set()
        # A dense export says it in generation_config.json alone; whichever model says it there, means it.
        reserved |= set(model.try_get_generation_config().get("suppress_tokens") or ())
        self._reserved = torch.tensor(sorted(reserved), dtype=torch.int64, device=device)

    def is_argmax_invariant(self) -> bool:
        return not len(self._reserved)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass  # the same for every request

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [requests, vocab], changed in place."""
        return logits.index_fill_(1, self._reserved, -torch.inf) if len(self._reserved) else logits
