"""Which gists a recalling query unfolds: hierarchical top-k or top-p over gist keys (docs/method.md#selection)."""

from unfold.kernels.select.chosen import chosen_gists
from unfold.kernels.select.op import prepare_select, select_gists
from unfold.kernels.select.selection import Selection, SelectRule, take_best

__all__ = ["SelectRule", "Selection", "chosen_gists", "prepare_select", "select_gists", "take_best"]
