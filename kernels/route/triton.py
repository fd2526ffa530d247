"""The routing loss on GPUs: launches the Triton kernels, slice by slice of the blocks of queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from unfold.kernels.common.launch import (
    DTYPES,
    HEAD_DIMS,
    INTERPRETED,
    LOG2_E,
    architecture,
    check_flat,
    launch_options,
    on_device,
)
from unfold.kernels.common.tiles import Tile
from unfold.kernels.compressed.plan import key_rows
from unfold.kernels.route import kernels
from unfold.kernels.route.gradient import gists_of, wants_gradient, with_gradient
from unfold.kernels.route.plan import RoutePlan, route_plan
from unfold.kernels.route.queries import Routed

LARGEST_GROUP = 128  # rows of a tile
SCRATCH = 1 << 28  # bytes of masses at once
SLICE = 2 if INTERPRETED else None  # in the interpreter the tests go through several slices
UPPER = Tile(0, 32, 4, 1)  # nothing is multiplied


@dataclass(frozen=True)
class RouteTiles:
    """Tiles of raw keys (for the sums, and for the masses of ``chunks`` gists at a time) and of gists (student, gradient).

    All have as many rows as one block of queries.
    """

    raw: Tile
    mass: Tile
    student: Tile
    d_gist: Tile
    chunks: int

    def fit(self, rows: int) -> RouteTiles:
        """With as many rows as a block has."""
        names = ("raw", "mass", "student", "d_gist")
        return replace(self, **{name: replace(getattr(self, name), rows=rows) for name in names})


def _same(rows: int, keys: int, warps: int, stages: int, chunks: int = 32) -> RouteTiles:
    return RouteTiles(*[Tile(rows, keys, warps, stages)] * 4, chunks)


# Per padded head dimension and bytes per element.
_SM80 = {
    (64, 2): _same(64, 64, 4, 2),
    (128, 2): _same(64, 64, 4, 2),
    (256, 2): _same(32, 32, 4, 2),
    (64, 4): _same(32, 32, 8, 1),
    (128, 4): _same(16, 16, 4, 1, 16),
    (256, 4): _same(16, 16, 8, 1, 16),
}
TABLE = {"sm_80": _SM80, "sm_90": _SM80, "sm_100": _SM80}
TABLE["interpreter"] = {key: _same(32, 16, 4, 1, 16) for key in _SM80}


def route_tiles(arch: str, dim: int, item_size: int, group: int) -> RouteTiles:
    """The tiles for an architecture of TABLE, a head dimension, bytes per element and query heads per KV head."""
    tiles = TABLE[arch][max(64, triton.next_power_of_2(dim)), item_size]
    return tiles.fit(max(tiles.raw.rows, triton.next_power_of_2(group)))


def why_not(q: Tensor, k: Tensor) -> str | None:
    """Why the Triton kernels do not serve this case, in words; None if they do. q: [M, H, D], k: [B, T, Hkv, D]."""
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}; backend 'triton' serves fp16, bf16 and fp32, use backend='cpu'"
    if q.shape[2] not in HEAD_DIMS:
        return f"q: head dimension {q.shape[2]} is not one of {HEAD_DIMS}; use one, or backend='cpu'"
    group = q.shape[1] // k.shape[2]
    if group > LARGEST_GROUP:
        return f"q: {group} query heads per KV head, backend 'triton' serves {LARGEST_GROUP}; use backend='cpu'"
    return None


def routing_loss_triton(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float) -> Tensor:
    """As :func:`kernels.route.reference.routing_loss_reference`, on a GPU; the sums in fp32.

    Raises:
        ValueError: what :func:`why_not` says.
    """
    reason = why_not(q, k)
    if reason:
        raise ValueError(reason)
    loss, d_gists = _loss_and_gradient(q.detach().contiguous(), k.detach(), routed, far, scale, wants_gradient(k))
    return with_gradient(k, loss, d_gists, routed.tree.others.rows[:, : d_gists.shape[1]])


def prepare(q: Tensor, k: Tensor, routed: Routed) -> None:
    """Make the plans of :func:`routing_loss_triton`; q [.., H, D], k [.., Hkv, D] of any length."""
    _plan(q, k, routed)
    key_rows(routed.tree.others)


def _plan(q: Tensor, k: Tensor, routed: Routed) -> tuple[RouteTiles, RoutePlan]:
    group = q.shape[-2] // k.shape[-2]
    tiles = route_tiles(architecture(q), q.shape[-1], q.element_size(), group)
    return tiles, route_plan(routed, tiles.raw.rows // group, tiles.d_gist.keys)


def _loss_and_gradient(q: Tensor, k: Tensor, routed: Routed, far: bool, scale: float, wanted: bool) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and, if wanted, its gradient with respect to the level-sorted gists [B, gists, Hkv, D], both fp32."""
    tree, (batch, _, kv_heads, dim) = routed.tree, k.shape
    check_flat(lo=tree.lo, hi=tree.hi, child_lo=tree.child_lo, child_hi=tree.child_hi, first=routed.first)
    d_gists = torch.zeros(batch, gists_of(routed), kv_heads, dim, dtype=torch.float32, device=q.device)
    tiles, plan = _plan(q, k, routed) if tree.queries else (None, None)
    if plan is None or len(plan.items) == 0:  # nobody asks, or nobody has a gist
        return torch.zeros((), device=q.device), d_gists
    keys = k.reshape(-1, kv_heads, dim).index_select(0, key_rows(tree.others))  # [B * R, Hkv, D], level-sorted
    slices = _Slices(q, keys, routed, plan, far, scale, tiles, d_gists if wanted else None)
    blocks = len(plan.blocks)
    step = min(blocks, SLICE or max(1, SCRATCH // (4 * kv_heads * plan.gists * tiles.raw.rows)))
    with on_device(q):
        losses = [slices.run(i, min(step, blocks - i)) for i in range(0, blocks, step)]
    return torch.stack(losses).sum() / LOG2_E, d_gists


class _Slices:
    """What the slices of one call share.

    q: [M, H, D]; keys: [B * R, Hkv, D]; d_gists: [B, gists, Hkv, D] fp32, which is added to, or None.
    """

    def __init__(
        self, q: Tensor, keys: Tensor, routed: Routed, plan: RoutePlan, far: bool, scale: float, tiles: RouteTiles,
        d_gists: Tensor | None,
    ):  # fmt: skip
        self.q, self.keys, self.routed, self.plan, self.far, self.scale = q, keys, routed, plan, far, scale
        self.tiles, self.d_gists, self.kv_heads = tiles, d_gists, keys.shape[1]
        self.sizes = dict(
            H=q.shape[1], HKV=self.kv_heads, D=q.shape[2], BD=triton.next_power_of_2(q.shape[2]), L=routed.tree.levels
        )
        self.upcast = dict(UPCAST=INTERPRETED and q.element_size() == 2)

    def run(self, first: int, items: int) -> Tensor:
        """The loss of the blocks ``first .. first + items``, a scalar in units of log2; adds to the gradient."""
        tree, plan, heads, rows = self.routed.tree, self.plan, self.kv_heads, self.tiles.raw.rows
        new = lambda *shape: torch.empty(*shape, heads, items, rows, dtype=torch.float32, device=self.q.device)
        loss, raw, student = new(), new(2), new(2, tree.levels)  # shifts and factors
        mass = torch.empty(heads, items, plan.gists, rows, dtype=torch.float32, device=self.q.device)
        scale, length, keys = self.scale * LOG2_E, tree.queries, tree.others.rows.shape[1]
        kernels.raw_sum_kernel[items, heads](
            self.q, self.keys, self.routed.first, tree.hi, plan.blocks, *raw, scale, length, keys, first,
            **self.sizes, **self.upcast, **launch_options(self.tiles.raw),
        )  # fmt: skip
        self._masses(raw, mass, first, items)
        kernels.student_kernel[items, heads](
            self.q, self.keys, tree.lo, tree.hi, plan.blocks, mass, *student, loss, scale, length, keys, plan.gists,
            first, **self.sizes, **self.upcast, **launch_options(self.tiles.student),
        )  # fmt: skip
        if self.d_gists is not None:
            kernels.d_gist_kernel[len(plan.items), heads](
                self.q, self.keys, tree.lo, tree.hi, plan.blocks, plan.items, mass, *student, self.d_gists, scale,
                self.scale, length, keys, plan.gists, first, items, **self.sizes, **self.upcast,
                **launch_options(self.tiles.d_gist),
            )  # fmt: skip
        return loss.sum()

    def _masses(self, raw: Tensor, mass: Tensor, first: int, items: int) -> None:
        """Fill ``mass`` level by level from level 0. raw: [2, Hkv, items, rows], shifts and factors."""
        tree, plan, tiles = self.routed.tree, self.plan, self.tiles
        length, tokens, keys = tree.queries, tree.others.tokens, tree.others.rows.shape[1]
        kernels.mass_kernel[triton.cdiv(plan.widths[-1], tiles.chunks), items, self.kv_heads](
            self.q, self.keys, self.routed.first, tree.lo, tree.hi, tree.child_lo, tree.child_hi, plan.blocks, *raw, mass,
            self.scale * LOG2_E, length, tokens, keys, plan.gists, first, BC=tiles.chunks, FAR=self.far,
            EXACT=self.q.dtype == torch.float32, **self.sizes, **self.upcast, **launch_options(tiles.mass),
        )  # fmt: skip
        for s in reversed(range(tree.levels - 1)):
            if plan.widths[s]:
                kernels.upper_kernel[triton.cdiv(plan.widths[s], UPPER.keys), items, self.kv_heads](
                    tree.lo, tree.hi, tree.child_lo, tree.child_hi, plan.blocks, mass, length, tokens, plan.gists, first,
                    H=self.sizes["H"], HKV=self.kv_heads, L=tree.levels, S=s, BM=tiles.raw.rows, BC=UPPER.keys,
                    num_warps=UPPER.warps,
                )  # fmt: skip
