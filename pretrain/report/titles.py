"""What metrics are called in the report, their units, and which of them are drawn together."""

from __future__ import annotations

UNITS = (("_per_s", "per second"), ("_ms", "milliseconds"), ("_s", "seconds"), ("seconds", "seconds"),
         ("_bytes", "bytes"), ("_gib", "GiB"))  # fmt: skip
TITLES = {
    "stage": "Stage of the run",
    "seconds": "Time of a step",
    "data_wait_s": "Wait for data",
    "memory_gib": "Memory, the most of any rank",
    "mfu": "MFU",
    "tflops": "Useful FLOP/s of a device",
    "unfolded_tokens": "Raw tokens unfolded by a recalling query",
    "selected_gists": "Gists selected by a recalling query",
    "route_loss": "Routing loss",
    "attention_logits.largest": "Largest attention logit",
    "attention_logits.saturated": "Saturated rows of softmax",
    "attention_logits.entropy": "Entropy of attention",
    "checkpoint_pause_s": "Pause for a checkpoint",
    "checkpoint_s": "Time of a save",
}
OWN_UNITS = {"mfu": "part of the peak", "tflops": "TFLOP/s", "unfolded_tokens": "tokens", "selected_gists": "gists",
             "route_loss": "nats", "attention_logits.largest": "logit", "attention_logits.saturated": "share",
             "attention_logits.entropy": "nats"}  # fmt: skip


def _by_layer(key: str, what: str, unit: str) -> dict[str, tuple[str, str, str]]:
    kinds = {"attention.": " of attention", "mlp.": " of feed-forward", "norms.": " of norms", "adapters.": " of adapters"}
    named = {f"{key}.{kind}": (f"{what}{of}, by layer", f"{what}{of}, layer", unit) for kind, of in kinds.items()}
    return named | {f"{key}.": (f"{what} outside the layers", f"{what}:", unit)}


# Metrics with parts: those of one are drawn together; (title for one run, before a part's name for several, unit). The first
# beginning that fits a metric counts.
PARTED = {
    "attention_mass.": ("Where attention goes", "Attention to", "share of softmax mass"),
    "attention_logits.largest_by_layer.": ("Largest attention logit, by layer", "Largest attention logit, layer", "logit"),
    "loss.": ("Loss by chunk sizes", "Loss of chunk sizes", "nats per token"),
    "valid_loss.": ("Validation loss by chunk sizes", "Validation loss of chunk sizes", "nats per token"),
    "source_loss.": ("Loss of held-out sources", "Loss of", "nats per token"),
    "routing.": ("What recall finds", "Recall:", "share"),
    **_by_layer("grad_norms", "Gradient norm", "norm, before clipping"),
    **_by_layer("update_norms", "Norm of updates", "norm"),
}
FROM_ZERO = ("attention_mass.", "routing.")  # the others may be on a log scale
NOT_DRAWN = ("stragglers.", "routing_by_layer", "weight_norms.")  # numbers of ranks, and lists by layer
KNOWN = ("step", "loss", "valid_loss", "lr", "grad_norm", "raw_tokens_per_s", "raw_tokens", "samples", "loss_tokens")
