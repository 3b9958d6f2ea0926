"""RAT in one file: a recurrence inside each chunk, attention across chunks, and the four models it is compared with.

    RAT   "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling", NeurIPS 2025,
          arXiv 2507.04416
    RAT+  "RAT+: Train Dense, Infer Sparse. Recurrence Augmented Attention for Dilated Inference", ICML 2026,
          arXiv 2602.18196

`python rat.py` draws what each kind of layer sees; it is the shortest introduction. Then read this file from top to
bottom. Every token mixer in it is the same four lines with different settings:

    z, v, g, q, k = in_proj(x)                     g: the forget gate, after its sigmoid
    k~_t = g_t * k~_{t-1} + (1 - g_t) * k_t        the memory, which starts empty every L tokens; the same for v~
    y_i  = softmax over the visible j of (rope(q_i) . rope(k~_j) / sqrt(D)), applied to v~_j
    out  = out_proj(sigmoid(z) * y)

and the file follows those lines: what is visible (`Pattern`), the recurrence (`scan`), the softmax (`attend`), what
decoding has to remember (`Cache`), one layer (`Mixer`, `Block`), the language model (`RAT`).

Glossary:
    B batch    T tokens    d model width (d_model)    H heads (n_head)    D = d/H width of a head
    L chunk size (chunk_size)    C number of chunks    G groups of shared q and k heads (qk_groups)
    g forget gate    z output gate    k~, v~ gated keys and values: `k` and `v` after `scan`
"""

import functools
import itertools
import math
import os
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

NEVER = 1 << 62  # "once in NEVER tokens" never happens: no dilation at all, or a memory that never starts again


def expect(condition, message):
    """Bad input is one clear line: the value, what was expected, what to do."""
    if not condition:
        raise ValueError(message)


# ----------------------------------------------------------------------------------------------------------------------
# What is visible


class Pattern(NamedTuple):
    """Which keys a query sees: itself, the last `window` tokens, every `dilation`-th token, the first `sinks` tokens.

    So the visible past is two sets: the window, which moves along, and the tokens that stay. Training computes the two
    apart and the cache stores them apart. In RAT the last token of each chunk stays. Methods take ints or int tensors.
    """

    dilation: int  # tokens D-1, 2D-1, ... stay; 1: all of them (dense attention); NEVER: none
    window: int  # a query sees this many tokens before itself
    sinks: int  # the first tokens stay too

    def visible(self, i, j):
        """Does the query at position i see the key at position j? The definition that everything below follows."""
        return (j <= i) & ((i - j <= self.window) | self.stays(j))

    def stays(self, j):
        """Is token j seen by every later query, however far away?"""
        return ((j + 1) % self.dilation == 0) | (j < self.sinks)

    def count_stays(self, n):
        """How many of tokens 0 .. n-1 stay."""
        sinks = n.clamp(max=self.sinks) if isinstance(n, torch.Tensor) else min(n, self.sinks)
        return sinks + n // self.dilation - sinks // self.dilation

    def select_stays(self, x):
        """Of x (B, T, ...), the tokens that stay, in order: (B, count_stays(T), ...)."""
        first = self.sinks + (-self.sinks - 1) % self.dilation  # the first dilated token after the sinks: S=7, D=3: 8
        dilated = x[:, first :: min(self.dilation, x.shape[1] + 1)]  # a step of NEVER would overflow torch's strides
        return torch.cat([x[:, : self.sinks], dilated], dim=1) if self.sinks else dilated


# ----------------------------------------------------------------------------------------------------------------------
# The recurrence


def scan(x, gate, state=None, start=0, chunk=NEVER):
    """The recurrence h_t = gate_t * h_{t-1} + (1 - gate_t) * x_t. (RAT: within chunks; RAT+: over the full sequence)

    x      (B, T, ...) inputs, any shape that broadcasts against gate's: one k may serve several gates
    gate   (B, T, ...) in [0, 1], of x's dtype
    state  (B, ...)    h before the first token; None: zero
    start  the position of the first token
    chunk  h starts again from zero at every later position that is a multiple of `chunk`
    Returns h at every token: (B, T, ...).
    """
    B, T = gate.shape[:2]
    head = chunk - start % chunk  # tokens before the next restart
    if T <= head:
        return _recur(x, gate, state)
    if start % chunk or state is not None:
        first = _recur(x[:, :head], gate[:, :head], state)
        return torch.cat([first, scan(x[:, head:], gate[:, head:], chunk=chunk)], dim=1)
    # Chunks know nothing of each other: each is a row of the batch. The last one is padded, and cut again.
    x, gate = (_split(tensor, chunk).flatten(0, 1) for tensor in (x, gate))
    return _recur(x, gate, None).unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


def _split(x, size):
    """(B, T, ...) to (B, ceil(T / size), size, ...), zeros at the end."""
    if x.shape[1] % size:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % size])
    return x.unflatten(1, (-1, size))


UNROLL = 64  # longest recurrence that is run token by token
UNROLL_BLOCK = 16  # a longer one is cut into blocks of so many tokens


def _recur(x, gate, state):
    """`scan` without restarts. Compiled, autograd goes through the loop and Inductor fuses it; else see Recurrence."""
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return (_run if plain else Recurrence.apply)(x, gate, state)


def _run(x, gate, state):
    if gate.shape[1] <= UNROLL:
        # g*h + (1-g)*x is lerp(x, h, g): one operation, and no (1-g)*x in memory.
        return _walk(torch.lerp, x, gate, state)
    return _linear((1 - gate) * x, gate, state)


def _walk(step, x, gate, state):
    """h_t = step(x_t, h_{t-1}, gate_t), token by token."""
    h, steps = x.new_zeros(()) if state is None else state, []
    for x_t, gate_t in zip(x.unbind(1), gate.unbind(1)):  # the gradient of x[:, t] would be of x's whole size for every t
        h = step(x_t, h, gate_t)
        steps.append(h)
    return torch.stack(steps, dim=1)


