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

import math
import os
import sys
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

NEVER = 1 << 62  # a period so long that it never comes round: no dilation at all, or no restart


# --- 1. Kinds of layer, and what each one sees ----------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """What tells one kind of layer from another."""

    restart: int = 0  # period of the recurrence's restarts; 0: no recurrence, plain keys and values
    dilation: int = 1  # tokens dilation - 1, 2 * dilation - 1, ... stay visible to all later queries
    window: int = 0  # number of preceding tokens each query sees
    sinks: int = 0  # number of first tokens that stay visible
    rope_unit: int = 1  # RoPE's position is t // rope_unit: it counts tokens, or chunks
    qk_heads: int = 0  # heads of q and k; 0: none, y = v~
    memory: int = 0  # longest memory at initialization, in tokens; 0: no forget bias (RAT+ has none)
    output_gate: bool = True

    def visible(self, i, j):
        """Does the query at position i see the key at position j? All else follows from this."""
        return (j <= i) & ((i - j <= self.window) | self.stays(j))

    def stays(self, j):
        """Is token j visible to every later query, however far away?"""
        return ((j + 1) % self.dilation == 0) | (j < self.sinks)

    def count(self, n):
        """How many positions below n stay."""
        sinks = min(n, self.sinks)
        return sinks + n // self.dilation - sinks // self.dilation

    def staying(self, n, device="cpu"):
        """The positions below n that stay, ascending."""
        m = torch.arange(self.count(n), device=device)
        dilated = m - self.sinks + self.sinks // self.dilation
        return torch.where(m < self.sinks, m, (dilated + 1) * self.dilation - 1)


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
def scan(x, gate, state=None, start=0, chunk=NEVER):
    """h_t = gate_t * h_{t-1} + (1 - gate_t) * x_t, from zero in each chunk. (RAT, Eq. (3))

    x      (B, T, ...) inputs, of a shape that expands to gate's: one k may serve several gates
    gate   (B, T, ...) in [0, 1], of x's dtype
    state  (B, ...) h before the first token; None: zero
    start  position of the first token; h restarts at every later multiple of `chunk`. RAT+: never
    Returns h at every token, (B, T, ...).
    """
    (B, T), x = gate.shape[:2], x.expand_as(gate)
    head = chunk - start % chunk  # tokens before the next restart
    if T <= head:
        return Recurrence.apply(x, gate, state)
    if start % chunk or state is not None:
        first = Recurrence.apply(x[:, :head], gate[:, :head], state)
        return torch.cat([first, scan(x[:, head:], gate[:, head:], chunk=chunk)], dim=1)
    # Chunks are independent, so fold them into the batch.
    h = Recurrence.apply(fold(x, chunk), fold(gate, chunk), None)
    return h.unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


def fold(x, size):
    """(B, T, ...) to (B * pieces, size, ...): pieces of a sequence as rows of the batch, zeros at the end."""
    if x.shape[1] % size:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, -x.shape[1] % size])
    return x.unflatten(1, (-1, size)).flatten(0, 1)


