"""``unfold_attention`` for the recalling queries alone, ``recall_attention`` for a whole layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unfold.kernels.common.backend import check_backend, default_backend
from unfold.kernels.compressed import compressed_attention, prepare_compressed
from unfold.kernels.compressed.op import check_arguments
from unfold.kernels.select import Selection, SelectRule, prepare_select, select_gists
from unfold.kernels.select.blocks import BlockLists
from unfold.kernels.select.op import check_queries
from unfold.kernels.tree import GistTree
from unfold.kernels.unfold.cpu import BLOCK, unfold_attention_cpu
from unfold.kernels.unfold.pattern import chunks_of
from unfold.kernels.unfold.reference import unfold_attention_reference


def _unfold_triton(*arguments, **options) -> Tensor:
    """Triton is imported only where it is used: a CPU run does not need it."""
    from unfold.kernels.unfold.triton import unfold_attention_triton

    return unfold_attention_triton(*arguments, **options)


BACKENDS = {"reference": unfold_attention_reference, "cpu": unfold_attention_cpu, "triton": _unfold_triton}


@dataclass(frozen=True)
class RecallStats:
    """What was read, as means over recalling queries and KV heads; zero where nothing recalls.

    Attributes:
        unfolded: scalar float32, raw tokens of the selected chunks (of the union, where heads share it) that neither the
            query's window nor the sinks hold already.
        selected: [L] float32, selected gists of level 0, 1, ..
    """

    unfolded: Tensor
    selected: Tensor

    def weighted(self, weight: float) -> RecallStats:
        """The same, counting so much in a mean over ranks."""
        return RecallStats(self.unfolded * weight, self.selected * weight)


@dataclass(frozen=True)
class ListStats:
    """The same as kernels count it, list by list: added up when it is asked for, not in every layer.

    Attributes:
        count: [2 * L + 2, lists] int32, of :class:`unfold.kernels.select.blocks.BlockLists`.
        owners: recalling queries times KV heads.
    """

    count: Tensor
    owners: float

    def weighted(self, weight: float) -> ListStats:
        """The same, counting so much in a mean over ranks."""
        return ListStats(self.count, self.owners / weight)

    @property
    def unfolded(self) -> Tensor:
        return self.sums([self])[0]

    @property
    def selected(self) -> Tensor:
        return self.sums([self])[1]

    @staticmethod
    def sums(layers: Sequence[ListStats]) -> tuple[Tensor, Tensor]:
        """Both, summed over layers of one micro-batch, by as many operations for many as for one."""
        counts = torch.stack([layer.count for layer in layers]).sum((0, 2)).double() / layers[0].owners  # [2 * L + 2]
        levels = len(counts) // 2 - 1
        return counts[levels + 1].float(), counts[levels + 2 :].flip(0).float()


def unfold_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: GistTree,
    selection: Selection | BlockLists,
    *,
    apart: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every recalling query over its selected gists, the raw tokens behind those of level 0, its window, sinks.

    One softmax, each key once. Gradients flow to q and to whatever was attended to, selected gists included.

    Args:
        q: [N, H, D], the recalling queries in the order of ``tree.tokens``.
        k, v: [B, T, Hkv, D] in interleaved order, same dtype and device; H a multiple of Hkv.
        tree: the hierarchy of the same B samples and T tokens, and its N queries.
        selection: from :func:`kernels.select.select_gists` or :func:`select_to_unfold` on the same tree and number of KV heads.
        apart: keys and values [F, Hkv, D] of the raw tokens that stand apart (:class:`kernels.tree.GistTree`); None: there
            are none.
        scale: factor on the scores; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton', or None: 'cpu' on the CPU, 'triton' on a GPU.

    Returns:
        [N, H, D] in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, naming the argument.
    """
    check_queries(q, k, tree)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v: {v.dtype} {tuple(v.shape)} on {v.device}, expected the like of k: {k.dtype} {tuple(k.shape)}")
    of_blocks = isinstance(selection, BlockLists)
    lists, owners = (
        (selection.first.shape[1], len(selection.blocks.table)) if of_blocks else (len(selection.start[0]) - 1, tree.queries)
    )
    if selection.kv_heads != k.shape[2] or lists != owners * k.shape[2]:
        raise ValueError(
            f"selection: {lists} lists for {selection.kv_heads} KV heads, expected one for each of {owners} "
            f"{'blocks of ' if of_blocks else ''}queries and {k.shape[2]} KV heads; select with the same tree and keys"
        )
    if backend is None:
        backend = default_backend("unfold", q.device.type) if tree.queries else "reference"
    check_backend(backend, BACKENDS)
    if of_blocks and backend != "triton":
        raise ValueError(f"backend: {backend!r} takes the selections of queries, these are lists of blocks; use backend='triton'")
    run = BACKENDS[backend if tree.queries else "reference"]  # without a query there is nothing to launch
    return run(q, k, v, tree, selection, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, apart=apart)


