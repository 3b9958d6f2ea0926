"""RAT in one file: a recurrence inside each chunk, attention across chunks, and the baselines.

    RAT   "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
          NeurIPS 2025, arXiv 2507.04416
    RAT+  "RAT+: Train Dense, Infer Sparse. Recurrence Augmented Attention for Dilated Inference",
          arXiv 2602.18196

Cut the sequence into chunks of L tokens. Within a chunk, a gated recurrence sums up the tokens so far. Across
chunks, a query attends to the last state of each earlier chunk, and to its own. With L = 4, query 10:

    tokens                   0  1  2  3 | 4  5  6  7 | 8  9 10 11
    states it attends to              * |          * |       *
    what they sum up         0 to 3       4 to 7       8 to 10

Every token mixer in this file is the same four lines with different settings:

    z, v, g, q, k = in_proj(x)                         g: the forget gate, after its sigmoid
    k~_t = g_t * k~_{t-1} + (1 - g_t) * k_t            from zero at each restart; the same for v~
    y_i  = softmax over visible j of (rope(q_i) . rope(k~_j) / sqrt(D))  applied to v~_j
    out  = out_proj(sigmoid(z) * y)                    attention has neither g (k~ = k, v~ = v) nor z

The naive version is `oracle_mixer` in test_rat.py: these lines in float64, token by token, sharing no code
with this file. `python rat.py` draws what each kind of layer sees. Otherwise, read from top to bottom.

Glossary, with the field of Config in brackets:
    B batch    T tokens    t, i, j positions of a token, a query, a key    x input    y mixed values
    d width of the model [d_model]    H heads [n_head]    D = d/H width of a head    L chunk size [chunk_size]
    G heads of q and k [qk_groups]    R = H/G heads that share one: head number n reads group n % G
    q query    k key    v value    z output gate    g forget gate    h state of the recurrence, k~ or v~
"""

import contextlib
import errno
import math
import os
import signal
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

NEVER = 1 << 30  # a period so long that it never comes round: no dilation at all, or no restart


# --- 1. Kinds of layer, and what each one sees ----------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """What tells one kind of layer from another."""

    restart: int = 0  # period of the recurrence's restarts; 0: no recurrence, plain keys and values
    dilation: int = 1  # tokens dilation - 1, 2 * dilation - 1, ... stay visible to all later queries
    window: int = 0  # number of preceding tokens each query sees
    sinks: int = 0  # number of first tokens that stay visible
    rope_unit: int = 1  # RoPE's position is t // rope_unit: it counts tokens, or chunks
    rope_base: float = 10000.0  # 0: no position embedding (NoPE)
    qk_heads: int = 0  # heads of q and k; 0: none, y = v~
    memory: int = 0  # longest memory at initialization, in tokens; 0: no forget bias (RAT+ has none)
    output_gate: bool = True

    def visible(self, i, j):
        """Does the query at position i see the key at position j? All else follows from this."""
        return (j <= i) & ((i - j <= self.window) | (j < self.sinks) | ((j + 1) % self.dilation == 0))

    # Tokens of the last two conditions stay: every later query sees them, however far away.
    def count(self, n):
        """How many of the first n tokens stay."""
        sinks = min(n, self.sinks)
        return sinks + n // self.dilation - sinks // self.dilation

    def position(self, n):
        """The position of number n, a tensor, of the tokens that stay."""
        dilated = n - self.sinks + self.sinks // self.dilation  # its number, among the dilated alone
        return torch.where(n < self.sinks, n, (dilated + 1) * self.dilation - 1)

    def staying(self, x):
        """The tokens of x (..., T, any) that stay, in order."""
        sinks = min(x.shape[-2], self.sinks)
        dilated = x[..., (sinks // self.dilation + 1) * self.dilation - 1 :: self.dilation, :]
        return torch.cat([x[..., :sinks, :], dilated], dim=-2) if sinks else dilated


def kinds(config, dilation, window, sinks):
    H, G, L, context = config.n_head, config.qk_groups, config.chunk_size, config.context
    restart = 0 if config.recurrence is False else NEVER
    return {
        "attention": Kind(qk_heads=H, output_gate=False),
        "swa": Kind(qk_heads=H, output_gate=False, dilation=NEVER, window=window),
        "rnn": Kind(restart=NEVER, dilation=NEVER, memory=context),
        "rat": Kind(restart=L, dilation=L, rope_unit=L, qk_heads=G, memory=L),
        "rat+": Kind(restart=restart, dilation=dilation, window=window, sinks=sinks, qk_heads=H),
    }


# --- 2. The recurrence ----------------------------------------------------------------------------
def scan(xs, g, bias=None, chunk=NEVER):
    """h_t = gate_t * h_{t-1} + (1 - gate_t) * x_t, gate = sigmoid(g + bias), from zero in each chunk.

    Equation (3) of RAT.
    xs     one or more x (B, T, ...) under one gate, of shapes that expand to g's: a k may serve several heads
    g      (B, T, ...); bias: of g.shape[2:], or None
    chunk  h restarts every `chunk` tokens. RAT+: never
    Returns for each x its h at every token, (B, T, ...). The sums are in float32 whatever the dtype of g and
    xs: a memory is a long product of gates close to 1.
    """
    (B, T), xs = g.shape[:2], [x.expand_as(g) for x in xs]
    if T <= chunk:
        return Recurrence.apply(g, bias, *xs)
    # Chunks are independent, so fold them into the batch.
    hs = Recurrence.apply(fold(g, chunk), bias, *(fold(x, chunk) for x in xs))
    return [unfold(h, B, T) for h in hs]


def fold(x, size):
    """(B, T, ...) to (B * pieces, size, ...): pieces of a sequence as rows of the batch, zeros at the end."""
    if x.shape[1] % size:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % size])
    return x.unflatten(1, (-1, size)).flatten(0, 1)


