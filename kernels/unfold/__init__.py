"""Attention of recalling queries over what they selected and unfolded (METHOD.md, section 6, item 4)."""

from unfold.kernels.unfold.op import RecallStats, recall_attention, recall_queries, unfold_attention

__all__ = ["RecallStats", "recall_attention", "recall_queries", "unfold_attention"]