class Recurrence(torch.autograd.Function):
    """`scan` without restarts. Its gradient is a recurrence too, from the last token to the first.

    Let dh_t be the derivative of the loss by h_t. h_t affects the loss directly (grad_t) and through h_{t+1}:
        dh_t = grad_t + gate_{t+1} * dh_{t+1}
    By the definition of h_t then, dx_t = (1 - gate_t) * dh_t and dgate_t = (h_{t-1} - x_t) * dh_t.
    """

    @staticmethod
    def forward(ctx, x, gate, state):
        state = torch.zeros_like(gate[:, 0]) if state is None else state
        h = recur(torch.lerp, x, gate, state)  # lerp(x, h, g) is g * h + (1 - g) * x, in one pass over memory
        ctx.save_for_backward(x, gate, state, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        x, gate, state, h = ctx.saved_tensors
        dh = recur(torch.addcmul, grad, gate, torch.zeros_like(state), reverse=True)
        before = torch.cat([state[:, None], h[:, :-1]], dim=1)
        dstate = gate[:, 0] * dh[:, 0] if ctx.needs_input_grad[2] else None
        return torch.addcmul(dh, dh, gate, value=-1), (before - x) * dh, dstate


def recur(step, x, gate, h, reverse=False):
    """h_t = step(x_t, h_{t-1}, gate_t), token by token; reversed, step(x_t, h_{t+1}, gate_{t+1}), last first.

    step is torch.lerp or torch.addcmul, h (B, ...) the state to start from. Returns all h_t, (B, T, ...).
    """
    if x.shape[1] > BLOCK:
        return recur_in_blocks(step, x, gate, h, reverse)
    out, compiling = torch.empty_like(gate), torch.compiler.is_compiling()
    inputs, gates = x.unbind(1), gate.unbind(1)
    outputs = [None] * len(gates) if compiling else out.unbind(1)  # compiled, a write to a slice copies all
    if reverse:
        inputs, outputs = inputs[::-1], outputs[::-1]
        gates = gates[:1] + gates[:0:-1]  # shifted by one: the first meets a state of zero, so any will do
    states = []
    for x_t, gate_t, out_t in zip(inputs, gates, outputs):
        h = step(x_t, h, gate_t, out=out_t)
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, dim=1) if compiling else out


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

    The mask is `visible`. To do no more work than is visible, a block of queries takes far keys, those that
    stay, up to the block in which its window begins, and near keys, which are all from there on.
    """
    (B, H, T, D), R, own = k.shape, k.shape[1] // q.shape[1], kind.window == 0
    turned = rotate(q, rope).repeat(1, R, 1, 1)
    if kind.dilation == 1 or T <= kind.window + 1:
        return F.scaled_dot_product_attention(turned, rotate(k, rope), v, is_causal=True)
    i, staying = torch.arange(T, device=k.device), kind.staying(T, k.device)
    far_k, far_v = rotate(k[:, :, staying], rope[:, staying]), v[:, :, staying]
    if k.is_cuda and T >= FUSED and D >= 16 and k.dtype != torch.float64:
        keys, values = torch.cat([far_k, rotate(k, rope)], dim=2), torch.cat([far_v, v], dim=2)
        return torch.compile(flex_attention)(turned, keys, values, block_mask=block_mask(kind, T, k.device))
    if own:
        # Of the near keys only a query's own would be of use. So one more channel makes it a far key, one
        # slot for all queries: q has its score with its own key there, the slot a 1, the keys that stay a 0.
        # RoPE turns a query and its own key alike, which cancels in their score. The slot's position is -1,
        # which `visible` lets everyone see.
        score = (q.unsqueeze(1) * k.unflatten(1, (R, -1))).sum(-1).flatten(1, 2).unsqueeze(-1)
        turned = F.pad(torch.cat([turned, score], dim=-1), [0, 7])  # 8 more channels: aligned
        slot = (torch.arange(D + 8, device=k.device) == D).to(k.dtype).expand(B, H, 1, -1)
        far_k, far_v = (torch.cat([slot, F.pad(x, [0, 8])], dim=2) for x in (far_k, far_v))
        staying, near = F.pad(staying, [1, 0], value=-1), ((), (), ())
    else:
        near = rotate(k, rope).split(QUERIES, dim=2), v.split(QUERIES, dim=2), i.split(QUERIES)
    out = []
    for n, queries in enumerate(turned.split(QUERIES, dim=2)):
        i_n = i[n * QUERIES : (n + 1) * QUERIES, None]
        first = n + 1 if own else max(0, n * QUERIES - kind.window) // QUERIES
        far = own + kind.count(min(first * QUERIES, T))
        near_k, near_v, near_j = (blocks[first : n + 1] for blocks in near)
        keys, values, j = far_k[:, :, :far], far_v[:, :, :far], torch.cat([staying[:far], *near_j])
        if not own:
            keys, values = torch.cat([keys, *near_k], dim=2), torch.cat([values, *near_v], dim=2)
        visible = kind.visible(i_n, j) & (j != i_n) if own else kind.visible(i_n, j)
        out.append(F.scaled_dot_product_attention(queries, keys, values, visible, scale=D**-0.5))
    y = torch.cat(out, dim=2)
    return torch.addcmul(y[..., :D], y[..., D : D + 1], v) if own else y  # the channel: the slot's weight


# --- 4. The layer ---------------------------------------------------------------------------------
class Mixer(nn.Module):
    """One token mixer of any kind: x (B, T, d) to (B, T, d). `layer` chooses the kind, by config.layers."""

    def __init__(self, config, layer=0):
        super().__init__()
        d, H = config.d_model, config.n_head
        self.kind, self.rope_base, self.D = config.kind(layer), config.rope_base, d // H
        self.R, qk = H // (self.kind.qk_heads or H), self.kind.qk_heads * self.D
        self.sizes = [d * self.kind.output_gate, d, d * (self.kind.restart > 0), qk, qk]  # z, v, g, q, k
        self.in_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        if self.kind.memory:
            # Chrono initialization (Tallec and Ollivier 2018, arXiv 1804.11188): the gate g = sigmoid(log u)
            # remembers about 1 / (1 - g) = 1 + u tokens, here 2 to `memory`.
            self.forget_bias = nn.Parameter(torch.empty(d).uniform_(1, max(1, self.kind.memory - 1)).log_())

    def forward(self, x, cache=None, rope=None):
        """x (B, T, d), with a cache the tokens after those in it; rope: `rope_table`'s. Returns (B, T, d)."""
        if cache:
            cache.check(x.shape[1])
        rope = self.rope_table(x.shape[1], cache.length if cache else 0) if rope is None else rope
        z, v, g, q, k = self.in_proj(x).split(self.sizes, dim=-1)
        if self.kind.restart:
            # In float32 whatever the autocast dtype: a memory is a long product of gates close to 1.
            g = torch.sigmoid(g.to(fp32(g)) + (self.forget_bias if self.kind.memory else 0))
            g = g.unflatten(-1, (self.R, -1))  # (B, T, R, G * D): each of a k's R heads has its own gate
            v = self.remember("v", v.unflatten(-1, (self.R, -1)), g, cache)
            k = self.remember("k", k.unsqueeze(2), g, cache) if self.kind.qk_heads else k
        if self.kind.qk_heads:
            q, k, v = (x.unflatten(-1, (-1, self.D)).transpose(1, 2) for x in (q, k, v))  # (B, G or H, T, D)
            y = cache.attend(q, k, v, rope) if cache else attend(q, k, v, rope, self.kind)
            y = y.transpose(1, 2).flatten(2)
        else:
            y = v  # an RNN sees its own token alone
        if cache:
            cache.length += x.shape[1]
        return self.out_proj(torch.sigmoid(z) * y if self.kind.output_gate else y)

    def remember(self, name, x, g, cache):
        """k to k~ or v to v~: (B, T, 1 or R, G * D) to (B, T, d)."""
        start, chunk = cache.length if cache else 0, self.kind.restart
        state = cache.state[name] if start % chunk else None
        h = scan(x.to(g.dtype), g, state, start, chunk)
        if cache:
            cache.state[name].copy_(h[:, -1])
        return h.flatten(2).to(x.dtype)

    def rope_table(self, T, start=0):
        """The rotary table of T tokens from `start` on, (2, T, D): a model's layers of a kind share it."""
        weight = self.in_proj.weight
        position = torch.arange(start, start + T, device=weight.device) // self.kind.rope_unit
        return rotary_table(position, self.D, self.rope_base).to(fp32(weight))


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

    def forward(self, x, cache=None, rope=None):
        x = x + self.mixer(self.mixer_norm(x), cache, rope)
        return x + self.mlp(self.mlp_norm(x))