def recall_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: GistTree,
    rule: SelectRule,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, RecallStats | ListStats]:
    """A layer's attention where some raw tokens recall: those unfold, all others see what the compressed mask shows.

    Args:
        q: [B, T, H, D] in interleaved order.
        k, v: [B, T, Hkv, D], same dtype and device; H a multiple of Hkv.
        tree: the hierarchy of the same B samples and T tokens, and which tokens recall.
        rule: budget and sharing of the selection.
        scale: factor on the scores; 1 / sqrt(D) when None.
        backend: 'reference' | 'cpu' | 'triton' for all three steps, or None for the best one of each on q's device.

    Returns:
        [B, T, H, D] in q's dtype, and what was read.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit, naming the argument.
    """
    if tree.queries and (backend or default_backend("recall", q.device.type)) == "triton":
        check_arguments(q, k, v, tree.others)
        from unfold.kernels.unfold.triton import recall_layer_triton

        out, lists = recall_layer_triton(q, k, v, tree, rule, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return out, recall_stats(tree, lists)
    out = compressed_attention(q, k, v, tree.others, scale=scale, backend=backend)
    if tree.queries == 0:
        return out, RecallStats(torch.zeros((), device=q.device), torch.zeros(tree.levels, device=q.device))
    recalling = q.flatten(0, 1).index_select(0, tree.tokens)  # [N, H, D]
    rows, stats = recall_queries(recalling, k, v, tree, rule, scale=scale, backend=backend)
    return out.flatten(0, 1).index_copy(0, tree.tokens, rows).view_as(q), stats


def prepare_recall(q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, *, backend: str | None = None) -> None:
    """Make ahead the plans that :func:`recall_attention` and its gradients will ask this tree for.

    Arguments and errors as of :func:`unfold.kernels.compressed.prepare_compressed`; what a layer selects decides none of them.
    """
    if tree.queries and (backend or default_backend("recall", q.device.type)) == "triton":
        from unfold.kernels.unfold.triton import prepare_layer

        prepare_layer(q, k, tree, rule)
        return
    prepare_compressed(q, k, tree.others, backend=backend)
    prepare_select(q, k, tree, rule, backend=backend)
    if tree.queries and (backend or default_backend("unfold", q.device.type)) == "cpu":
        tree.plan(BLOCK)
        chunks_of(tree)


def recall_queries(
    q: Tensor, k: Tensor, v: Tensor, tree: GistTree, rule: SelectRule, *, scale: float | None = None, backend: str | None = None
) -> tuple[Tensor, RecallStats | ListStats]:
    """The two steps of recall for the recalling queries alone, at least one: arguments as for :func:`select_gists`.

    Returns:
        [N, H, D] in q's dtype, and what was read.
    """
    backend = backend or default_backend("recall", q.device.type)
    selection = select_to_unfold(q, k, tree, rule, scale=scale, backend=backend)
    return unfold_attention(q, k, v, tree, selection, scale=scale, backend=backend), recall_stats(tree, selection)


@torch.no_grad()
def select_to_unfold(
    q: Tensor, k: Tensor, tree: GistTree, rule: SelectRule, *, scale: float | None = None, backend: str | None = None
) -> Selection | BlockLists:
    """As :func:`kernels.select.select_gists`, in the form that the same backend of :func:`unfold_attention` works through.

    Lists of Triton's kernels are handed on as they are: no entry is ever sorted, and the host reads nothing.
    """
    check_queries(q, k, tree)
    backend = backend or default_backend("recall", q.device.type)
    if backend != "triton" or not tree.queries:
        return select_gists(q, k, tree, rule, scale=scale, backend=backend)
    from unfold.kernels.unfold.triton import lists_to_unfold

    return lists_to_unfold(q, k, tree, rule)


def recall_stats(tree: GistTree, selection: Selection | BlockLists) -> RecallStats | ListStats:
    """Count what a selection reads, if it is one of lists of blocks, after it was unfolded; at least one query."""
    lists = tree.queries * selection.kv_heads
    if isinstance(selection, BlockLists):
        return ListStats(selection.count, lists)
    device = tree.tokens.device
    gists = selection.rows[-1].long()
    counts = selection.start[-1].diff()
    query = torch.repeat_interleave(torch.arange(lists, device=device), counts) // selection.kv_heads
    at = tree.tokens[query] // tree.others.tokens * tree.others.tokens + gists
    first, last = tree.child_lo.flatten()[at], tree.child_hi.flatten()[at]
    # A chunk lies in the window entirely or not at all: the window begins where a chunk does. What stands apart is in none.
    beyond = (last <= tree.lo[tree.levels, query]) | (first >= tree.others.tokens)
    unfolded = ((last - first) * beyond).sum() / lists
    selected = torch.tensor([len(rows) / lists for rows in reversed(selection.rows)], device=device)
    return RecallStats(unfolded.float(), selected)