def unfold(x, B, T):
    """Undoes `fold`."""
    return x.unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


class Recurrence(torch.autograd.Function):
    """`scan` without restarts. Its gradient is a recurrence too, from the last token to the first.

    Let dh_t be the derivative of the loss by h_t. h_t affects the loss directly (grad_t) and through h_{t+1}:
        dh_t = grad_t + e_{t+1}        e_t = gate_t * dh_t, the derivative by h_{t-1} through h_t
    By the definition of h_t then,
        dx_t = (1 - gate_t) * dh_t     dg_t = gate_t * (1 - gate_t) * (h_{t-1} - x_t) * dh_t

    Compiled, what happens in a block is one kernel each way. It reads and writes bfloat16, keeps gates and
    sums in registers, and saves nothing for the backward pass but its inputs and outputs.
    """

    @staticmethod
    def forward(ctx, *inputs):  # not (ctx, g, bias, *xs): Dynamo would take that for 4 inputs without ctx
        g, bias, *xs = inputs
        gates, rows, out = gates_of(g, bias), [tokens_of(x) for x in xs], []
        for x, h in zip(rows, entering(rows, gates, len(g))):
            hs = []
            for x_t, gate in zip(x, gates):
                h = forget(x_t, h, gate)
                hs.append(h.to(g.dtype))
            out.append(join(hs, g))
        ctx.save_for_backward(g, bias, *xs, *out)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        g, bias, *saved = ctx.saved_tensors
        xs, hs = saved[: len(grads)], saved[len(grads) :]
        gates, rows = gates_of(g, bias)[::-1], [tokens_of(grad)[::-1] for grad in grads]
        dxs, dgs = [], [0] * len(gates)
        for x, h, grad, e in zip(xs, hs, rows, entering(rows, gates, len(g), reverse=True)):
            h, dx = tokens_of(h), []
            before = [shift(h[-1], len(g)), *h[:-1]][::-1]  # h_{t-1}
            for n, (x_t, h_t, grad_t, gate) in enumerate(zip(tokens_of(x)[::-1], before, grad, gates)):
                dh = grad_t + e
                e = gate * dh
                dx.append((dh - e).to(x.dtype))  # (1 - gate) * dh
                dgs[n] = dgs[n] + (1 - gate) * e * (h_t.to(e.dtype) - x_t)
            dxs.append(join(dx[::-1], g))
        dg = join([dg_t.to(g.dtype) for dg_t in dgs[::-1]], g)
        return dg, None if bias is None else dg.sum(dim=(0, 1), dtype=bias.dtype), *dxs


def forget(x, h, gate):
    return torch.lerp(x.to(h.dtype), h, gate)  # gate * h + (1 - gate) * x, in one pass


def gates_of(g, bias):
    return [torch.sigmoid(g_t.to(fp32(g)) + (0 if bias is None else bias)) for g_t in tokens_of(g)]


def tokens_of(x):
    """The tokens of x (B, T, ...), each (B * blocks, ...): blocks of a long sequence go side by side."""
    return fold(x, min(x.shape[1], BLOCK)).unbind(1)


def join(x, like):
    """Undoes `tokens_of`."""
    return unfold(torch.stack(x, dim=1), *like.shape[:2])


def entering(rows, gates, B, reverse=False):
    """For each of `rows` the states that enter its blocks: zero, if a sequence is one block.

    A block turns the state h that enters it into a * h + u: a is the product of its gates, u the state that
    leaves if zero enters. Two blocks in a row are one, a2 * (a1 * h + u1) + u2. As that is associative, a
    scan over blocks gives the state that leaves each, and enters the next. With `reverse` the same for the e
    of `Recurrence`, which enter from the right.
    """

    def step(x, state, gate):
        return gate * (x + state) if reverse else forget(x, state, gate)

    zero = torch.zeros_like(gates[0])
    if len(zero) == B:
        return [zero] * len(rows)
    a, us = gates[0], [step(x[0], zero, gates[0]) for x in rows]
    for t, gate in enumerate(gates[1:], start=1):
        a, us = a * gate, [step(x[t], u, gate) for x, u in zip(rows, us)]
    blocks = tuple(x.unflatten(0, (B, -1)) for x in (a, *us))
    mode = "pointwise" if zero.is_cuda else "generic"
    leaving = associative_scan(compose, blocks, dim=1, reverse=reverse, combine_mode=mode)[1:]
    return [shift(x.flatten(0, 1), B, reverse) for x in leaving]


