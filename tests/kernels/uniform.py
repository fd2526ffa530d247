"""What the tests and the benchmark share: a plain PyTorch attention to compare errors with, and simple intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from unfold.kernels.intervals import Intervals
from unfold.kernels.tree import GistTree


def plain_attention(q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float) -> Tensor:
    """Attention as one writes it in PyTorch: products in q's dtype, softmax in fp32, T x T memory; differentiable.

    The measure of every kernel's error: at most twice that of this function in the same dtype. q: [B, T, H, D],
    k, v: [B, T, Hkv, D]; every query must see something.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    hidden = ~intervals.dense_mask()[:, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def gradients(attention, qkv, d_out: Tensor) -> tuple[Tensor, ...]:
    """(out, d_q, d_k, d_v) of a function of q, k, v for an upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


def uniform_levels(raw: int, chunk_sizes: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """[T] int64 levels of one document of ``raw`` tokens whose chunks all have c0 tokens, none counted as sink."""
    kinds, places, period = [torch.full((raw,), -1, device=device)], [torch.arange(raw, device=device).double()], 1
    for number, size in enumerate(chunk_sizes):
        period *= size
        after = places[0][period - 1 :: period]  # the raw tokens that gists of this level follow, in order of their levels
        places.append(after + (number + 1) / (len(chunk_sizes) + 1))
        kinds.append(torch.full_like(after, number).long())
    return torch.cat(kinds)[torch.cat(places).argsort(stable=True)]


def uniform_intervals(
    raw: int, chunk_sizes: tuple[int, ...], sink: int = 3, n_prev: int = 1, device: torch.device | str = "cpu"
) -> tuple[Tensor, Intervals]:
    """Levels [T] and intervals of one such document: what a benchmark needs, without the model package."""
    level = uniform_levels(raw, chunk_sizes, device)
    levels, tokens = len(chunk_sizes), len(level)
    kinds = torch.arange(levels - 1, -2, -1, device=device)  # of the segments: top level first, raw tokens last
    upto = (level == kinds[:, None]).cumsum(1)  # [L + 1, T] items of a kind up to and including a token
    start = torch.nn.functional.pad(upto[:, -1].cumsum(0), (1, 0))
    rows = torch.cat([(level == kind).nonzero()[:, 0] for kind in kinds])
    width = upto.clone()
    for s in range(1, levels + 1):
        closed = upto[s - 1] - (level == kinds[s - 1]).long()  # groups closed before the token
        size = chunk_sizes[kinds[s] + 1]
        width[s] -= (closed - n_prev).clamp(min=0) * size
        width[s] *= level <= kinds[s] + 1
    sinks = (upto[-1] - width[-1]).clamp(max=sink)
    hi = torch.cat([upto + start[:-1, None], (tokens + sinks)[None]])
    lo = torch.cat([hi[:-1] - width, torch.full_like(hi[-1:], tokens)])
    row_of = torch.empty_like(rows)
    row_of[rows] = torch.arange(tokens, device=device)
    copies = rows[start[-2] : start[-2] + sink]
    copies = torch.nn.functional.pad(copies, (0, sink - len(copies)))
    segment_start = torch.nn.functional.pad(start, (0, 1), value=tokens + sink)
    batch = lambda x, dtype: x[None].to(dtype).contiguous()
    rows = torch.cat([rows, copies])
    int32, int64 = torch.int32, torch.int64
    return level, Intervals(
        batch(rows, int64), batch(row_of, int64), batch(lo, int32), batch(hi, int32), batch(segment_start, int32)
    )


def sampled_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, tokens: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Attention of a few tokens, key by key: exact at any length where no T x T reference fits. Differentiable.

    Args:
        q: [1, T, H, D]; k, v: [1, T, Hkv, D]; tokens: [n] int64, the tokens whose output is wanted.
        dtype: in which to compute: fp64 for the truth, q's own for what plain PyTorch makes of it.

    Returns:
        [n, H, D] in ``dtype``. Memory: n x (most keys that one of the tokens sees) x Hkv x D.
    """
    lo, hi = intervals.lo[0, :, tokens].tolist(), intervals.hi[0, :, tokens].tolist()  # [S][n]
    rows = [torch.cat([torch.arange(a[i], b[i]) for a, b in zip(lo, hi)]) for i in range(len(tokens))]
    seen = torch.nn.utils.rnn.pad_sequence([r.to(q.device) for r in rows], batch_first=True, padding_value=-1)  # [n, keys]
    # A key's gradient is summed over the tokens before it is rounded, as a matrix product would: hence the wide gather.
    wide = torch.promote_types(dtype, torch.float32)
    key, value = (x[0].to(wide)[intervals.rows[0, seen.clamp(min=0)]].to(dtype) for x in (k, v))  # [n, keys, Hkv, D]
    query = q[0, tokens].to(dtype).unflatten(1, (k.shape[2], -1))  # [n, Hkv, G, D]
    scores = (torch.einsum("nhgd,nkhd->nhgk", query, key) * scale).to(wide)
    weights = scores.masked_fill(seen[:, None, None] < 0, -torch.inf).softmax(-1).to(dtype)
    return torch.einsum("nhgk,nkhd->nhgd", weights, value).flatten(1, 2)


def uniform_tree(
    raw: int, chunk_sizes: tuple[int, ...], recalling: int, sink: int = 3, device: torch.device | str = "cpu"
) -> GistTree:
    """The gist tree of the document of :func:`uniform_intervals`, whose last ``recalling`` raw tokens recall."""
    level, intervals = uniform_intervals(raw, chunk_sizes, sink, device=device)
    levels, tokens = len(chunk_sizes), len(level)
    kinds = torch.arange(levels - 1, -2, -1, device=device)
    upto = (level == kinds[:, None]).cumsum(1)  # [L + 1, T]
    start = torch.nn.functional.pad(upto[:, -1].cumsum(0), (1, 0))
    child_lo, child_hi = torch.zeros(2, tokens, dtype=torch.int64, device=device)
    parent = torch.full((tokens,), -1, device=device)
    token = (level < 0).nonzero()[:, 0][raw - recalling :]
    tail = start[:levels, None].repeat(1, recalling)
    for s in range(levels):
        size, gists, items = chunk_sizes[levels - 1 - s], int(upto[s, -1]), int(upto[s + 1, -1])
        first = torch.arange(gists, device=device) * size
        own = slice(int(start[s]), int(start[s]) + gists)
        child_hi[own] = first + size + start[s + 1]
        child_lo[own] = (first.clamp(min=sink) if s == levels - 1 else first) + start[s + 1]
        child_lo[own] = child_lo[own].minimum(child_hi[own])
        above = torch.arange(items, device=device) // size
        parent[int(start[s + 1]) : int(start[s + 1]) + items] = torch.where(above < gists, above + start[s], -1)
        if s + 1 < levels:
            tail[s + 1] += upto[s, token] * size
    lo, hi = intervals.lo[0][:, token], intervals.hi[0][:, token]
    lo[:levels] = start[:levels, None].int()
    asleep = torch.zeros(1, tokens, dtype=torch.bool, device=device).index_fill_(1, token, True)
    families = (x[None].int() for x in (child_lo, child_hi, parent))
    span = (token + 1).int()
    return GistTree(intervals.without(asleep), *families, token, (0, recalling), lo, hi.contiguous(), tail.int(), span)
