"""Attention of recalling queries over what they selected and unfolded (docs/method.md#unfolding)."""

from unfold.kernels.unfold.op import (
    ListStats,
    RecallStats,
    prepare_recall,
    recall_attention,
    recall_queries,
    recall_stats,
    select_to_unfold,
    unfold_attention,
)

__all__ = [
    "ListStats",
    "RecallStats",
    "prepare_recall",
    "recall_attention",
    "recall_queries",
    "recall_stats",
    "select_to_unfold",
    "unfold_attention",
]