def compose(first, second):
    (a1, *us1), (a2, *us2) = first, second
    return a2 * a1, *(torch.addcmul(u2, a2, u1) for u1, u2 in zip(us1, us2))


def shift(x, B, reverse=False):
    """What leaves a block, (B * blocks, ...), enters the next one; zero enters the first."""
    x = x.unflatten(0, (B, -1))
    x = x[:, 1:] if reverse else x[:, :-1]
    return F.pad(x, [0, 0] * (x.ndim - 2) + [1 - reverse, int(reverse)]).flatten(0, 1)


# --- 3. Attention to what is visible --------------------------------------------------------------
def rotary_table(position, D, base):
    """RoPE's cos and sin at positions (T,): (2, T, D), sin negated in its first half. base 0: none (NoPE)."""
    dtype = torch.float32 if position.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    exponent = torch.arange(D // 2, device=position.device, dtype=dtype) / (D // 2)
    angle = position[:, None] * (base**-exponent if base else 0 * exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x, rope):
    """RoPE: channels c and c + D/2 of x (B, heads, T, D), (a, b), become (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * rope[0], swapped, rope[1]).to(x.dtype)


def attend(q, k, v, rope, kind):
    """y_i = softmax over visible j of (rope(q_i) . rope(k_j) / sqrt(D)), applied to v_j.

    q (B, G, T, D), k and v (B, H, T, D), before RoPE. Returns (B, H, T, D). (RAT, appendix A.1, Listing 1)

    The mask is `visible`. To do no more work than is visible, queries take far keys, those that stay, and
    near keys: their own, or with a window all from the block on in which it begins. On CUDA flex_attention
    skips what is masked, on other devices queries go in blocks.
    """
    T, D, R = *k.shape[2:], k.shape[1] // q.shape[1]
    turned = rotate(q, rope).repeat(1, R, 1, 1)
    if kind.dilation == 1 or T <= kind.window + 1:
        return F.scaled_dot_product_attention(turned, rotate(k, rope), v, is_causal=True)
    i = torch.arange(T, device=k.device)[:, None]
    far_j, far_k, far_v = kind.staying(i)[:, 0], rotate(kind.staying(k), kind.staying(rope)), kind.staying(v)
    fused = k.is_cuda and T >= FUSED and D >= 16 and k.dtype != torch.float64 and len(far_j) + kind.window > 0
    out = []
    if kind.window == 0:
        # RoPE turns a query and its own key by one angle, so their score needs no rotation.
        score = (q.unsqueeze(1) * k.unflatten(1, (R, -1))).sum(-1, dtype=fp32(q)).flatten(1, 2) * D**-0.5
        if fused:
            options = dict(block_mask=block_mask(kind, T, k.device), return_aux=AuxRequest(lse=True))
            y, aux = fused_attention(turned, far_k, far_v, **options)
            # lse: the logarithm of the sum of exp(score) over the far keys. The own key's weight in a softmax
            # over all is exp(score) / (exp(score) + exp(lse)), which is a sigmoid.
            weight = torch.sigmoid(score - aux.lse).unsqueeze(-1)
            return torch.lerp(y, v, weight.to(y.dtype))
        blocks = zip(*(x.split(QUERIES, dim=2) for x in (turned, score, v)))
        for n, (queries, own, own_v) in enumerate(blocks):
            far = kind.count(min((n + 1) * QUERIES, T))
            mask = torch.where(far_j[:far] < i[n * QUERIES : (n + 1) * QUERIES], 0.0, -math.inf).to(q.dtype)
            queries, keys = queries.flatten(0, 1), far_k[:, :, :far].flatten(0, 1)
            scores = torch.baddbmm(mask, queries, keys.mT, alpha=D**-0.5)  # and masked, in one pass
            scores = torch.cat([own.unsqueeze(-1), scores.unflatten(0, own.shape[:2])], dim=-1)
            weight, weights = scores.softmax(-1).to(v.dtype).tensor_split([1], dim=-1)
            out.append(torch.addcmul(weights @ far_v[:, :, :far], weight, own_v))
        return torch.cat(out, dim=2)
    near_k = rotate(k, rope)
    if fused:
        keys, values = torch.cat([far_k, near_k], dim=2), torch.cat([far_v, v], dim=2)
        return fused_attention(turned, keys, values, block_mask=block_mask(kind, T, k.device))
    near_k, near_v, near_j = near_k.split(QUERIES, dim=2), v.split(QUERIES, dim=2), i[:, 0].split(QUERIES)
    for n, queries in enumerate(turned.split(QUERIES, dim=2)):
        first = max(0, n * QUERIES - kind.window) // QUERIES
        far, near = kind.count(first * QUERIES), slice(first, n + 1)
        keys = torch.cat([far_k[:, :, :far], *near_k[near]], dim=2)
        values = torch.cat([far_v[:, :, :far], *near_v[near]], dim=2)
        visible = kind.visible(i[n * QUERIES : (n + 1) * QUERIES], torch.cat([far_j[:far], *near_j[near]]))
        out.append(F.scaled_dot_product_attention(queries, keys, values, visible))
    return torch.cat(out, dim=2)


# --- 4. The layer ---------------------------------------------------------------------------------
class Mixer(nn.Module):
    """One token mixer of any kind: x (B, T, d) to (B, T, d). `layer` chooses the kind, by config.layers."""

    def __init__(self, config, layer=0):
        super().__init__()
        d, H = config.d_model, config.n_head
        self.kind, self.D = config.kind(layer), d // H
        self.R, qk = H // (self.kind.qk_heads or H), self.kind.qk_heads * self.D
        self.sizes = [d * self.kind.output_gate, d, d * (self.kind.restart > 0), qk, qk]  # z, v, g, q, k
        self.in_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        if self.kind.memory:
            # Chrono initialization (Tallec and Ollivier 2018, arXiv 1804.11188): the gate g = sigmoid(log u)
            # remembers about 1 / (1 - g) = 1 + u tokens, here 2 to `memory`.
            self.forget_bias = nn.Parameter(torch.empty(d).uniform_(1, max(1, self.kind.memory - 1)).log_())

    def forward(self, x, cache=None, tables=None):
        """x (B, T, d), with a cache the tokens after those in it: a prompt, or one. Returns (B, T, d).

        tables  of `tables`, the same for all layers of a kind: a model makes them once, and the cache `take`
        """
        expect(x.numel() > 0, f"x is {tuple(x.shape)}: a layer takes one token or more")
        if tables is None:
            T, start = x.shape[1], cache.take(x.shape[1]) if cache else 0
            expect(start == 0 or T == 1, "after a prompt, a layer takes tokens one by one")
            tables = self.tables(torch.arange(start, start + T, device=x.device), cache)
        rope, step = tables
        z, v, g, q, k = self.in_proj(x).split(self.sizes, dim=-1)
        if self.kind.restart:
            g = g.unflatten(-1, (self.R, -1))  # (B, T, R, G * D): each of a k's R heads has its own gate
            bias = self.forget_bias.view(self.R, -1) if self.kind.memory else None
            xs = [v.unflatten(-1, (self.R, -1)), k.unsqueeze(2)][: 2 if self.kind.qk_heads else 1]
            hs = cache.remember(xs, g, bias, step) if step else scan(xs, g, bias, self.kind.restart)
            if cache and not step:
                cache.state.copy_(torch.stack([h[:, -1] for h in hs]))
            v, k = hs[0].flatten(2), hs[-1].flatten(2)
        if self.kind.qk_heads:
            q, k, v = (x.unflatten(-1, (-1, self.D)).transpose(1, 2) for x in (q, k, v))  # (B, G or H, T, D)
            y = cache.attend(q, k, v, rope, step) if cache else attend(q, k, v, rope, self.kind)
            y = y.transpose(1, 2)
        else:
            y = v  # an RNN sees its own token alone
        if self.kind.output_gate:
            y = torch.sigmoid(z).view(y.shape) * y
        return self.out_proj(y.reshape(x.shape))

    def tables(self, position, cache=None):
        """What depends on positions (T,) alone: the rotary table, (2, T, D), and for one token its `Step`."""
        rope = rotary_table(position // self.kind.rope_unit, self.D, self.kind.rope_base)
        step = cache.step(position) if cache and len(position) == 1 else None
        return rope.to(fp32(self.in_proj.weight)), step


def fp32(x):
    """The dtype in which sums over x are taken: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class Block(nn.Module):
    """Token mixer and MLP, each on a normalized input and added to its residual."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.d_model
        self.mixer_norm, self.mixer = nn.RMSNorm(d, eps=1e-6), Mixer(config, layer)
        self.mlp_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, x, cache=None, tables=None):
        x = x + self.mixer(self.mixer_norm(x), cache, tables)
        return x + self.mlp(self.mlp_norm(x))


# --- 5. The language model ------------------------------------------------------------------------
class BadInput(ValueError):
    """A mistake that the caller can mend: one clear line with the value, what was expected, what to do."""


def expect(condition, message):
    if not condition:
        raise BadInput(message)


MOST_LAYERS = 1000


@dataclass
class Config:
    """Sizes and settings of a model. Raises ValueError for those that do not fit together."""

    vocab_size: int = 257  # number of different tokens
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # heads per layer
    d_model: int = 128  # width of the model
    context: int = 256  # tokens in a training window; generation may go beyond
    layers: str = "rat"  # attention, swa, rnn, rat, rat+, or several, such as rat,swa: tiled over the depth
    chunk_size: int = 16  # rat: tokens per chunk
    dilation: str | int | None = None  # rat+: keep every N-th token visible; 1: all, none: no such token (1)
    window: str | int | None = None  # swa, rat+: number of preceding tokens a token sees (swa 1024, rat+ 0)
    sinks: str | int | None = None  # rat+: number of first tokens that stay visible (0)
    qk_groups: int | None = None  # rat: query and key heads, each shared by n_head / qk_groups heads (2)
    recurrence: bool | None = None  # rat+: false leaves attention with an output gate (true)
    rope_base: str | float = 10000  # base of the rotary position embedding, or a list; 0: none (NoPE)

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "context", "chunk_size"):
            value = getattr(self, name)
            most = MOST_LAYERS if name == "n_layer" else 1 << 40
            fits = isinstance(value, int) and 0 < value <= most
            expect(fits, f"{name} is {value!r}: it must be a whole number from 1 to {most}")
        d, H = self.d_model, self.n_head
        expect(d % (2 * H) == 0, f"d_model {d} must be a multiple of 2 * n_head, {2 * H}: RoPE turns pairs")
        G = self.qk_groups = math.gcd(H, 2) if self.qk_groups is None else self.qk_groups
        expect(G > 0 and H % G == 0, f"n_head {H} is not divisible by qk_groups {G}: change one of them")
        lists = (self.layers, self.dilation, self.window, self.sinks, self.rope_base)
        layers = range(max(self.n_layer, *(str(values).count(",") + 1 for values in lists)))
        expect(len(layers) <= MOST_LAYERS, f"a list has {len(layers)} layers: it may have {MOST_LAYERS}")
        names = {self.of_layer("layers", layer) for layer in layers}
        for setting in ("chunk_size", "dilation", "window", "sinks", "recurrence"):
            users = {"chunk_size": ["rat"], "window": ["rat+", "swa"]}.get(setting, ["rat+"])
            used = getattr(self, setting) == getattr(Config, setting) or names & set(users)
            expect(used, f"{setting} is for {', '.join(users)}, but layers is {self.layers!r}: leave it out")
        for layer in layers:
            self.kind(layer)
        self.rope_base = ",".join(f"{float(base):.15g}" for base in str(self.rope_base).split(","))

    def of_layer(self, setting, layer):
        """One layer's value of a setting that may be a list, tiled over the depth: "rat,swa" or "1,64"."""
        values = str(getattr(self, setting)).split(",")
        return values[layer % len(values)].strip()

    def kind(self, layer):
        """The Kind of layer number `layer`."""
        name = self.of_layer("layers", layer)
        numbers = dict(dilation=1, window=1024 if name == "swa" else 0, sinks=0)
        for setting, default in numbers.items():
            text, least = self.of_layer(setting, layer), int(setting == "dilation")
            if getattr(self, setting) is None:
                text = str(default)
            if setting == "dilation" and text == "none":
                text = str(NEVER)
            fits = text.isdecimal() and least <= int(text) <= NEVER
            numbers_from = f"a whole number from {least} on{', or none' * least}"
            expect(fits, f"{setting} is {text!r}: it must be {numbers_from}")
            numbers[setting] = int(text)
        table = kinds(self, **numbers)
        expect(name in table, f"there is no layer {name!r}: layers is a list of {', '.join(table)}")
        try:
            base = float(text := self.of_layer("rope_base", layer))
        except ValueError:
            base = math.nan
        expect(0 <= base < math.inf, f"rope_base is {text}: it must be a positive number, or 0 for none")
        return replace(table[name], rope_base=base)


class RAT(nn.Module):
    """A decoder-only language model of the layers that config.layers names, with tied embeddings.

    tokenizer: its name, for those who want text.
    """

    LOSS_CHUNK = 4096  # tokens whose logits exist at one time: 0.8 GB of them for a vocabulary of 50304

    def __init__(self, config, tokenizer=""):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        padded = -(-config.vocab_size // 64) * 64  # matrix units like multiples of 64; `head` drops the rest
        self.embedding = nn.Embedding(padded, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) int64; targets (B, T), -100 for none; cache from `self.cache`: what came before.

        Returns (logits (B, T, vocab_size), None), or with targets (None, mean cross-entropy in nats).
        """
        x = self.features(tokens, cache)
        return (self.head(x), None) if targets is None else (None, self.loss(x, targets))

    def features(self, tokens, cache=None):
        """The input of the output embedding, (B, T, d)."""
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere this forces a sync
            self.check(tokens)
        T = tokens.shape[1]
        start = [layer.take(T) for layer in cache][0] if cache else 0
        position = torch.arange(start, start + T, device=tokens.device)
        if start == 0:
            return self.run(tokens, position, cache)
        one_by_one = zip(tokens.split(1, dim=1), position.split(1))
        return torch.cat([self.step(*token, cache) for token in one_by_one], dim=1)

    def run(self, tokens, position, cache=None):
        """`features` of tokens at known positions (T,)."""
        x, tables = self.embedding(tokens), {}
        for block, layer in zip(self.blocks, cache or [None] * len(self.blocks)):
            kind = (layer or block.mixer).kind
            if kind not in tables:
                tables[kind] = block.mixer.tables(position, layer)
            x = block(x, layer, tables[kind])
        return self.norm(x)

    step = run  # for one token after a prompt: its shapes are fixed, so that it compiles to one graph

    def check(self, tokens):
        expect(tokens.ndim == 2 and tokens.numel(), f"tokens are {tuple(tokens.shape)}: give (batch, tokens)")
        low, high = (int(end) for end in tokens.aminmax())
        wrong, size = low if low < 0 else high, self.config.vocab_size
        expect(0 <= wrong < size, f"token {wrong} is not in the vocabulary, 0 to {size - 1}")

    def head(self, x):
        """Logits, (..., vocab_size), of features x (..., d)."""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    def loss(self, x, targets):
        """Mean cross-entropy over targets other than -100. The backward pass recomputes a chunk's logits."""
        x, targets = x.flatten(0, 1), targets.flatten()
        chunks = zip(x.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK))
        total = sum(checkpoint(self.nats, *chunk, use_reentrant=False) for chunk in chunks)
        return total / (targets != -100).sum().clamp(min=1)

    def nats(self, x, targets):
        """The cross-entropy of features x (n, d), summed. A function of its own for train.py to compile."""
        return F.cross_entropy(self.head(x).to(fp32(x)), targets, reduction="sum", ignore_index=-100)

    def use(self, **changes):
        """Switches to another `dilation`, `window`, `sinks` or `context`, given as in Config."""
        for name, value in changes.items():
            now, free = getattr(self.config, name, None), name in ("dilation", "window", "sinks", "context")
            expect(free or value == now, f"{name} is {value}: this model has {now}, its weights depend on it")
        self.config = replace(self.config, **changes)
        for layer, block in enumerate(self.blocks):
            block.mixer.kind = self.config.kind(layer)

    def cache(self, batch, max_tokens):
        """One empty Cache per layer, with room for `batch` sequences of `max_tokens` tokens."""
        device = self.embedding.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return [Cache(block.mixer, batch, max_tokens, dtype) for block in self.blocks]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop=-1):
        """Continues prompts of one length, tokens (B, T), and yields each next token, (B,) int64, when drawn.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the likeliest ones whose
        probabilities first reach p. The same seed gives the same text. A sequence that drew `stop` (-1: none)
        repeats it; once all have, generation ends.
        """
        self.check(tokens)
        fits = 0 < max_new_tokens < 1 << 62
        expect(fits, f"max_new_tokens is {max_new_tokens}: it must be from 1 to 2**62 - 1")
        expect(temperature >= 0, f"temperature is {temperature}: it must be 0 or above")
        expect(top_k is None or top_k >= 1, f"top_k is {top_k}: it must be 1 or more")
        expect(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}: it must be above 0, and at most 1")
        (B, T), device = tokens.shape, tokens.device
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        room = max(256, 1 << (T + max_new_tokens - 1).bit_length())  # few sizes, each a graph of `step`
        cache, stopped = self.cache(B, room), torch.zeros(B, dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits = self.head(self.features(tokens, cache)[:, -1]).float()
            tokens = sample(logits, temperature, top_k, top_p, generator).masked_fill(stopped, stop)
            stopped = tokens == stop
            yield tokens
            if stop >= 0 and stopped.all():
                return
            tokens = tokens[:, None]

    def save(self, path, **more):
        """Writes config, tokenizer's name, weights and `more` to one file, atomically."""
        contents = {"config": asdict(self.config), "tokenizer": self.tokenizer, "model": self.state_dict()}
        with atomic(path) as partial, open(partial, "wb") as file:
            torch.save(contents | more, file)

    @classmethod
    def load(cls, path, device="cpu", **changes):
        """The model that `save` wrote, on `device`, changed as by `use`. ValueError for any other file."""
        return cls.of(read_checkpoint(path), path, device, **changes)

    @classmethod
    def of(cls, saved, path, device="cpu", **changes):
        """The same from what `read_checkpoint` has returned for the path."""
        with damage_reported(path):
            config, weights = Config(**saved["config"]), saved["model"]
            expect(config.n_layer <= len(weights), f"{len(weights)} tensors for {config.n_layer} layers")
            with torch.device("meta"):
                model = cls(config, "" + saved["tokenizer"])  # TypeError if it is no name
            model.load_state_dict(weights, assign=True)
        model.use(**changes)
        return model.to(device)


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path for a file or folder. If all goes well, it is flushed and renamed to `path`.

    Each call has a temporary folder of its own beside `path`, so processes never collide. It is removed in
    any case, unless the process is killed.
    """
    target = Path(os.path.realpath(path))
    try:
        fits = target.is_file() or not target.exists()
        expect(fits, f"{path} exists and is not a regular file: choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", f"{target.name}.", target.parent) as folder:
            partial = Path(folder, target.name)
            yield partial
            for name in filter(Path.is_file, [partial, *partial.rglob("*")]):
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__:  # torch hides the disk's error behind its own
            cause = cause.__context__
        if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"cannot write {path}: {cause}; what was there before is untouched") from error


def read_checkpoint(path):
    """The dict in a checkpoint file. Verifies all contents and never runs code; tensors load when used."""
    expect(os.path.isfile(path), f"there is no checkpoint {path}: `python train.py` writes out/ckpt.pt")
    with damage_reported(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch writes these checksums, but never reads them
        expect(damaged is None, f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def damage_reported(path):
    """Turns whatever a damaged or foreign file may raise into one clear line."""
    try:
        yield
    except Exception as error:
        lacks = "it lacks " * isinstance(error, KeyError)
        reason = lacks + " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{path} is not a checkpoint of train.py, or damaged: {reason}") from error


def sample(logits, temperature, top_k, top_p, generator):
    """Draws one token from each row of logits (B, vocab_size): (B,) int64. See RAT.generate."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        p, index = logits.softmax(-1).sort(descending=True)
        enough = p.cumsum(-1) - p >= top_p  # the likelier ones reach top_p already
        logits = logits.masked_fill(enough.gather(-1, index.argsort(-1)), -math.inf)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)  # a draw; unlike multinomial, it never waits for the GPU


