"""RAT in one file: a recurrence inside each chunk, attention across chunks, and the baselines.

    RAT   Wei et al., NeurIPS 2025, arXiv 2507.04416
    RAT+  Wei and Gulcehre, 2026, arXiv 2602.18196

Within a chunk of L tokens, a gated recurrence sums up the tokens so far. Across chunks, a query attends to
the last state of each earlier chunk, and to its own. With L = 4, query 10:

    tokens                   0  1  2  3 | 4  5  6  7 | 8  9 10 11
    states it attends to              * |          * |       *
    what they sum up         0 to 3       4 to 7       8 to 10

Every token mixer is the same four lines with different settings, a row of the table in `Config.kind`:

    z, v, g, q, k = in_proj(x)
    k~_t = f_t * k~_{t-1} + (1 - f_t) * k_t    f = sigmoid(g); from zero at each restart; v~ likewise
    y_i  = softmax over visible j of (rope(q_i) . rope(k~_j) / sqrt(D))  applied to v~_j
    out  = out_proj(sigmoid(z) * y)            attention has neither g (k~ = k, v~ = v) nor z

`python rat.py` draws what each kind sees. `oracle_mixer` in test_rat.py is the naive version.

    B batch     T tokens     d width of the model     H heads     D = d/H width of a head     L chunk size
    G groups of q and k in RAT: head n reads group n % G      i, j, t positions of a query, a key, a token
    z output gate, g forget gate, before the sigmoid          h a state, k~ or v~
"""

import math
import os
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._higher_order_ops.associative_scan import associative_scan
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

NEVER = 1 << 30  # a period that never comes round, a position that no token has
LOOPS_ON = ("cpu",)  # devices on which a recurrence is a loop in Python
UNROLLED = 64  # tokens up to which it is unrolled elsewhere
QUERIES = 256  # queries in a block, without flex_attention
FAST = 2048  # tokens from which flex_attention is worth compiling


# --- 1. Kinds of layer, and what each one sees ---
@dataclass(frozen=True)
class Kind:
    """What tells one kind of layer from another."""

    qk_heads: int  # heads of q and k; 0: no attention, y = v~
    restart: int = 0  # tokens after which the recurrence starts again; 0: no recurrence
    dilation: int = 1  # every dilation-th token stays visible to all later queries
    window: int = 0  # preceding tokens that a query sees
    sinks: int = 0  # first tokens that stay visible
    rope_unit: int = 1  # RoPE counts tokens, or chunks of so many
    rope_base: float = 10000.0
    timespan: int = 0  # longest memory at initialization, in tokens; 0: no forget bias
    output_gate: bool = True

    def visible(self, i, j):
        """Does the query at i see the key at j? The definition: what follows computes it fast."""
        return (j <= i) & ((i - j <= self.window) | self.stays(j))

    def stays(self, j):
        """Does every later query see the key at j, however far away?"""
        return (j < self.sinks) | ((j + 1) % self.dilation == 0)

    def count(self, n):
        """How many of the first n tokens stay."""
        sinks = min(n, self.sinks)
        return sinks + n // self.dilation - sinks // self.dilation

    def staying(self, x):
        """The tokens of x (..., T, any) that stay, in order."""
        first = (self.sinks // self.dilation + 1) * self.dilation - 1  # the first dilated after the sinks
        dilated = x[..., first :: self.dilation, :]
        return torch.cat([x[..., : self.sinks, :], dilated], dim=-2) if self.sinks else dilated

    def weights(self):
        """What a layer's weights depend on. The rest may change after training."""
        return self.qk_heads, self.restart > 0, self.timespan > 0, self.output_gate


@dataclass
class Config:
    """Sizes and settings of a model. ValueError for those that do not fit together."""

    vocab_size: int = 257
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    context: int = 256  # tokens in a training window; generation may go beyond
    layers: str = "rat:16"  # attention, swa:W, rnn, rat:L, rat+:D:W:S or gated:D:W:S; several alternate
    qk_groups: int = 2  # rat: heads of q and k, each shared by n_head / qk_groups heads
    rope_base: str = "10000"  # base of the rotary position embedding, 0: none (NoPE); several alternate

    def __post_init__(self):
        self.rope_base = str(self.rope_base)
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} is not a multiple of 2 * n_head, {2 * self.n_head}")
        for layer in range(self.n_layer):
            self.kind(layer)

    def kind(self, layer):
        """The Kind of a layer, by its name in `layers` and the numbers after it."""
        names, bases = self.layers.split(","), self.rope_base.split(",")
        text = names[layer % len(names)].strip()
        name, *numbers = text.split(":")
        H, G = self.n_head, min(self.n_head, self.qk_groups)
        rows = {
            "attention": lambda: Kind(H, output_gate=False),
            "swa": lambda W=1024: Kind(H, dilation=NEVER, window=W, output_gate=False),
            "rnn": lambda: Kind(0, restart=NEVER, dilation=NEVER, timespan=self.context),
            "rat": lambda L=16: Kind(G, restart=L, dilation=L, rope_unit=L, timespan=L),
            "rat+": lambda D=1, W=0, S=0: Kind(H, restart=NEVER, dilation=D or NEVER, window=W, sinks=S),
            "gated": lambda D=1, W=0, S=0: Kind(H, dilation=D or NEVER, window=W, sinks=S),
        }
        try:
            kind = rows[name](*map(int, numbers))
        except (KeyError, TypeError, ValueError):
            kind = None
        if kind is None or min(kind.dilation - 1, kind.window, kind.sinks) < 0:
            raise ValueError(f"there is no layer {text!r}: take {', '.join(rows)}, rat:16, rat+:16:256:4")
        if name == "rat" and (G < 1 or H % G):
            raise ValueError(f"n_head {H} is not a multiple of qk_groups {G}")
        return replace(kind, rope_base=float(bases[layer % len(bases)]))


