"""Which gists a recalling query unfolds: hierarchical top-k or top-p over gist keys (METHOD.md, section 6, items 1-3)."""

from unfold.kernels.select.op import select_gists
from unfold.kernels.select.selection import Selection, SelectRule, take_best

__all__ = ["SelectRule", "Selection", "select_gists", "take_best"]