# --- 6. What decoding remembers -------------------------------------------------------------------
class Step(NamedTuple):
    """What the layers of a kind do with one more token."""

    slots: torch.Tensor  # (2,), where its key goes: one slot of the ring, and one behind it, or the same
    seen: torch.Tensor  # (slots,), those that its query sees
    goes_on: torch.Tensor  # (1,), whether the recurrence goes on from the state, or restarts


class Cache:
    """What one layer keeps: the keys and values that a later query can see, and the recurrence's state.

    Slots 0 .. window are a ring: token t takes slot t % (window + 1) from token t - window - 1. A token that
    stays takes the next slot behind the ring, too, which is read once it has left the ring. So there is room
    for what one query sees and no more, and nothing ever moves. (RAT, appendix A.1, Listing 2)

    length  tokens so far
    keys, values  (B, H, slots, D), after RoPE        state  v~ and k~, or v~ (2 or 1, B, R, G * D), float32
    """

    def __init__(self, mixer, batch, max_tokens, dtype=None):
        self.kind, self.length, self.ring = mixer.kind, 0, mixer.kind.window + 1
        weight, H = mixer.in_proj.weight, mixer.R * self.kind.qk_heads
        shape = (batch, H, self.used(max_tokens) if H else 0, mixer.D)
        self.keys, self.values = torch.zeros(2, *shape, dtype=dtype or weight.dtype, device=weight.device)
        shape = (2 if H else 1, batch, mixer.R, mixer.out_proj.in_features // mixer.R)
        self.state = torch.zeros(shape if self.kind.restart else 0, dtype=fp32(weight), device=weight.device)

    def used(self, tokens):
        """Number of slots that the last of so many tokens sees."""
        return min(tokens, self.ring) + self.kind.count(max(0, tokens - self.ring))

    def take(self, T):
        """Counts T more tokens, which the layer is about to take in. Returns how many came before."""
        expect(not torch.is_grad_enabled(), "a cache has no gradients: call the model under torch.no_grad()")
        start, end = self.length, self.length + T
        fits = not self.keys.shape[1] or self.used(end) <= self.keys.shape[2]
        expect(fits, f"no room in the cache for token {end}: make it with a larger max_tokens")
        self.length = end
        return start

    def nbytes(self):
        return sum(tensor.nbytes for tensor in (self.keys, self.values, self.state))

    def step(self, t):
        """The `Step` of the token at position t, a tensor (1,): the same operations for every t."""
        slots = torch.arange(self.keys.shape[2], device=t.device)
        ring, staying = slots[: self.ring], self.kind.position(slots[: max(0, len(slots) - self.ring)])
        ring = t - (t - ring) % self.ring  # the last token up to t that takes this slot
        behind = torch.where((staying == t).any(), self.ring + (staying < t).sum(), t % self.ring)
        seen = torch.cat([ring >= 0, staying < t - self.kind.window])
        return Step(torch.cat([t % self.ring, behind]), seen, t % (self.kind.restart or 1) > 0)

    def remember(self, xs, g, bias, step):
        """`scan` for one more token. The state stays in float32."""
        (gate,) = gates_of(g, bias)
        xs = (x[:, 0].expand_as(gate) for x in xs)
        self.state.copy_(torch.stack([forget(x, h * step.goes_on, gate) for x, h in zip(xs, self.state)]))
        return [h.unsqueeze(1).to(g.dtype) for h in self.state]

    def attend(self, q, k, v, rope, step):
        """`attend` for a prompt, or with a Step for one more token, which then are in the cache."""
        T, k_turned = k.shape[2], rotate(k, rope).to(self.keys.dtype)
        if step:
            self.keys[:, :, step.slots], self.values[:, :, step.slots] = k_turned, v.to(self.keys.dtype)
            q = rotate(q, rope).repeat(1, k.shape[1] // q.shape[1], 1, 1)
            with sdpa_kernel(ONE_QUERY):
                return F.scaled_dot_product_attention(q, self.keys, self.values, step.seen.expand(1, -1))
        recent = torch.arange(max(0, T - self.ring), T, device=k.device)
        for slots, x in (self.keys, k_turned), (self.values, v.to(self.keys.dtype)):
            slots[:, :, recent % self.ring] = x[:, :, recent]
            behind = slots[:, :, self.ring : self.ring + self.kind.count(T)]
            behind.copy_(self.kind.staying(x)[:, :, : behind.shape[2]])
        return attend(q, k, v, rope, self.kind)


# --- 7. What makes it fast ------------------------------------------------------------------------
BLOCK = 16  # tokens in a block of the recurrence: on a CPU 16 to 64 are alike; a GPU has registers for 16
QUERIES = 256  # queries in a block: the best of 64 to 1024 for windows of 0 and 1024, or near it
FUSED = 2048  # tokens from which on flex_attention is worth the wait for Triton (CUDA, not measured)
# For one query not cuDNN's attention, which plans anew for each shape.
ONE_QUERY = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
fused_attention = flex_attention
if torch.cuda.is_available():  # elsewhere nobody pays for importing the compiler, 3 seconds
    import torch._inductor.config

    fused_attention = torch.compile(flex_attention)  # uncompiled, it would store all scores
    # A chunk's backward loop is one kernel of some 80 operations, which Inductor's limit of 64 would cut.
    torch._inductor.config.max_fusion_size = 128


def block_mask(kind, T, device, size=128):
    """flex_attention's mask for the keys that stay, and with a window all keys after them; each is seen once.

    Made of blocks of `size` queries and keys: create_block_mask would visit all T x T scores.
    """
    i = torch.arange(T, device=device)
    staying = kind.staying(i[:, None])[:, 0]
    j, n = torch.cat([staying, i]) if kind.window else staying, len(staying)
    stays, window = torch.arange(len(j), device=device) < n, torch.full((), kind.window, device=device)

    def visible(b, h, i, key):
        return (j[key] <= i) & ((i - j[key] > window) == stays[key])

    first, key = i[::size, None], torch.arange(0, len(j), size, device=device)  # of each block
    last, last_key = (first + size - 1).clamp(max=T - 1), (key + size - 1).clamp(max=len(j) - 1)
    seen = (key < n) & (j[key] < last - kind.window)
    if kind.window:
        seen |= (last_key >= n) & (j[last_key] >= first - kind.window) & (j[key.clamp(min=n)] <= last)
    order = seen.int().argsort(dim=1, descending=True, stable=True)
    count = seen.sum(dim=1)
    blocks = count[None, None].int(), order[None, None].int()
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(T, len(j)))


# --- 8. The lesson --------------------------------------------------------------------------------
def lesson(T=12):
    """What each kind of layer sees, drawn from `Kind.visible`."""
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    visible, summed, unseen = "●○·" if utf8 else "*o."
    print(f"Rows: queries; columns: keys.  {visible} visible  {summed} part of a visible one  {unseen} not")
    sparse = dict(dilation=4, window=2, sinks=1)
    for three in (
        {"attention": {}, "swa, W = 3": dict(window=3), "rnn": {}},
        {"rat, L = 4": dict(chunk_size=4), "rat+": {}, "rat+, D = 4, W = 2, S = 1": sparse},
    ):
        print("\n" + "    ".join(f"{title:<{2 * T - 1}}" for title in three))
        kinds = [Config(layers=title.split(",")[0], **settings).kind(0) for title, settings in three.items()]
        for i in range(T):
            pictures = []
            for kind in kinds:
                seen = [j for j in range(T) if kind.visible(i, j)]
                sums = {t for j in seen for t in range(j - j % (kind.restart or 1), j)}
                marks = (visible if j in seen else summed if j in sums else unseen for j in range(T))
                pictures.append(" ".join(marks))
            print("    ".join(pictures))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `python rat.py | head -3`
    lesson()