# --- 5. The language model ------------------------------------------------------------------------
class BadInput(ValueError):
    """A mistake that the caller can mend: one clear line with the value, what was expected, what to do."""


def expect(condition, message):
    if not condition:
        raise BadInput(message)


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
    rope_base: float = 10000.0  # base of the rotary position embedding; 0: no position embedding (NoPE)

    def __post_init__(self):
        for name in ("vocab_size", "n_layer", "n_head", "d_model", "context", "chunk_size"):
            value = getattr(self, name)
            most = 10_000 if name == "n_layer" else 1 << 40
            fits = isinstance(value, int) and 0 < value <= most
            expect(fits, f"{name} is {value!r}: it must be a whole number from 1 to {most}")
        d, H, base = self.d_model, self.n_head, self.rope_base
        expect(d % (2 * H) == 0, f"d_model {d} must be a multiple of 2 * n_head, {2 * H}: RoPE turns pairs")
        expect(0 <= base < math.inf, f"rope_base is {base}: it must be positive and finite, or 0 for none")
        G = self.qk_groups = math.gcd(H, 2) if self.qk_groups is None else self.qk_groups
        expect(G > 0 and H % G == 0, f"n_head {H} is not divisible by qk_groups {G}: change one of them")
        lists = (self.layers, self.dilation, self.window, self.sinks)
        layers = range(max(self.n_layer, *(str(values).count(",") + 1 for values in lists)))
        names = {self.of_layer("layers", layer) for layer in layers}
        for setting in ("chunk_size", "dilation", "window", "sinks", "recurrence"):
            users = {"chunk_size": ["rat"], "window": ["rat+", "swa"]}.get(setting, ["rat+"])
            used = getattr(self, setting) == getattr(Config, setting) or names & set(users)
            expect(used, f"{setting} is for {', '.join(users)}, but layers is {self.layers!r}: leave it out")
        for layer in layers:
            self.kind(layer)

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
        return table[name]


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
        x, start = self.embedding(tokens), cache[0].length if cache else 0
        mixers = {block.mixer.kind: block.mixer for block in self.blocks}  # one of each kind
        ropes = {kind: mixer.rope_table(tokens.shape[1], start) for kind, mixer in mixers.items()}
        for layer, block in enumerate(self.blocks):
            call = block.forward if start else block  # uncompiled: it would recompile as the cache grows
            x = call(x, cache and cache[layer], ropes[block.mixer.kind])
        return self.norm(x)

    def check(self, tokens):
        low, high = (int(end) for end in tokens.aminmax()) if tokens.numel() else (0, 0)
        wrong, size = low if low < 0 else high, self.config.vocab_size
        expect(0 <= wrong < size, f"token {wrong} is not in the vocabulary, 0 to {size - 1}")

    def head(self, x):
        """Logits, (..., vocab_size), of features x (..., d)."""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    def loss(self, x, targets):
        """Mean cross-entropy over targets other than -100. The backward pass recomputes a chunk's logits."""

        def nats(x, targets):
            return F.cross_entropy(self.head(x).to(fp32(x)), targets, reduction="sum", ignore_index=-100)

        x, targets = x.flatten(0, 1), targets.flatten()
        chunks = zip(x.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK))
        total = sum(checkpoint(nats, *chunk, use_reentrant=False) for chunk in chunks)
        return total / (targets != -100).sum().clamp(min=1)

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
        expect(tokens.ndim == 2 and tokens.numel() > 0, "the prompt is empty: it needs at least one token")
        self.check(tokens)
        fits = 0 < max_new_tokens < NEVER
        expect(fits, f"max_new_tokens is {max_new_tokens}: it must be from 1 to 2**62 - 1")
        expect(temperature >= 0, f"temperature is {temperature}: it must be 0 or above")
        expect(top_k is None or top_k >= 1, f"top_k is {top_k}: it must be 1 or more")
        expect(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}: it must be above 0, and at most 1")
        (B, T), device = tokens.shape, tokens.device
        generator = torch.Generator(device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        cache, stopped = self.cache(B, T + max_new_tokens), torch.zeros(B, dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits = self.head(self.features(tokens, cache)[:, -1]).float()
            tokens = sample(logits, temperature, top_k, top_p, generator).masked_fill(stopped, stop)
            stopped = tokens == stop
            yield tokens
            if stop >= 0 and stopped.all():
                return
            tokens = tokens[:, None]

    def save(self, path, **more):
        """Writes config, tokenizer's name, weights and `more`. The file appears whole or not at all."""
        contents = {"config": asdict(self.config), "tokenizer": self.tokenizer, "model": self.state_dict()}
        partial = f"{path}.partial"
        try:
            torch.save(contents | more, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            if os.path.exists(partial):
                os.remove(partial)
            raise OSError(f"cannot write {path}: {error}; what was there before is untouched") from error

    @classmethod
    def load(cls, path, device="cpu", **changes):
        """The model that `save` wrote, on `device`, changed as by `use`. ValueError for any other file."""
        expect(os.path.isfile(path), f"there is no checkpoint {path}: `python train.py` writes out/ckpt.pt")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # never runs code
            with torch.device("meta"):
                model = cls(Config(**saved["config"]), saved["tokenizer"])
            model.load_state_dict(saved["model"], assign=True)
        except Exception as error:  # a bad byte can raise anything
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{path} is not a checkpoint of train.py, or damaged: {reason}") from error
        model.use(**changes)
        return model.to(device)


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
class Cache:
    """What one layer keeps: the keys and values that a later query can see, and the recurrence's state.

    Slots 0 .. window are a ring: token t takes slot t % (window + 1) from token t - window - 1. A token that
    stays takes the next slot behind the ring, too, which is read once it has left the ring. So what a query
    sees is always the first slots, and needs no mask, no copy. (RAT, appendix A.1, Listing 2)

    length  tokens so far    keys, values (B, H, slots, D), after RoPE    state  k~, v~ (B, R, G * D), float32
    """

    def __init__(self, mixer, batch, max_tokens, dtype=None):
        self.kind, self.length, self.ring = mixer.kind, 0, mixer.kind.window + 1
        weight, H = mixer.in_proj.weight, mixer.R * self.kind.qk_heads
        shape = (batch, H, self.used(max_tokens) if H else 0, mixer.D)
        self.keys, self.values = torch.empty(2, *shape, dtype=dtype or weight.dtype, device=weight.device)
        shape = (2 if H else 1, batch, mixer.R, mixer.out_proj.in_features // mixer.R)
        state = torch.zeros(shape if self.kind.restart else 0, dtype=fp32(weight), device=weight.device)
        self.state = dict(zip("vk", state))

    def used(self, tokens):
        """Number of slots that the last of so many tokens sees."""
        return min(tokens, self.ring) + self.kind.count(max(0, tokens - self.ring))

    def check(self, T):
        """Is the cache fit for T more tokens?"""
        expect(not torch.is_grad_enabled(), "a cache has no gradients: call the model under torch.no_grad()")
        end = self.length + T
        fits = not self.keys.shape[1] or self.used(end) <= self.keys.shape[2]
        expect(fits, f"no room in the cache for token {end}: make it with a larger max_tokens")

    def nbytes(self):
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.state.values()))

    def attend(self, q, k, v, rope):
        """`attend` for the next tokens, which then are in the cache. After the prompt, they go one by one."""
        T, device = k.shape[2], k.device
        if self.length == 0:
            # The last tokens that fit into the cache never leave the ring, and have no slot behind it.
            recent = torch.arange(max(0, T - self.ring), T, device=device)
            staying = self.kind.staying(T, device)[: max(0, self.keys.shape[2] - self.ring)]
            slots = torch.cat([recent % self.ring, self.ring + torch.arange(len(staying), device=device)])
            tokens = torch.cat([recent, staying])
            self.keys[:, :, slots] = rotate(k[:, :, tokens], rope[:, tokens]).to(self.keys.dtype)
            self.values[:, :, slots] = v[:, :, tokens].to(self.keys.dtype)
            return attend(q, k, v, rope, self.kind)
        q, k, out = rotate(q, rope).repeat(1, k.shape[1] // q.shape[1], 1, 1), rotate(k, rope), []
        for n, t in enumerate(range(self.length, self.length + T)):
            slots = [t % self.ring] + [self.ring + self.kind.count(t)] * self.kind.stays(t)
            for slot in slots:
                if slot < self.keys.shape[2]:
                    self.keys[:, :, slot], self.values[:, :, slot] = k[:, :, n], v[:, :, n]
            seen = self.keys[:, :, : self.used(t + 1)], self.values[:, :, : self.used(t + 1)]
            out.append(F.scaled_dot_product_attention(q[:, :, n : n + 1], *seen))
        return torch.cat(out, dim=2)


# --- 7. What makes it fast ------------------------------------------------------------------------
BLOCK = 64  # longest recurrence that is one loop
QUERIES = 256  # queries in a block: the best of 64 to 1024 for windows of 0 and 1024, or near it
FUSED = 2048  # tokens from which on flex_attention is worth the wait for Triton (CUDA, not measured)


def recur_in_blocks(step, x, gate, h, reverse):
    """`recur` over many tokens, in blocks side by side: a row of 16384 x 512 takes a fifth of a loop's time.

    A block turns the state h that enters it into a * h + u: a is the product of its gates, u the state that
    leaves if zero enters. Two blocks in a row are one, a2 * (a1 * h + u1) + u2. As that is associative, a
    scan over blocks gives the state that leaves each. Then all run again, from there.
    """
    if reverse:
        return recur_in_blocks(step, x.flip(1), gate.flip(1).roll(1, dims=1), h, False).flip(1)
    B, T = x.shape[:2]
    x, gate = fold(x, BLOCK), fold(gate, BLOCK)
    entering = F.pad(h[:, None], [0, 0] * (h.ndim - 1) + [0, len(x) // B - 1])
    u = recur(step, x, gate, entering.flatten(0, 1))[:, -1].clone().unflatten(0, (B, -1))
    a = gate.prod(dim=1).unflatten(0, (B, -1))
    mode = "pointwise" if x.is_cuda else "generic"
    leaving = associative_scan(compose, (a, u), dim=1, combine_mode=mode)[1]
    entering = torch.cat([h[:, None], leaving[:, :-1]], dim=1)
    return recur(step, x, gate, entering.flatten(0, 1)).unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


def compose(first, second):
    (a1, u1), (a2, u2) = first, second
    return a2 * a1, torch.addcmul(u2, a2, u1)


def block_mask(kind, T, device, size=128):
    """flex_attention's mask for the keys that stay, followed by all keys; each is seen in one place.

    Made of blocks of `size` queries and keys: create_block_mask would visit all T x T scores.
    """
    i, staying = torch.arange(T, device=device), kind.staying(T, device)
    j, n = torch.cat([staying, i]), len(staying)
    stays, window = torch.arange(len(j), device=device) < n, i.new_tensor(kind.window)

    def visible(b, h, i, key):
        return (j[key] <= i) & ((i - j[key] > window) == stays[key])

    first, key = i[::size, None], torch.arange(0, len(j), size, device=device)  # of each block
    last, last_key = (first + size - 1).clamp(max=T - 1), (key + size - 1).clamp(max=len(j) - 1)
    far = (key < n) & (j[key] < last - kind.window)
    near = (last_key >= n) & (j[last_key] >= first - kind.window) & (j[key.clamp(min=n)] <= last)
    order = (far | near).int().argsort(dim=1, descending=True, stable=True)
    count = (far | near).sum(dim=1)
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
    lesson()