# --- 2. The recurrence ---
def scan(xs, g, chunk=NEVER):
    """h_t = f_t * h_{t-1} + (1 - f_t) * x_t with f = sigmoid(g), from zero in each chunk. (RAT, equation 3)

    xs  one or more sequences (B, T, d) under one gate: v and k of a layer
    g   (B, T, d)
    Returns h for each x, summed in float32: a memory is a long product of gates close to 1.
    """
    B, T, d = g.shape
    chunk = min(chunk, T)
    n = -(-T // chunk)  # chunks are independent: fold them into the batch, the last one padded
    if T < n * chunk:
        g, *xs = [F.pad(x, (0, 0, 0, n * chunk - T)) for x in (g, *xs)]
    g, *xs = [x.reshape(B * n, chunk, d) for x in (g, *xs)]
    return [h.reshape(B, n * chunk, d)[:, :T] for h in Recurrence.apply(g, *xs)]


class Recurrence(torch.autograd.Function):
    """`scan` without restarts. Its gradient is a recurrence too, from the last token to the first.

    h_t affects the loss directly, by grad_t, and through h_{t+1} = f_{t+1} * h_t + ..., so
        dh_t = grad_t + f_{t+1} * dh_{t+1}
        dx_t = (1 - f_t) * dh_t
        dg_t = f_t * (1 - f_t) * (h_{t-1} - x_t) * dh_t = (h_t - x_t) * dx_t
    as h_t - x_t = f_t * (h_{t-1} - x_t).
    """

    @staticmethod
    def forward(ctx, *inputs):
        g, *xs = inputs
        f = torch.sigmoid(g.to(sums_in(g.dtype)))
        hs = [linear_recurrence(f, torch.addcmul(x, f, x, value=-1), x.dtype) for x in xs]  # (1 - f) * x
        ctx.save_for_backward(f, *xs, *hs)
        return tuple(hs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        f, *xs_hs = ctx.saved_tensors
        dg, dxs = 0, []
        for x, h, grad in zip(xs_hs, xs_hs[len(grads) :], grads):
            dh = linear_recurrence(f, grad.to(f.dtype, copy=True), x.dtype, reverse=True)
            dxs.append(dh.addcmul_(f, dh, value=-1))
            dg = (h.to(f.dtype) - x).mul_(dxs[-1]).add_(dg)
        return dg, *dxs


def linear_recurrence(a, b, dtype, reverse=False):
    """h_t = a_t * h_{t-1} + b_t from zero; with `reverse` h_t = a_{t+1} * h_{t+1} + b_t. All (B, T, d)."""
    T = b.shape[1]
    if b.device.type in LOOPS_ON:
        loop(a, b, reverse)  # b is a fresh tensor
        return b.to(dtype)
    if T > UNROLLED:
        a = a.roll(-1, dims=1) if reverse else a
        mode = "pointwise" if b.is_cuda else "generic"
        return associative_scan(compose, (a, b), dim=1, reverse=reverse, combine_mode=mode)[1].to(dtype)
    order, h = range(T)[::-1] if reverse else range(T), list(b.unbind(dim=1))
    for before, t in zip(order, order[1:]):  # compiled, this is one kernel
        h[t] = a[:, max(before, t)] * h[before] + h[t]
    return torch.stack([h_t.to(dtype) for h_t in h], dim=1)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::loop", mutates_args={"b"})  # a copy needs its own
def loop(a: torch.Tensor, b: torch.Tensor, reverse: bool) -> None:
    """Turns b into h in place: twice as fast on a CPU. An operator, so that no compiler unrolls it."""
    a, h = a.unbind(dim=1), b.unbind(dim=1)
    order = range(len(h))[::-1] if reverse else range(len(h))
    for before, t in zip(order, order[1:]):
        h[t].addcmul_(a[max(before, t)], h[before])


def compose(first, second):
    """h -> a1 * h + b1, then h -> a2 * h + b2, are one such step: all T are composed in log T rounds."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def sums_in(dtype):
    return torch.promote_types(dtype, torch.float32)


# --- 3. Attention to what is visible ---
def rotary_table(position, D, base):
    """RoPE's cos and sin at positions (T,): (2, T, D), sin negated in its first half."""
    dtype = torch.float32 if position.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    exponent = torch.arange(D // 2, device=position.device, dtype=dtype) / (D // 2)
    angle = position[:, None] * (base**-exponent if base else 0 * exponent)
    return torch.stack([torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()])


def rotate(x, rope):
    """RoPE: channels c and c + D/2 of x (B, heads, T, D), (a, b), become (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * rope[0], x.roll(x.shape[-1] // 2, dims=-1), rope[1]).to(x.dtype)


def tile(q, k):
    """q (B, G, T, D) for all heads of k: head n reads group n % G."""
    return q.unsqueeze(1).expand(-1, k.shape[1] // q.shape[1], -1, -1, -1).flatten(1, 2)


def attend(q, k, v, rope, mask, kind):
    """Attention to what is visible: with all T x T scores, that is
        F.scaled_dot_product_attention(tile(rotate(q)), rotate(k), v, kind.visible(i[:, None], i))
    The rest is speed: a query meets far keys, which stay, and near keys, in its window.
    q (B, G, T, D), k and v (B, H, T, D), before RoPE. Returns (B, H, T, D). (RAT, appendix A.1, Listing 1)
    """
    if kind.dilation == 1 or k.shape[2] <= kind.window + 1:
        return F.scaled_dot_product_attention(tile(rotate(q, rope), k), rotate(k, rope), v, is_causal=True)
    far_k, far_v = rotate(kind.staying(k), kind.staying(rope)), kind.staying(v)
    if kind.window == 0:
        return attend_far_and_own(q, k, v, rope, far_k, far_v, mask, kind)
    turned_q, turned_k = tile(rotate(q, rope), k), rotate(k, rope)
    if mask is not None:
        keys, values = torch.cat([far_k, turned_k], dim=2), torch.cat([far_v, v], dim=2)
        return fast_attention(turned_q, keys, values, block_mask=mask)
    i = torch.arange(k.shape[2], device=q.device)[:, None]
    far = far_k, far_v, kind.staying(i)
    near = [x.split(QUERIES, dim=-2) for x in (turned_k, v, i)]
    out = []
    for n, queries in enumerate(turned_q.split(QUERIES, dim=2)):
        first = max(0, n * QUERIES - kind.window) // QUERIES  # block of the first near key
        m = kind.count(first * QUERIES)
        keys, values, j = (torch.cat([x[..., :m, :], *y[first : n + 1]], dim=-2) for x, y in zip(far, near))
        visible = kind.visible(near[2][n], j.mT)
        out.append(F.scaled_dot_product_attention(queries, keys, values, visible))
    return torch.cat(out, dim=2)


def attend_far_and_own(q, k, v, rope, far_k, far_v, mask, kind):
    """The near key is a query's own. RoPE turns both by one angle, so their score needs no rotation."""
    scale = q.shape[-1] ** -0.5
    if mask is not None:
        own, turned_q = (tile(q, k) * k).sum(-1, dtype=torch.float32) * scale, tile(rotate(q, rope), k)
        y, aux = fast_attention(turned_q, far_k, far_v, block_mask=mask, return_aux=AuxRequest(lse=True))
        # In a softmax over all keys, the own one has weight exp(own) / (exp(own) + exp(lse)), a sigmoid.
        return torch.lerp(y, v, torch.sigmoid(own - aux.lse).unsqueeze(-1).to(y.dtype))
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    # Zeros before the far keys: column 0 takes the own score, 1 to 7 are masked, as odd rows are slow.
    j = F.pad(kind.staying(i).mT, (7, 0), value=NEVER)
    far_k, far_v = (F.pad(x, (0, 0, 8, 0)) for x in (far_k, far_v))
    out = []
    for i_n, q_n, k_n, v_n, rope_n in zip(*[x.split(QUERIES, dim=-2) for x in (i, q, k, v, rope)]):
        m = 8 + kind.count(len(out) * QUERIES + len(i_n))
        own = (tile(q_n * scale, k) * k_n).sum(-1, keepdim=True).to(q.dtype)
        hidden = torch.where(j[:, : m - 1] < i_n, 0.0, -math.inf).to(q.dtype)
        scores = torch.cat([own, hidden.expand(*k.shape[:2], -1, -1)], dim=-1).flatten(0, 1)
        queries, keys = tile(rotate(q_n, rope_n), k).flatten(0, 1), far_k[:, :, :m].flatten(0, 1)
        scores = torch.baddbmm(scores, queries, keys.mT, alpha=scale)
        weights = scores.softmax(-1).unflatten(0, k.shape[:2]).to(v.dtype)
        out.append(torch.addcmul(weights @ far_v[:, :, :m], weights[..., :1], v_n))
    return torch.cat(out, dim=2)


# --- 4. The layer ---
class Mixer(nn.Module):
    """A token mixer of any kind."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.config, self.kind = config, config.kind(layer)
        d, qk = config.d_model, self.kind.qk_heads * config.d_model // config.n_head
        self.sizes = [d * self.kind.output_gate, d, d * (self.kind.restart > 0), qk, qk]  # z, v, g, q, k
        self.in_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        if self.kind.timespan:
            # Chrono initialization (Tallec and Ollivier 2018): memories 1 / (1 - f) up to `timespan` tokens
            self.forget_bias = nn.Parameter(torch.empty(d).uniform_(1, max(1, self.kind.timespan - 1)).log_())

    def forward(self, x, cache=None, tables=None):
        """x (B, T, d), with a Cache the tokens after those it knows. Returns (B, T, d)."""
        kind, H, T = self.kind, self.config.n_head, x.shape[1]
        if tables is None:  # callers that pass them advance the cache
            start = cache.advance(T, kind) if cache else 0
            tables = self.tables(torch.arange(start, start + T, device=x.device), x.dtype)
        position, rope, mask = tables
        if cache and T > 1 and cache.length > T:  # after a prompt, tokens come one by one
            parts = zip(x.split(1, dim=1), position.split(1), rope.split(1, dim=1))
            return torch.cat([self(x_t, cache, (t, rope_t, None)) for x_t, t, rope_t in parts], dim=1)
        z, v, g, q, k = self.in_proj(x).split(self.sizes, dim=-1)
        if kind.timespan:
            g = g + self.forget_bias
        if 0 < kind.qk_heads < H:  # head n reads group n % G, through gates of its own
            k = k.repeat(1, 1, H // kind.qk_heads)
        if kind.restart:
            xs = [v, k] if kind.qk_heads else [v]
            hs = cache.scan(xs, g, position) if cache else scan(xs, g, kind.restart)
            v, k = hs[0], hs[-1]
        y = v  # without attention, a token's own state
        if kind.qk_heads:  # (B, T, heads * D) to (B, heads, T, D)
            q, k, v = (y.unflatten(-1, (-1, x.shape[-1] // H)).transpose(1, 2) for y in (q, k, v))
            y = cache.attend(q, k, v, *tables) if cache else attend(q, k, v, rope, mask, kind)
            y = y.transpose(1, 2)
        if kind.output_gate:
            y = torch.sigmoid(z).view_as(y) * y
        return self.out_proj(y.flatten(2))

    def tables(self, position, dtype=torch.float32):
        """What positions (T,) alone decide: these, RoPE's table (2, T, D), flex_attention's mask."""
        kind, T, D = self.kind, len(position), self.config.d_model // self.config.n_head
        rope = rotary_table(position // kind.rope_unit, D, kind.rope_base).to(sums_in(dtype))
        sparse = kind.qk_heads and kind.dilation > 1 and T > kind.window + 1 and kind.count(T) + kind.window
        flex = sparse and position.is_cuda and T >= FAST and D >= 16 and dtype != torch.float64
        return position, rope, block_mask(kind, T, position.device) if flex else None


class Block(nn.Module):
    """Token mixer and MLP, each on a normalized input and added to its residual."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.d_model
        self.mixer_norm = nn.RMSNorm(d, eps=1e-6)
        self.mixer = Mixer(config, layer)
        self.mlp_norm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, x, cache=None, tables=None):
        x = x + self.mixer(self.mixer_norm(x), cache, tables)
        return x + self.mlp(self.mlp_norm(x))


# --- 5. The language model ---
class RAT(nn.Module):
    """A decoder-only language model of the layers that config.layers names, with tied embeddings."""

    LOSS_CHUNK = 4096  # tokens whose logits exist at one time; the backward pass computes them again

    def __init__(self, config, tokenizer=""):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer  # the tokenizer's name
        padded = -(-config.vocab_size // 64) * 64  # matrix units like multiples of 64; `head` drops the rest
        self.embedding = nn.Embedding(padded, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) to (logits (B, T, vocab_size), None), given targets (-100: none) to (None, loss)."""
        x = self.features(tokens, cache)
        return (self.head(x), None) if targets is None else (None, self.loss(x, targets))

    def features(self, tokens, cache=None):
        """What the output embedding sees, (B, T, d)."""
        tokens, T, start = tokens.long(), tokens.shape[1], 0
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere this forces a sync
            if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
                raise ValueError(f"a token is not in the vocabulary, 0 to {self.config.vocab_size - 1}")
        for layer, block in zip(cache or [], self.blocks):
            start = layer.advance(T, block.mixer.kind)
        position = torch.arange(start, start + T, device=tokens.device)
        run = self.decode if cache and T == 1 else self.run_blocks
        return run(tokens, position, cache)

    def run_blocks(self, tokens, position, cache=None):
        x, mixers = self.embedding(tokens), {block.mixer.kind: block.mixer for block in self.blocks}
        tables = {kind: mixer.tables(position, x.dtype) for kind, mixer in mixers.items()}
        for block, layer in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, layer, tables[block.mixer.kind])
        return self.norm(x)

    decode = run_blocks  # of one token: its shapes are fixed, so sample.py compiles it alone

    def head(self, x):
        """Logits (..., vocab_size) of features x (..., d)."""
        return F.linear(x, self.embedding.weight)[..., : self.config.vocab_size]

    def loss(self, x, targets):
        """Mean cross-entropy over targets other than -100."""
        x, targets = x.flatten(0, 1), targets.flatten().long()
        count = (targets != -100).sum().clamp(min=1)
        if len(x) <= self.LOSS_CHUNK:
            return self.nats(x, targets) / count
        chunks = zip(x.split(self.LOSS_CHUNK), targets.split(self.LOSS_CHUNK))
        return sum(checkpoint(self.nats, *chunk, use_reentrant=False) for chunk in chunks) / count

    def nats(self, x, targets):
        return F.cross_entropy(self.head(x).to(sums_in(x.dtype)), targets, reduction="sum", ignore_index=-100)

    def use(self, layers=None, context=None):
        """Switches a trained model to other numbers, such as rat+:16:256:4."""
        old, mixers = self.config, [block.mixer for block in self.blocks]
        new = replace(old, layers=layers or old.layers, context=context or old.context)
        if any(new.kind(layer).weights() != mixer.kind.weights() for layer, mixer in enumerate(mixers)):
            raise ValueError(f"a model of layers {old.layers} has other weights than one of {new.layers}")
        self.config = new
        for layer, mixer in enumerate(mixers):
            mixer.kind = new.kind(layer)

    def cache(self, batch, max_tokens):
        """An empty Cache for each layer, for `batch` sequences of `max_tokens` tokens."""
        like = self.head(self.embedding.weight[:1])  # in autocast's dtype, if that is on
        return [Cache(block.mixer, batch, max_tokens, like.device, like.dtype) for block in self.blocks]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop=-1):
        """Continues prompts of one length, tokens (B, T), and yields each next token, (B,) int64, when drawn.

        temperature 0: the likeliest. top_k: of the k likeliest, top_p: of those that first reach p. A
        sequence that drew `stop` repeats it; once all have, generation ends.
        """
        B, T = tokens.shape
        generator = torch.Generator(tokens.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        cache = self.cache(B, max(256, 1 << (T + max_new_tokens - 1).bit_length()))  # few sizes to compile
        stopped = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = self.head(self.features(tokens, cache)[:, -1])
            drawn = sample(logits.float(), temperature, top_k, top_p, generator).masked_fill(stopped, stop)
            yield drawn
            stopped = drawn == stop
            if stop >= 0 and stopped.all():
                return
            tokens = drawn[:, None]

    def save(self, path, weights=None, **more):
        """Writes config, tokenizer's name, weights and `more` to a file, atomically."""
        more |= {"config": asdict(self.config), "tokenizer": self.tokenizer}
        torch.save({"model": weights or self.state_dict(), **more}, f"{path}.partial")
        os.replace(f"{path}.partial", path)

    @classmethod
    def load(cls, path, device="cpu", layers=None, context=None):
        """The model that `save` wrote to a file or a folder's ckpt.pt, changed as by `use`. Runs no code."""
        path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with torch.device("meta"):
            model = cls(Config(**saved["config"]), saved["tokenizer"])
        weights = {n.replace("_orig_mod.", "").replace("module.", ""): x for n, x in saved["model"].items()}
        model.load_state_dict(weights, assign=True)
        model.use(layers, context)
        return model.to(device)


def sample(logits, temperature, top_k, top_p, generator):
    """Draws a token from each row of logits (B, vocab_size): (B,) int64. See RAT.generate."""
    if temperature < 1e-6:  # division by less overflows
        return logits.argmax(-1)
    p, token = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p] = 0  # the likelier ones reach top_p already
    noise = torch.empty_like(p).exponential_(generator=generator)
    drawn = (p / noise).argmax(-1, keepdim=True)  # unlike multinomial, this never waits for the GPU
    return token.gather(-1, drawn).squeeze(-1)


# --- 6. What decoding remembers ---
class Cache:
    """What one layer keeps: the keys and values that a later query can see, and the recurrence's state.

    Token t goes to slot t % (window + 1). What was there moves behind this ring if it stays visible, else it
    is overwritten: all that is here is visible. In RAT the ring is one slot, and T tokens take
    1 + (T - 1) // L slots. (RAT, appendix A.1, Listing 2) With dilation 4:

        after token 3,   RAT:    3          window 2:    3  1  2
        after token 6            6 | 3                   6  4  5 | 3
        after token 10          10 | 3 7                 9 10  8 | 3 7
    keys, values  (B, H, slots, D), keys after RoPE  state   v~ and k~, (0 to 2, B, d) in float32
    position      (slots, 1), of the token in each   length  tokens so far
    """

    def __init__(self, mixer, batch, max_tokens, device=None, dtype=None):
        config, kind = mixer.config, mixer.kind
        self.kind, self.length, self.max_tokens, self.ring = kind, 0, max_tokens, kind.window + 1
        slots = min(max_tokens, self.ring) + kind.count(max(0, max_tokens - self.ring))
        heads, d = config.n_head if kind.qk_heads else 0, config.d_model
        shape = (2, batch, heads, slots, d // config.n_head)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.position = torch.full((slots, 1), NEVER, device=device)  # empty: later than any query
        states = (1 + (heads > 0)) * (kind.restart > 0)
        self.state = torch.zeros(states, batch, d, device=device, dtype=sums_in(self.keys.dtype))

    def advance(self, T, kind):
        """Counts T tokens that a layer of this kind takes in next. Returns how many came before."""
        if torch.is_grad_enabled():
            raise ValueError("a cache has no gradients: use torch.no_grad()")
        if kind != self.kind:
            raise ValueError("this cache is for other layers: make a new one after `use`")
        if self.length + T > self.max_tokens:
            raise ValueError(f"no room in the cache for token {self.length + T}: raise its max_tokens")
        self.length += T
        return self.length - T

    def scan(self, xs, g, position):
        """`scan` of a prompt, or of one token at a position, a tensor (1,)."""
        if g.shape[1] > 1:
            hs = scan(xs, g, self.kind.restart)
        else:
            f = torch.sigmoid(g.to(self.state.dtype))
            before = self.state.unsqueeze(2) * (position % self.kind.restart > 0)
            hs = [torch.lerp(x.to(f.dtype), h, f) for x, h in zip(xs, before)]
        self.state.copy_(torch.stack([h[:, -1] for h in hs]))
        return [h.to(x.dtype) for h, x in zip(hs, xs)]

    def attend(self, q, k, v, position, rope, mask):
        """`attend` of a prompt, or of one token; from then on the cache has them."""
        turned_k = rotate(k, rope)
        if q.shape[2] > 1:
            self.fill(turned_k, v)
            return attend(q, k, v, rope, mask, self.kind)
        self.append(turned_k, v, position)
        q, seen = tile(rotate(q, rope), k).to(self.keys.dtype), (self.position <= position).mT
        return F.scaled_dot_product_attention(q, self.keys, self.values, seen).to(v.dtype)

    def fill(self, k, v):
        """Stores a prompt's tokens as if appended one by one."""
        position = torch.arange(k.shape[2], device=k.device)
        gone = max(0, len(position) - self.ring)  # so many have left the ring
        for slots, x in (self.keys, k), (self.values, v), (self.position, position[:, None]):
            behind = self.kind.staying(x[..., :gone, :])
            slots[..., self.ring : self.ring + behind.shape[-2], :] = behind
            slots[..., position[gone:] % self.ring, :] = x[..., gone:, :].to(slots.dtype)

    def append(self, k, v, position):
        slot = position % self.ring
        leaving = self.position[slot, 0]
        moves = self.kind.stays(leaving) & (leaving < position)  # not if the slot is empty
        behind = self.ring + (self.position[self.ring :] <= position).sum()
        to = torch.where(moves, behind, slot)  # if forgotten, overwritten by the last line
        for slots, x in (self.keys, k), (self.values, v), (self.position, position[:, None]):
            slots[..., to, :] = slots[..., slot, :]
            slots[..., slot, :] = x.to(slots.dtype)


# --- 7. What makes it fast ---
fast_attention = flex_attention
if torch.cuda.is_available():
    fast_attention = torch.compile(flex_attention)  # uncompiled, it would store all scores
    torch._inductor.config.max_fusion_size = 128  # 64 would cut a chunk's backward loop in two


def block_mask(kind, T, device, size=128):
    """flex_attention's mask over far keys and, with a window, the near ones after them; each counts once."""
    i = torch.arange(T, device=device)
    far = kind.staying(i[:, None])[:, 0]
    j = torch.cat([far, i]) if kind.window else far
    # Tensors: numbers would be compiled in, and differ with each length.
    is_far = torch.arange(len(j), device=device) < len(far)
    window = torch.full((), kind.window, device=device)

    def visible(b, h, i, n):
        return (j[n] <= i) & ((i - j[n] > window) == is_far[n])

    # From each block's first and last position: create_block_mask would visit all T x T scores.
    blocks = F.pad(j, (0, -len(j) % size), value=NEVER).view(-1, size)
    first = i[None, None, ::size, None]
    seen = (blocks.amin(1) < first + size) & (is_far[::size] | (blocks.amax(1) >= first - kind.window))
    lists = seen.sum(-1).int(), seen.int().argsort(dim=-1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=visible, seq_lengths=(T, len(j)))


# --- 8. The lesson ---
def lesson(T=12):
    """Draws what each kind of layer sees, from `Kind.visible`."""
    print("Rows: queries; columns: keys.  ● visible  ○ part of a visible one  · not")
    for names in ("attention", "swa:3", "rnn"), ("rat:4", "rat+:1", "rat+:4:2:1"):
        print("\n" + "    ".join(f"{name:<{2 * T - 1}}" for name in names))
        for i in range(T):
            rows = []
            for kind in (Config(layers=name).kind(0) for name in names):
                seen = {j for j in range(T) if kind.visible(i, j)}
                sums = {t for j in seen for t in range(j - j % (kind.restart or 1), j)}
                rows.append(" ".join("●" if j in seen else "○" if j in sums else "·" for j in range(T)))
            print("    ".join(rows))


if __name__ == "__main__":
    lesson()
