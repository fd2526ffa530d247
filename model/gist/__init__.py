"""Where gists go in a sequence, and what follows from it: levels, positions, visible sets (docs/method.md#where-gists-go)."""

from unfold.model.config import GistConfig
from unfold.model.gist.growing import recalls_in
from unfold.model.gist.insertion import Interleaved, interleave, max_interleaved_length, without_gists
from unfold.model.gist.layout import Layout, build_layout, raw_layout
from unfold.model.gist.linked import Bundle, Role
from unfold.model.gist.recall import Recall, build_recall, recalling_tokens, select_rule

__all__ = [
    "Bundle",
    "GistConfig",
    "Interleaved",
    "Layout",
    "Recall",
    "Role",
    "build_layout",
    "build_recall",
    "interleave",
    "max_interleaved_length",
    "raw_layout",
    "recalling_tokens",
    "recalls_in",
    "select_rule",
    "without_gists",
]