def _linear(u, gate, state):
    """h_t = gate_t * h_{t-1} + u_t in log depth: blocks side by side as if each began with zero, then what was missing.

    A state that enters a block has shrunk at each of its tokens by all the gates so far. And the states that leave the
    blocks follow the same recurrence, with a block for a token. (Not torch's associative_scan: the backward pass of its
    fused mode, "pointwise", takes the pair (gates, h) for two independent scans and gets the gate's gradient wrong,
    with T x T memory. Seen in torch 2.13.)
    """
    B, T = u.shape[:2]
    if T <= UNROLL_BLOCK:
        return _walk(lambda u, h, gate: torch.addcmul(u, gate, h), u, gate, state)
    u, gate = _split(u, UNROLL_BLOCK), _split(gate, UNROLL_BLOCK)  # (B, blocks, UNROLL_BLOCK, ...)
    alone = _linear(u.flatten(0, 1), gate.flatten(0, 1), None).unflatten(0, (B, -1))
    shrunk = torch.stack(list(itertools.accumulate(gate.unbind(2), torch.mul)), dim=2)
    leaving = _linear(alone[:, :, -1], shrunk[:, :, -1], state)
    first = torch.zeros_like(leaving[:, 0]) if state is None else state
    entering = torch.cat([first[:, None], leaving[:, :-1]], dim=1)
    return torch.addcmul(alone, shrunk, entering[:, :, None]).flatten(1, 2)[:, :T]


class Recurrence(torch.autograd.Function):
    """The recurrence with its own gradient, which is a recurrence too, from the last token to the first.

    Against autograd through the loop, on 2 CPU cores: RAT's training step 4 % faster, RNN's 5 %, dense RAT+'s 10 %.
    """

    @staticmethod
    def forward(ctx, x, gate, state):
        h = _run(x, gate, state)
        ctx.save_for_backward(x, gate, state, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        x, gate, state, h = ctx.saved_tensors
        # d(loss)/d(h_t) = grad_t + gate_{t+1} * d(loss)/d(h_{t+1})
        if gate.shape[1] <= UNROLL:
            grad_h = grad.clone(memory_format=torch.contiguous_format)
            for t in reversed(range(gate.shape[1] - 1)):
                grad_h[:, t].addcmul_(gate[:, t + 1], grad_h[:, t + 1])
        else:
            after = torch.cat([torch.zeros_like(gate[:, :1]), gate[:, 1:].flip(1)], dim=1)
            grad_h = _linear(grad.flip(1), after, None).flip(1)
        before = torch.zeros_like(h[:, :1]) if state is None else state[:, None]
        grad_gate = torch.cat([before, h[:, :-1]], dim=1).sub_(x).mul_(grad_h)
        grad_x = torch.addcmul(grad_h, grad_h, gate, value=-1).sum_to_size(x.shape)
        return grad_x, grad_gate, None if state is None else gate[:, 0] * grad_h[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Softmax attention over what is visible


def _fp32(x):
    """The dtype in which sums over x are taken: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class Rope(NamedTuple):
    """Rotary position embedding, half-split. Token t is at position t // unit: RAT counts chunks."""

    base: float  # 0: no rotation (NoPE)
    unit: int

    def __call__(self, x, token):
        """x (B, T, ..., D) turned by the position of token (T,)."""
        if not self.base:
            return x
        half = x.shape[-1] // 2
        frequency = self.base ** (-torch.arange(half, device=x.device, dtype=_fp32(x)) / half)
        angle = ((token // self.unit)[:, None] * frequency).view(-1, *[1] * (x.ndim - 3), half)
        cos, sin = angle.cos(), angle.sin()
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def heads(x, copies):
    """(B, T, 1 or R, G, D) to (B, H, T, D): the copies of a group laid out as heads, head h = r * G + g."""
    return x.expand(-1, -1, copies, -1, -1).flatten(2, 3).transpose(1, 2)


def attend(q, k, v, pattern, rope):
    """y_i = softmax over the visible j of (rope(q_i) . rope(k_j) / sqrt(D)), applied to v_j. (RAT: across chunks)

    q  (B, T, 1, G, D) or (B, T, R, G, D)  queries before RoPE; with 1, the R heads of a group share one
    k  (B, T, R, G, D)  keys before RoPE, of H = R * G heads
    v  (B, T, R, G, D)  values
    All of one dtype, from position 0 on. Returns y (B, T, R, G, D). The work is in proportion to what is visible.
    """
    if pattern == (NEVER, 0, 0):
        return v  # a softmax over the token itself and nothing else: the RNN
    R, T, token = v.shape[2], v.shape[1], torch.arange(v.shape[1], device=v.device)
    q_rotated = heads(rope(q, token), R)
    if pattern.dilation == 1 or T <= pattern.window + 1:  # plain causal attention
        y = F.scaled_dot_product_attention(q_rotated, heads(rope(k, token), R), heads(v, R), is_causal=True)
        return y.transpose(1, 2).unflatten(2, (R, -1))

    # The window. If it holds the query's own token alone, all that is left of attention is the score; and one rotation
    # on both sides of a dot product cancels, so no k is turned for it.
    if pattern.window == 0:
        y, lse = heads(v, R), (q * k).sum(-1, dtype=_fp32(q)).flatten(2).transpose(1, 2) * q.shape[-1] ** -0.5
    else:
        y, lse = attend_intervals(q_rotated, heads(rope(k, token), R), heads(v, R), pattern, "window")

    # The tokens that stay, once they have left the window. For RAT: the last state of each earlier chunk. One token in
    # `dilation`, so few are turned.
    if pattern.count_stays(T - 1 - pattern.window) > 0:
        far_k, far_v, far_token = (pattern.select_stays(x) for x in (k, v, token[None]))
        far_k = heads(rope(far_k, far_token[0]), R)
        far, far_lse = attend_intervals(q_rotated, far_k, heads(far_v, R), pattern, "stays")
        # The softmax over both is the mean of the two, each weighted by the sum of its own exponentials.
        y = torch.lerp(y, far, torch.sigmoid(far_lse - lse)[..., None].to(y.dtype))
    return y.transpose(1, 2).unflatten(2, (R, -1))


def intervals(pattern, T, part):
    """Each half of the visible past is an interval of keys: query i sees keys low[i] .. high[i]-1.

    part "window": of all T keys, those in the window; "stays": of the keys that stay, those that have left the window.
    Returns low, high: (T,) int64 on the CPU, both nondecreasing.
    """
    i = torch.arange(T)
    if part == "window":
        return (i - pattern.window).clamp(min=0), i + 1
    return torch.zeros_like(i), pattern.count_stays((i - pattern.window).clamp(min=0))


def attend_intervals(q, k, v, pattern, part):
    """Attention of query i to the keys in its interval. q (B, H, T, D), k and v (B, H, S, D), already rotated.

    Returns out (B, H, T, D) and lse (B, H, T), the log of the softmax's denominator in float32 (float64 for float64);
    gradients flow through both. A query that sees nothing gets out = 0 and lse = -inf.
    """
    if q.is_cuda and q.dtype != torch.float64 and q.shape[-1] >= 16:  # what flex_attention can do
        return _flex(q, k, v, pattern, part)
    return _on_cpu(q, k, v, pattern, part)


@torch.compiler.disable  # compiled, a graph for each block of queries
def _on_cpu(q, k, v, pattern, part):
    return IntervalAttention.apply(q, k, v, *intervals(pattern, q.shape[2], part), IntervalAttention.BLOCK[part])


class IntervalAttention(torch.autograd.Function):
    """FlashAttention's algorithm (Dao et al. 2022) in plain PyTorch: blocks of queries, each against the keys it needs.

    Saves out and lse rather than the scores, which the backward pass computes again. Used where flex_attention has no
    gradients: everywhere but on CUDA.
    """

    # Queries at a time: on 2 CPU cores the best, or near it, of 32 to 512 for windows of 16 to 1024 and for L=16. A window
    # moves on with each query; of the tokens that stay, neighbours see nearly the same.
    BLOCK = {"window": 128, "stays": 256}
    ALIGN = 8  # keys begin and end at multiples of this: rows of scores that start on a vector's boundary, 10 % faster

    @staticmethod
    def blocks(q, k, low, high, block):
        """Yields (queries, keys, scores): two slices and a new (B, H, queries, keys) tensor, -inf outside intervals."""
        align = IntervalAttention.ALIGN
        for a in range(0, q.shape[2], block):
            lo, hi = low[a : a + block, None], high[a : a + block, None]
            if lo[0] == hi[-1]:
                continue
            first, end = int(lo[0]) // align * align, -(-int(hi[-1]) // align) * align
            queries, keys = slice(a, a + len(lo)), slice(first, min(end, k.shape[2]))
            scores = (q[:, :, queries] * q.shape[-1] ** -0.5 @ k[:, :, keys].mT).to(_fp32(q))
            # All queries of the block see the keys from lo[-1] to hi[0]: only the two edges need a mask.
            key = torch.arange(keys.start, keys.stop)
            left, right = max(0, int(lo[-1]) - keys.start), max(0, int(hi[0]) - keys.start)
            scores[..., :left].masked_fill_((key[:left] < lo).to(q.device), -math.inf)
            scores[..., right:].masked_fill_((key[right:] >= hi).to(q.device), -math.inf)
            yield queries, keys, scores

    @staticmethod
    def forward(ctx, q, k, v, low, high, block):
        with torch.autocast(q.device.type, enabled=False):
            out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf, dtype=_fp32(q))
            for queries, keys, scores in IntervalAttention.blocks(q, k, low, high, block):
                weights = scores.softmax(-1)
                # The softmax's largest weight is exp(largest score - lse). (Cheaper than a pass for each of exp and sum.)
                blind = (low == high)[queries].to(q.device)  # a softmax over nothing: not a number
                out[:, :, queries] = (weights.to(v.dtype) @ v[:, :, keys]).masked_fill_(blind[:, None], 0)
                lse[:, :, queries] = (scores.amax(-1) - weights.amax(-1).log_()).masked_fill_(blind, -math.inf)
        ctx.block = block
        ctx.save_for_backward(q, k, v, out, lse, low, high)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, low, high = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # d(out)/d(score_j) = weight_j * (v_j - out) and d(lse)/d(score_j) = weight_j.
        shift = (grad_out * out).sum(-1, keepdim=True, dtype=lse.dtype) - grad_lse[..., None]
        lse = lse[..., None].clamp(min=torch.finfo(lse.dtype).min)
        for queries, keys, scores in IntervalAttention.blocks(q, k, low, high, ctx.block):
            weights = scores.sub_(lse[:, :, queries]).exp_()
            grad_v[:, :, keys] += weights.to(v.dtype).mT @ grad_out[:, :, queries]
            grad_weights = grad_out[:, :, queries] @ v[:, :, keys].mT
            grad_scores = grad_weights.sub(shift[:, :, queries]).mul_(weights).to(q.dtype)
            grad_q[:, :, queries] = grad_scores @ k[:, :, keys] * scale
            grad_k[:, :, keys] += grad_scores.mT @ q[:, :, queries] * scale
        return grad_q, grad_k, grad_v, None, None, None


_block_masks = {}  # the newest 64, by (pattern, T, part, device)


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)  # uncompiled, it would hold all T x S scores in memory


def _flex(q, k, v, pattern, part):
    """The same in one fused CUDA kernel, which skips the 128 x 128 blocks of scores that no interval touches."""
    key = (pattern, q.shape[2], part, q.device)
    if key not in _block_masks:
        build_block_mask(*key)
    flex = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex()
    out, aux = flex(q, k, v, block_mask=_block_masks[key], return_aux=AuxRequest(lse=True))
    return out, aux.lse


@torch.compiler.disable
def build_block_mask(pattern, T, part, device, size=128):
    """Makes the mask that `_flex` needs, once: before a model is compiled, or the compiled code would break off for it.

    Straight from the intervals: create_block_mask would first make a mask of all T x S scores, 1 GB for RAT at T=131072.
    """
    low, high = intervals(pattern, T, part)
    S = T if part == "window" else pattern.count_stays(T)
    row_first = torch.arange(0, T, size)
    row_last = (row_first + size - 1).clamp(max=T - 1)
    column_first = torch.arange(0, S, size)
    touched = (column_first < high[row_last, None]) & (column_first + size > low[row_first, None])
    full = (column_first >= low[row_last, None]) & (column_first + size <= high[row_first, None])  # needs no mask at all
    blocks = []
    for grid in (touched & ~full, full):
        order = grid.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        blocks += [grid.sum(1)[None, None].int().to(device), order[None, None].int().to(device)]
    low, high = low.to(device), high.to(device)
    inside = lambda b, h, i, j: (low[i] <= j) & (j < high[i])
    if len(_block_masks) == 64:
        _block_masks.pop(next(iter(_block_masks)))
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, mask_mod=inside, seq_lengths=(T, S))
    _block_masks[pattern, T, part, device] = mask


# ----------------------------------------------------------------------------------------------------------------------
# What decoding has to remember


class Cache:
    """What one layer keeps of the tokens so far: those which a later query can still see, and the recurrence's state.

    Slots 0 .. window are a ring: token t is written to slot t % (window + 1), over the token that leaves the window. If
    that one stays, it is first copied behind the ring, to the next free slot. So the used slots are always the first n,
    decoding reads them with neither mask nor copy, and n <= window + 1 + sinks + t / dilation. Softmax does not mind
    the order: a key carries its rotation with it. No gradients flow through a cache.

    length  tokens so far
    keys    (B, H, slots, D), after RoPE        values  (B, H, slots, D)
    state   {"k": k~, "v": v~} of the last token, before RoPE: (B, R, G, D) each; RNN: v~ alone; no recurrence: empty
    """

    BLOCK = 256  # queries at a time where new text continues a cached one: the work stays in proportion to what is seen

    def __init__(self, kind, batch, max_tokens, shape, rope, device, dtype):
        self.pattern, self.memory, self.rope, self.length = kind.pattern, kind.memory, rope, 0
        copies, groups, width = shape
        slots = self.count_slots(max_tokens) if kind.qk_heads else 0
        size = (batch, copies * groups, slots, width)
        self.keys, self.values = (torch.empty(size, device=device, dtype=dtype) for _ in range(2))
        names = "" if not kind.memory else "kv" if kind.qk_heads else "v"
        self.state = {name: torch.zeros(batch, *shape, device=device, dtype=_fp32(self.keys)) for name in names}

    def numel(self):
        """How many numbers it has room for."""
        return sum(tensor.numel() for tensor in (self.keys, self.values, *self.state.values()))

    def nbytes(self):
        """Their size in bytes."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.state.values()))

    def count_slots(self, tokens):
        """Slots in use after so many tokens."""
        ring = self.pattern.window + 1
        return min(tokens, ring) + self.pattern.count_stays(max(0, tokens - ring))

    def positions(self):
        """The position of the token in each used slot: (n,) int64 on the CPU."""
        ring, last = self.pattern.window + 1, self.length - 1
        in_ring = last - (last - torch.arange(min(self.length, ring))) % ring
        behind = self.pattern.select_stays(torch.arange(max(0, self.length - ring))[None])[0]
        return torch.cat([in_ring, behind])

    @torch.no_grad()
    def append(self, k, v):
        """Adds the next token, k and v (B, H, D) after RoPE."""
        slot, leaving = self.length % (self.pattern.window + 1), self.length - self.pattern.window - 1
        if leaving >= 0 and self.pattern.stays(leaving):
            n = self.count_slots(self.length)
            self.keys[:, :, n], self.values[:, :, n] = self.keys[:, :, slot], self.values[:, :, slot]
        self.keys[:, :, slot], self.values[:, :, slot] = k, v
        self.length += 1

    @torch.no_grad()
    def store(self, k, v):
        """Adds the next T tokens, k and v (B, T, R, G, D) before RoPE, and drops what no later query can see."""
        start, R, old, n = self.length, v.shape[2], self.positions(), self.count_slots(self.length)
        self.length += k.shape[1]
        position = self.positions()  # of the token in each slot, from now on
        slot, was = torch.arange(len(position)), torch.full((self.length,), -1)
        was[old] = torch.arange(n)  # the slot of each position until now
        was, device = was[position], k.device
        new, moved = was < 0, (was >= 0) & (was != slot)
        token = position[new].to(device)
        k, v = k[:, token - start], v[:, token - start]  # for RAT one in L, so few are turned
        for slots, x in ((self.keys, self.rope(k, token)), (self.values, v)):
            slots[:, :, slot[moved].to(device)] = slots[:, :, was[moved].to(device)]
            slots[:, :, slot[new].to(device)] = heads(x, R).to(slots.dtype)

    @torch.compiler.disable  # compiled, its branches and shapes would be compiled anew for token after token
    def extend(self, q, k, v, gate=None):
        """The recurrence and the softmax for the next T tokens, which join the cache. Shapes as in `scan` and `attend`.

        Returns y (B, T, R, G, D).
        """
        fits = self.keys.shape[2] == 0 or self.count_slots(self.length + v.shape[1]) <= self.keys.shape[2]
        expect(fits, f"no room in the cache for token {self.length + v.shape[1]}: make it with a larger max_tokens")
        if "v" in self.state:
            v = self.remember(v, gate, "v")
        if "k" in self.state:
            k = self.remember(k, gate, "k")
        return self.attend(q, k, v)

    def remember(self, x, gate, name):
        """x to x~, from the state on if its chunk has begun, and leaves the new state."""
        state = self.state[name] if self.length % self.memory else None
        h = scan(x.to(gate.dtype), gate, state, self.length, self.memory)
        self.state[name].copy_(h[:, -1].detach())
        return h.to(x.dtype)

    def attend(self, q, k, v):
        R, T, start = v.shape[2], v.shape[1], self.length
        if self.keys.shape[2] == 0:  # an RNN has its state and no more
            self.length += T
            return v
        if T == 1:
            token = torch.full((1,), start, device=v.device)
            k, q = self.rope(torch.cat([k, q], dim=2), token).split([R, q.shape[2]], dim=2)  # in one go
            self.append(k[:, 0].flatten(1, 2), v[:, 0].flatten(1, 2))
            n = self.count_slots(self.length)
            y = F.scaled_dot_product_attention(heads(q, R), self.keys[:, :, :n], self.values[:, :, :n])  # all visible
            return y.transpose(1, 2).unflatten(2, (R, -1))
        if start == 0:
            self.store(k, v)
            return attend(q, k, v, self.pattern, self.rope)
        if T > self.BLOCK:
            pieces = zip(*(x.split(self.BLOCK, dim=1) for x in (q, k, v)))
            return torch.cat([self.attend(*piece) for piece in pieces], dim=1)
        token, n = torch.arange(start, start + T, device=v.device), self.count_slots(start)
        position = torch.cat([self.positions().to(v.device), token])
        keys = torch.cat([self.keys[:, :, :n], heads(self.rope(k, token), R)], dim=2)
        values = torch.cat([self.values[:, :, :n], heads(v, R)], dim=2)
        mask = self.pattern.visible(token[:, None], position)
        self.store(k, v)
        y = F.scaled_dot_product_attention(heads(self.rope(q, token), R), keys, values, attn_mask=mask)
        return y.transpose(1, 2).unflatten(2, (R, -1))


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class Kind(NamedTuple):
    """What tells one kind of layer from another: a row of the table in Config.kind."""

    memory: int  # the recurrence starts again every so many tokens; 0: none, plain keys and values
    pattern: Pattern
    rope_unit: int  # see Rope
    qk_heads: int  # 0: no queries and keys
    reach: int  # forget bias log U(1, reach - 1): at first, memories of 2 to reach tokens; 0: no bias
    output_gate: bool


@dataclass
class Config:
    """Sizes and settings of a model. Raises ValueError for those that do not fit together."""

    vocab_size: int = 257  # how many different tokens there are
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # heads per layer
    d_model: int = 128  # width of the model
    context: int = 256  # tokens in a training window; generation may go beyond
    layers: str = "rat"  # attention, swa, rnn, rat, rat+, or several, such as rat,swa: tiled over the depth
    chunk_size: int = 16  # rat: tokens per chunk
    dilation: str | int | None = None  # rat+: one token in so many stays visible; 1: all, none: no such token (1)
    window: str | int | None = None  # swa, rat+: a token sees so many tokens before itself (swa 1024, rat+ 0)
    sinks: str | int | None = None  # rat+: so many first tokens stay visible (0)
    qk_groups: int | None = None  # rat: query and key heads, each shared by n_head / qk_groups heads (2)
    recurrence: bool | None = None  # rat+: false leaves attention with an output gate (true)
    rope_base: float = 10000.0  # base of the rotary position embedding; 0: no position embedding (NoPE)

    def __post_init__(self):
        expect(isinstance(self.layers, str), f"layers is {self.layers!r}: it must be text, such as 'rat,swa'")
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "context", "chunk_size"):
            value = getattr(self, name)
            fits = isinstance(value, int) and 0 < value < NEVER
            expect(fits, f"{name} is {value!r}: it must be a whole number above 0")
        H, width = self.n_head, self.d_model // self.n_head
        expect(self.d_model % H == 0, f"d_model {self.d_model} is not divisible by n_head {H}: change one of them")
        expect(width % 2 == 0, f"d_model / n_head is {width}: a head's width must be even, RoPE turns pairs of channels")
        expect(self.rope_base >= 0, f"rope_base is {self.rope_base}: it must be above 0, or 0 for no position embedding")
        if self.qk_groups is None:
            self.qk_groups = 1 if H % 2 else 2
        fits = self.qk_groups > 0 and H % self.qk_groups == 0
        expect(fits, f"n_head {H} is not divisible by qk_groups {self.qk_groups}: change one of them")
        names = {self.layer_name(layer) for layer in range(self.n_layer)}
        for setting in ("dilation", "window", "sinks", "recurrence"):
            users = ["rat+", "swa"] if setting == "window" else ["rat+"]
            used = getattr(self, setting) is None or names & set(users)
            expect(used, f"{setting} is a setting of {' and '.join(users)}, but layers is {self.layers!r}: leave it out")
        for layer in range(self.n_layer):
            self.kind(layer)

    def layer_name(self, layer):
        names = self.layers.split(",")
        return names[layer % len(names)].strip()

    def per_layer(self, setting, layer, default, least):
        """The value for one layer of dilation, window or sinks, which may be a list tiled over the depth: "1,64"."""
        value = getattr(self, setting)
        values = [default] if value is None else str(value).split(",")
        text = str(values[layer % len(values)]).strip()
        if text == "none" and setting == "dilation":
            return NEVER
        form = f"a whole number from {least} on{', or none' if setting == 'dilation' else ''}"
        expect(text.isdecimal() and least <= int(text) < NEVER, f"{setting} is {value!r}: each layer's must be {form}")
        return int(text)

    def kind(self, layer):
        """What layer number `layer` is made of: the table of the README, row by row."""
        name, L, H, G = self.layer_name(layer), self.chunk_size, self.n_head, self.qk_groups
        D = self.per_layer("dilation", layer, 1, least=1)
        W = self.per_layer("window", layer, 1024 if name == "swa" else 0, least=0)
        S = self.per_layer("sinks", layer, 0, least=0)
        M = 0 if self.recurrence is False else NEVER
        table = {
            #                  memory pattern                RoPE unit  q,k heads  reach         output gate
            "attention": Kind( 0,     Pattern(1, 0, 0),      1,         H,         0,            False),
            "swa":       Kind( 0,     Pattern(NEVER, W, 0),  1,         H,         0,            False),
            "rnn":       Kind( NEVER, Pattern(NEVER, 0, 0),  1,         0,         self.context, True),
            "rat":       Kind( L,     Pattern(L, 0, 0),      L,         G,         L,            True),
            "rat+":      Kind( M,     Pattern(D, W, S),      1,         H,         0,            True),
        }  # fmt: skip
        expect(name in table, f"there is no layer {name!r}: layers is a list of {', '.join(table)}")
        return table[name]


class Mixer(nn.Module):
    """One token mixer of any kind: x (B, T, d_model) to (B, T, d_model). `layer` chooses the kind, by config.layers."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.kind, d = config.kind(layer), config.d_model
        self.width = d // config.n_head
        self.groups = self.kind.qk_heads or config.n_head
        self.copies = config.n_head // self.groups  # R: heads that share one q and k
        self.rope = Rope(config.rope_base, self.kind.rope_unit)
        qk = self.kind.qk_heads * self.width
        self.split = [d * self.kind.output_gate, d, d * bool(self.kind.memory), qk, qk]  # z, v, g, q, k
        self.in_proj = nn.Linear(d, sum(self.split), bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        if self.kind.reach:
            # A gate g remembers 1 / (1-g) tokens or so: sigmoid(log u) = 1 - 1 / (1+u). 
            self.forget_bias = nn.Parameter(torch.empty(d).uniform_(1, max(1, self.kind.reach - 1)).log_())

    def cache(self, batch, max_tokens, dtype=None):
        """An empty Cache with room for so many tokens."""
        shape, weight = (self.copies, self.groups, self.width), self.in_proj.weight
        return Cache(self.kind, batch, max_tokens, shape, self.rope, weight.device, dtype or weight.dtype)

    def forward(self, x, cache=None):
        """x (B, T, d_model): with a cache, the T tokens after those in it. Returns (B, T, d_model)."""
        z, v, gate, q, k = self.in_proj(x).split(self.split, dim=-1)
        v, gate, q, k = (self.per_head(x) for x in (v, gate, q, k))
        if self.kind.memory:
            # In float32 whatever the autocast dtype: a memory is a long product of gates close to 1.
            gate = torch.sigmoid(gate.to(_fp32(gate)) + (self.per_head(self.forget_bias) if self.kind.reach else 0))
        if cache is not None:
            y = cache.extend(q, k, v, gate)
        else:
            if self.kind.memory:
                v = scan(v.to(gate.dtype), gate, chunk=self.kind.memory).to(v.dtype)
                k = scan(k.to(gate.dtype), gate, chunk=self.kind.memory).to(k.dtype) if self.kind.qk_heads else k
            y = attend(q, k, v, self.kind.pattern, self.rope)
        y = y.flatten(2)
        return self.out_proj(torch.sigmoid(z) * y if self.kind.output_gate else y)

    def per_head(self, x):
        """(..., n * G * D) to (..., n, G, D)."""
        return x.unflatten(-1, (x.shape[-1] // (self.groups * self.width), self.groups, self.width))


class Block(nn.Module):
    """Token mixer and MLP, each on a normalized input and added to its residual."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.d_model
        self.mixer_norm, self.mixer = nn.RMSNorm(d, eps=1e-6), Mixer(config, layer)
        self.mlp_norm, self.mlp = nn.RMSNorm(d, eps=1e-6), nn.Sequential(
            nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False)
        )

    def forward(self, x, cache=None):
        x = x + self.mixer(self.mixer_norm(x), cache)
        return x + self.mlp(self.mlp_norm(x))


# ----------------------------------------------------------------------------------------------------------------------
# The language model


class RAT(nn.Module):
    """A decoder-only language model of the layers that config.layers names, with tied embeddings.

    tokenizer  its name, for those who want text
    recompute  True: the backward pass computes each block again, instead of keeping what it computed the first time
    """

    LOSS_CHUNK = 4096  # tokens whose logits exist at one time while training; with 50304 tokens to choose from, 0.8 GB

    def __init__(self, config, tokenizer=""):
        super().__init__()
        self.config, self.tokenizer, self.recompute = config, tokenizer, False
        padded = -(-config.vocab_size // 64) * 64  # matrix units like multiples of 64; the rest never leaves this class
        self.embedding = nn.Embedding(padded, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) int64; targets (B, T), -100 for none; cache from `self.cache`: what came before tokens.

        Without targets returns (logits (B, T, vocab_size), None); with targets (None, mean cross-entropy in nats).
        """
        x = self.features(tokens, cache)
        return (self.head(x), None) if targets is None else (None, self.loss(x, targets))

    def features(self, tokens, cache=None):
        """What the output embedding reads: (B, T, d_model)."""
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in tokens.aminmax())  # elsewhere it would wait for the device
            size = self.config.vocab_size
            expect(0 <= low and high < size, f"token {low if low < 0 else high} is not in the vocabulary, 0 to {size - 1}")
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache[layer] if cache is not None else None)
        return self.norm(x)

    def head(self, x):
        """Logits, (..., vocab_size), of features x (..., d_model)."""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    def loss(self, x, targets):
        """Mean cross-entropy over the targets that are not -100, without the logits of all tokens at one time."""
        x, targets = x.flatten(0, 1), targets.flatten()
        nats = lambda x, targets: F.cross_entropy(self.head(x).to(_fp32(x)), targets, reduction="sum", ignore_index=-100)
        if len(x) <= self.LOSS_CHUNK or not torch.is_grad_enabled():
            total = sum(map(nats, x.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK)))
        else:  # the backward pass computes a chunk's logits again
            chunks = zip(x.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK))
            total = sum(checkpoint(nats, *chunk, use_reentrant=False) for chunk in chunks)
        return total / (targets != -100).sum().clamp(min=1)

    def cache(self, batch, max_tokens):
        """One empty Cache per layer, for so many sequences of up to so many tokens."""
        device = self.embedding.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        try:
            return [block.mixer.cache(batch, max_tokens, dtype) for block in self.blocks]
        except (RuntimeError, TypeError) as error:  # TypeError: a number beyond 64 bits
            line = f"no memory for a cache of {batch} sequences of {max_tokens} tokens: make them fewer or shorter"
            raise ValueError(line) from error

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop=None):
        """Continues prompts of one length, tokens (B, T), and yields each next token, (B,) int64, as it is drawn.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the likeliest whose probabilities
        first reach p. The same seed gives the same text. A sequence that has drawn the token `stop` goes on with
        `stop`; when all have, generation ends.
        """
        size, device = self.config.vocab_size, tokens.device
        expect(tokens.ndim == 2 and tokens.numel() > 0, "the prompt is empty: it needs at least one token")
        low, high = tokens.aminmax()
        expect(0 <= low and high < size, f"a token id of the prompt is not in the vocabulary, 0 to {size - 1}")
        expect(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}: it must be 1 or more")
        expect(temperature >= 0, f"temperature is {temperature}: it must be 0 or above")
        expect(top_k is None or top_k >= 1, f"top_k is {top_k}: it must be 1 or more")
        expect(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}: it must be above 0, and at most 1")
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        cache = self.cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits = self.head(self.features(tokens, cache)[:, -1]).float()
            tokens = sample(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                tokens = tokens.masked_fill(stopped, stop)
                stopped |= tokens == stop
            yield tokens
            if stop is not None and stopped.all():
                return
            tokens = tokens[:, None]

    def use(self, **pattern):
        """From now on with another `dilation`, `window` or `sinks`, given as in Config; weights stay what they are."""
        config = replace(self.config, **pattern)
        for layer, block in enumerate(self.blocks):
            block.mixer.kind = config.kind(layer)
        self.config = config

    def save(self, path, **more):
        """Writes config, tokenizer name, weights, and whatever else is given; the file appears whole or not at all."""
        contents = {"config": asdict(self.config), "tokenizer": self.tokenizer, "model": self.state_dict(), **more}
        partial = f"{path}.partial"
        try:
            torch.save(contents, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            if os.path.exists(partial):
                os.remove(partial)
            raise OSError(f"cannot write {path}: {error}; what was there before is untouched") from error

    @classmethod
    def load(cls, path, device="cpu", **changes):
        """The model that `save` wrote, on `device`. Reads tensors and plain values only, never code.

        changes  dilation, window, sinks: another pattern than the one trained with; context: another length
        """
        saved = read_checkpoint(path)
        for name, value in changes.items():
            now = saved["config"].get(name)
            free = name in ("dilation", "window", "sinks", "context")
            expect(free or value == now, f"{name} is {value}: the model in {path} has {now}, and that is part of its weights")
        with torch.device("meta"):
            model = cls(Config(**saved["config"] | changes), saved["tokenizer"])
        try:
            model.load_state_dict(saved["model"], assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{path}: its weights are not those of its config: {reason}") from error
        return model.to(device)

    @classmethod
    def load_official(cls, source, device="cpu", **settings):
        """The model in a checkpoint of the papers' own code (Hugging Face barpitf/RAT and barpitf/ratplus), on `device`.

        source    a path, or the dict of tensors
        settings  layers, and whatever else of Config does not show in the tensors; if not given, as in the papers: heads
                  of width 128, context 4096, chunks of 16, 2 groups, window 1024, dense. vocab_size, d_model, n_layer do
                  show. Their vocabulary is LLaMA-2's; the model's tokenizer has no name.
        ValueError names the first tensor that is missing, too many, or of another shape than the settings make it.
        """
        tensors, weights = official_tensors(source), {}
        embedding = tensors.get("embedding.wte.weight")
        expect(embedding is not None, "no checkpoint of the papers' code: it lacks the tensor embedding.wte.weight")
        vocab_size, d = embedding.shape
        layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
        shown = dict(vocab_size=vocab_size, d_model=d, n_layer=len(layers))
        for name in shown.keys() & settings.keys():
            expect(settings[name] == shown[name], f"{name} is {settings[name]}: the checkpoint has {shown[name]}")
        config = Config(**dict(context=4096, n_head=max(1, d // 128)) | settings | shown)
        with torch.device("meta"):
            model = cls(config)
        kind = f"a model of layers {config.layers!r}, n_head {config.n_head}, qk_groups {config.qk_groups}"
        for name, parameter in model.state_dict().items():
            theirs, shape = official_name(name), tuple(parameter.shape)
            expect(theirs in tensors, f"the checkpoint lacks the tensor {theirs}, which {kind} has")
            given = tensors.pop(theirs).float()
            if name == "embedding.weight":
                given = F.pad(given, [0, 0, 0, shape[0] - vocab_size])
            expect(given.shape == shape, f"the tensor {theirs} has the shape {tuple(given.shape)}, in {kind} it has {shape}")
            if "in_proj" in name and config.layer_name(layer := int(name.split(".")[1])) == "rat+":
                z, v, g, q, k = model.blocks[layer].mixer.split
                z, q, k, v, g = given.split([z, q, k, v, g])  # their order of rows; for other kinds it is ours
                given = torch.cat([z, v, g, q, k])
            weights[name] = given
        output = tensors.pop("head.lm_head.weight", embedding)
        expect(torch.equal(output, embedding), "head.lm_head.weight is not embedding.wte.weight: here the two are one")
        expect(not tensors, f"the checkpoint has the tensor {min(tensors, default='')}, which {kind} has not")
        model.load_state_dict(weights, assign=True)
        return model.to(device)


def official_name(name):
    """The name that one of our parameters has in the papers' checkpoints."""
    parts = {"blocks": "backbone.layers", "mixer_norm": "seq_layer.input_norm", "mixer": "seq_layer", "forget_bias": "gate_bias",
             "mlp_norm": "hidden_layer.ln", "mlp.0": "hidden_layer.fc1", "mlp.2": "hidden_layer.fc2"}  # fmt: skip
    whole = {"embedding.weight": "embedding.wte.weight", "norm.weight": "backbone.ln.weight"}
    return whole.get(name) or re.sub(r"mlp\.\d|\w+", lambda part: parts.get(part[0], part[0]), name)


def official_tensors(source):
    """{name: tensor} of a file of the papers' code, or of such a dict. Runs no code: of classes in a file only EasyDict is known."""
    if isinstance(source, (str, os.PathLike)):
        expect(os.path.isfile(source), f"there is no checkpoint {source}")
        try:
            with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):  # it holds plain values, as they are
                source = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds a {reason[1]}, which is code" if reason else "it is damaged, or no checkpoint"
            raise ValueError(f"cannot read {source}: {reason}; where you trust it, keep its tensors alone: "
                             f"torch.save(torch.load(path, weights_only=False)['task'], new_path)") from error  # fmt: skip
    source = source.get("task", source) if isinstance(source, dict) else None
    named = isinstance(source, dict) and all(isinstance(x, torch.Tensor) for x in source.values())
    expect(named, "no checkpoint of the papers' code: neither a dict of tensors nor one that holds them as 'task'")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in source.items()}


def read_checkpoint(path):
    """The dict that RAT.save wrote, on the CPU and memory-mapped. ValueError if it is anything else."""
    expect(os.path.isfile(path), f"there is no checkpoint {path}: `python train.py` writes out/ckpt.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # one byte amiss, and torch raises anything
        raise ValueError(f"{path} is damaged, or is no checkpoint of train.py: train again, or name another") from error
    known = isinstance(saved, dict) and {"config", "tokenizer", "model"} <= saved.keys()
    known = known and isinstance(saved["config"], dict)
    expect(known, f"{path} is no checkpoint of train.py: it lacks config, tokenizer or model")
    strange = set(saved["config"]) - {field.name for field in fields(Config)}
    expect(not strange, f"{path} has settings that this version does not know: {', '.join(sorted(strange))}")
    return saved


def flops_per_token(config, context=None):
    """Floating-point operations of the matrix products, per token of a window of `context`: forward and backward.

    A model's own: what it needs, whatever a program computes twice or masks out. The backward pass counts double.
    """
    T, d = context or config.context, config.d_model
    total = 2 * d * -(-config.vocab_size // 64) * 64
    for layer in range(config.n_layer):
        with torch.device("meta"):
            total += 2 * sum(p.numel() for p in Block(config, layer).parameters() if p.ndim == 2)
        total += mixing_flops(config.kind(layer).pattern, d, T)
    return 3 * total


def mixing_flops(pattern, d, T):
    """Operations per token of a layer's two products with what is visible, q . k and weights . v: the mean over T tokens."""
    i = torch.arange(T)
    far = pattern.count_stays((i - pattern.window).clamp(min=0))
    near = i.clamp(max=pattern.window) + 1 if pattern.window else 0  # one's own key alone: no matrix product
    return 4 * d * (i + 1 if pattern.dilation == 1 else near + far).double().mean().item()


def sample(logits, temperature, top_k, top_p, generator):
    """Draws one token from each row of logits (B, vocab_size): (B,) int64. See RAT.generate."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones reach p already
        logits = logits.masked_fill(enough.gather(-1, index.argsort(-1)), -math.inf)
    # argmax of p / Exp(1) noise is a draw from p, and unlike multinomial never waits for the GPU.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# The lesson


def lesson(T=12, cached=4096):
    """What each kind of layer sees, drawn from `Pattern.visible`, and what its cache holds, counted in a `Cache`."""
    small, full = dict(n_layer=1, context=T, chunk_size=4), dict(n_layer=1, context=cached, n_head=16, d_model=2048)
    rows = [  # title, settings of the drawing, settings of the cache
        ("attention", dict(layers="attention"), {}),
        ("swa, window 3", dict(layers="swa", window=3), dict(window=1024)),
        ("rnn", dict(layers="rnn"), {}),
        ("rat, L=4", dict(layers="rat"), dict(chunk_size=16)),
        ("rat+, dense", dict(layers="rat+"), {}),
        ("rat+, D=4 W=2 S=1", dict(layers="rat+", dilation=4, window=2, sinks=1), dict(dilation=64, window=256, sinks=4)),
    ]
    pictures = []
    for title, settings, _ in rows:
        kind, picture = Config(**small | settings).kind(0), [title]
        for i in range(T):
            seen = [j for j in range(T) if kind.pattern.visible(i, j)]
            # The memory k~_j holds the tokens of its chunk up to j; without a recurrence, token j alone.
            held = {t for j in seen for t in range(j - j % (kind.memory or 1), j)}
            picture.append(" ".join("●" if j in seen else "○" if j in held else "·" for j in range(T)))
        pictures.append(picture)
    print(f"Rows: queries 0 to {T - 1}; columns: keys.    ● visible    ○ in the memory of a visible one    · not seen\n")
    for three in (pictures[:3], pictures[3:]):
        for line in zip(*three):
            print("    ".join(f"{text:<{2 * T - 1}}" for text in line).rstrip())
        print()
    print(f"Numbers in the cache of one layer, 16 heads of 128, after {cached} tokens:")
    for title, settings, other in rows:
        config = Config(**full | settings | other)
        with torch.device("meta"):
            numbers = Mixer(config).cache(1, cached).numel()
        setting = ", ".join(f"{name} {value}" for name, value in other.items())
        print(f"    {settings['layers']:<10}{setting:<36}{numbers:>12,}")


if __name__ == "__main__":
    lesson()
