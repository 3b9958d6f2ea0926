"""The claims of this repository, tested. `pytest` runs what the machine can; CUDA tests skip without CUDA.

The oracle is the equation at the top of rat.py in its plainest form: float64, one token after the other, all
T x T scores, sharing no code with rat.py. A new kind of layer needs an entry in KINDS and, in `oracle_mixer`,
its visible keys; then `pytest -k kind` checks its training, gradients, decoding and cache.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import io
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks

import bench
import prepare_data
import rat
import train
from prepare_data import Data
from rat import NEVER, RAT, Cache, Config, Kind, Mixer, scan

ROOT = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

KINDS = ["attention", "swa:5", "swa:0", "swa", "rnn", "rat:4", "rat:16", "rat:1", "rat:4096"]
KINDS += ["rat+", "rat+:4", "rat+:4:8:2", "rat+:3:2:7", "rat+:5:0:3", "rat+:0", "rat+:0:8:2"]
KINDS += ["gated", "gated:4:3", "gated:0:6:2"]
every_kind = pytest.mark.parametrize("layers", KINDS)


@pytest.fixture(autouse=True)
def same_inputs_every_time():
    torch.manual_seed(0)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


# --- The oracle ---
def oracle_rope(x, position, base):
    """x (T, D): channels c and c + D/2 are one complex number, turned by position * base^(-2c/D)."""
    if base == 0:
        return x
    D = x.shape[-1]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    theta = torch.tensor([base ** (-2 * c / D) for c in range(D // 2)], dtype=torch.float64)
    z = z * torch.polar(torch.ones(len(position), D // 2, dtype=torch.float64), position[:, None] * theta)
    return torch.cat([z.real, z.imag], dim=-1)


def oracle_mixer(x, p, config, layer=0):
    """One layer on x (T, d). p: its parameters by name; config: what names its kind, its heads and RoPE."""
    (T, d), H = x.shape, config.n_head
    D = d // H
    names, bases = config.layers.split(","), str(config.rope_base).split(",")
    name, *numbers = names[layer % len(names)].strip().split(":")
    numbers, base = [int(n) for n in numbers], float(bases[layer % len(bases)])
    L, W = numbers[0] if numbers else 16, numbers[0] if numbers else 1024
    dilation, window, sinks = numbers + [1, 0, 0][len(numbers) :] if name in ("rat+", "gated") else (0, 0, 0)
    G = {"rat": min(H, config.qk_groups), "rnn": 0}.get(name, H)  # heads of q and k
    recurrent, gated = name in ("rat", "rat+", "rnn"), name not in ("attention", "swa")
    sizes = [d if gated else 0, d, d if recurrent else 0, G * D, G * D]
    z, v, g, q, k = torch.split(x @ p["in_proj.weight"].T, sizes, dim=-1)
    f = torch.sigmoid(g + p["forget_bias"]) if "forget_bias" in p else torch.sigmoid(g)

    def visible(i, j):
        if name == "attention":
            return j <= i
        if name == "swa":
            return 0 <= i - j <= W
        if name == "rat":
            return j == i or (j < i and (j + 1) % L == 0)
        kept = dilation > 0 and (j + 1) % dilation == 0
        return j <= i and (j == i or kept or i - j <= window or j < sinks)

    outputs = []
    for h in range(H):
        own, shared = slice(h * D, (h + 1) * D), slice(h % G * D, (h % G + 1) * D) if G else slice(0, 0)
        keys, values = list(k[:, shared]), list(v[:, own])
        for t in range(T if recurrent else 0):
            forget, new = f[t, own], t == 0 or name == "rat" and t % L == 0
            values[t] = (0 if new else forget * values[t - 1]) + (1 - forget) * values[t]
            if G:
                keys[t] = (0 if new else forget * keys[t - 1]) + (1 - forget) * keys[t]
        keys, values = torch.stack(keys), torch.stack(values)
        if name == "rnn":
            outputs.append(values)
            continue
        place = torch.arange(T) // (L if name == "rat" else 1)
        scores = oracle_rope(q[:, shared], place, base) @ oracle_rope(keys, place, base).T
        mask = torch.tensor([[visible(i, j) for j in range(T)] for i in range(T)])
        outputs.append(torch.softmax((scores / math.sqrt(D)).masked_fill(~mask, -math.inf), dim=-1) @ values)
    y = torch.cat(outputs, dim=-1)
    return (torch.sigmoid(z) * y if gated else y) @ p["out_proj.weight"].T


def oracle_logits(tokens, p, config):
    """The language model on one sequence, tokens (T,). p: its parameters by name."""

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    x = p["embedding.weight"][tokens]
    for n in range(config.n_layer):
        own = {key.removeprefix(f"blocks.{n}."): w for key, w in p.items() if key.startswith(f"blocks.{n}.")}
        mixer = {key.removeprefix("mixer."): w for key, w in own.items()}
        x = x + oracle_mixer(norm(x, own["mixer_norm.weight"]), mixer, config, n)
        y = norm(x, own["mlp_norm.weight"]) @ own["mlp.0.weight"].T
        x = x + (y * (1 + torch.erf(y / math.sqrt(2))) / 2) @ own["mlp.2.weight"].T
    return norm(x, p["norm.weight"]) @ p["embedding.weight"][: config.vocab_size].T


def randomize(module, seed=0):
    """Parameters large enough that all of the equation matters; the initial ones make all scores equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 2 else 1.0))
    return module


def small_model(layers, tokenizer="", **settings):
    sizes = dict(vocab_size=50, n_layer=2, d_model=32)
    return randomize(RAT(Config(layers=layers, **sizes | settings), tokenizer))


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def assert_equal_with_gradients(a, b, inputs, tolerance):
    """a and b are equal, and so are their gradients in a random direction."""
    weight = torch.randn_like(b)
    assert a.shape == b.shape and relative_error(a, b) < tolerance
    for one, other in zip(*(grad((y * weight).sum(), inputs, allow_unused=True) for y in (a, b))):
        assert relative_error(one, other) < 10 * tolerance


# --- The layer is the equation ---
def assert_mixer_equals_the_oracle(config, B, T, seed):
    mixer = randomize(Mixer(config), seed).double()
    x = torch.randn(B, T, config.d_model, dtype=torch.float64, requires_grad=True)
    p = dict(mixer.named_parameters())
    expected = torch.stack([oracle_mixer(row, p, config) for row in x])
    assert_equal_with_gradients(mixer(x), expected, [x, *p.values()], 1e-12)


@every_kind
@pytest.mark.parametrize("T", [1, 33])
def test_every_kind_equals_the_oracle(layers, T):
    assert_mixer_equals_the_oracle(Config(d_model=32, layers=layers), 2, T, seed=T)


def random_layer(r):
    D, W, S = r.choice([0, 1, 2, 3, 16, 300]), r.choice([0, 0, 1, 9, 260]), r.choice([0, 0, 2, 11])
    names = ["attention", "rnn", f"swa:{W}", f"rat+:{D}:{W}:{S}", f"gated:{D}:{W}:{S}"]
    return r.choice([*names, *(f"rat:{r.choice([1, 2, 7, 16, 64, 90, 400])}" for _ in range(3))])


@pytest.mark.parametrize("seed", range(30))
def test_random_layers_equal_the_oracle(seed):
    r = random.Random(seed)
    H, G = r.choice([(1, 2), (2, 2), (4, 2), (6, 3), (3, 1), (4, 4)])
    T, B = r.choice([r.randint(1, 40), r.randint(250, 330)]), r.randint(1, 2)
    sizes = dict(n_head=H, qk_groups=G, d_model=H * r.choice([2, 4, 6]), rope_base=r.choice([0, 100, 1e4]))
    assert_mixer_equals_the_oracle(Config(layers=random_layer(r), **sizes), B, T, seed)


@pytest.mark.parametrize("layers, bases", [
    ("rat:4,swa:3", 1e4), ("rat:4, rnn, attention", 1e4), ("rat+,rat+:4:2,rat+:0:0:3", 1e4),
    ("attention,swa:3", 0.0), ("rat:4,swa:3", "0,10000"), ("attention", "0,100,10000.0"), ("gated:4:1", 1e4),
])  # fmt: skip
def test_a_model_equals_the_oracle(layers, bases):
    model = small_model(layers, vocab_size=11, n_layer=4, n_head=2, d_model=12, rope_base=bases).double()
    tokens, p = torch.randint(11, (3, 22)), dict(model.named_parameters())
    targets = tokens.roll(-1, dims=1)
    targets[:, ::5] = -100
    expected = torch.stack([oracle_logits(row, p, model.config) for row in tokens])
    assert_equal_with_gradients(model(tokens)[0], expected, list(p.values()), 1e-11)
    kept = [(b, t) for b in range(3) for t in range(22) if targets[b, t] != -100]
    nats = -sum(expected.log_softmax(-1)[b, t, targets[b, t]] for b, t in kept) / len(kept)
    assert model(tokens, targets)[1].item() == pytest.approx(nats.item(), abs=1e-11)
    assert torch.equal(model(tokens.to(torch.uint16))[0], model(tokens)[0])  # the type in shards


@every_kind
def test_a_kind_by_hand_in_bfloat16_and_with_a_cache(layers):
    """As in a reader's own model: positions come from the cache, dtypes from autocast."""
    mixer = randomize(Mixer(Config(d_model=64, layers=layers)))
    x = torch.randn(2, 50, 64, requires_grad=True)
    y = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y16 = mixer(x)
    assert y16.dtype == torch.bfloat16 and relative_error(y16.float(), y) < 0.03
    # 0.03 to 0.05: these weights make sharp softmaxes
    assert relative_error(grad(y16.float().square().sum(), x)[0], grad(y.square().sum(), x)[0]) < 0.1
    for half, whole, tolerance in (False, y, 1e-5), (True, y16, 0.02):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            cache = Cache(mixer, 2, 50)
            pieces = [mixer(piece, cache) for piece in x.split([9, 1, 1, 6, 1, 32], dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), whole) < tolerance


@pytest.mark.parametrize("layers, backend", [("rat:16", "inductor"), *((k, "aot_eager") for k in KINDS[::4])])
def test_torch_compile_of_a_kind_makes_few_graphs(layers, backend):
    """One for the first length, and one or two for all others."""
    model, tally = small_model(layers, n_layer=1), CompileCounterWithBackend(backend)
    compiled, p = torch.compile(model, backend=tally, fullgraph=True), list(model.parameters())
    for T in (64, 20) if backend == "inductor" else (64, 33, 20, 50):
        tokens = torch.randint(50, (2, T))
        assert_equal_with_gradients(compiled(tokens, tokens)[1], model(tokens, tokens)[1], p, 1e-4)
    assert tally.frame_count <= 3


# --- The recurrence ---
def oracle_scan(x, g, chunk):
    f = torch.sigmoid(g)
    h, out = torch.zeros_like(f[:, 0]), []
    for t in range(f.shape[1]):
        h = (h * 0 if t % chunk == 0 else h) * f[:, t] + (1 - f[:, t]) * x[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


@pytest.fixture(params=["loop", "unrolled", "composed"])
def way(request, monkeypatch):
    """Of computing a recurrence; the last two are for GPUs."""
    if request.param != "loop":
        monkeypatch.setattr(rat, "LOOPS_ON", ())
        monkeypatch.setattr(rat, "UNROLLED", 0 if request.param == "composed" else 1000)


@pytest.mark.parametrize("seed", range(8))
def test_a_recurrence_equals_the_oracle(way, seed):
    r = random.Random(seed)
    T, chunk = r.choice([1, 2, 16, 33, 70]), r.choice([NEVER, 1, 4, 7, 16, 100])
    v, k, g = torch.randn(3, 2, T, 6, dtype=torch.float64).mul(r.choice([1, 1, 1e3])).requires_grad_()
    for xs in ([v], [v, k]):
        hs, expected = scan(xs, g, chunk), [oracle_scan(x, g, chunk) for x in xs]
        assert_equal_with_gradients(torch.stack(list(hs)), torch.stack(expected), [*xs, g], 1e-13)
    given = torch.ones_like(v)
    grad(scan([v], g, chunk)[0], [v, g], given)
    assert (given == 1).all()  # though the loop works in place
    first = grad(scan([v], g.detach(), chunk)[0].square().sum(), v, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):  # where it would be wrong
        first.sum().backward()


def test_a_recurrence_in_bfloat16_sums_in_float32_and_keeps_little(way):
    inputs, saved = [x.requires_grad_() for x in torch.randn(3, 2, 60, 30).bfloat16()], []
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hs = torch.stack(list(scan(inputs[:2], inputs[2], 20)))
    expected = torch.stack([oracle_scan(x, exact[2], 20) for x in exact[:2]])
    assert hs.dtype == torch.bfloat16 and relative_error(hs, expected) < 2**-8
    for ours, theirs in zip(grad(hs.sum(), inputs), grad(expected.sum(), exact)):
        assert relative_error(ours, theirs) < 2**-7
    assert [x.dtype for x in saved] == [torch.float32] + 4 * [torch.bfloat16]  # f; v, k and both results


def test_forget_biases_start_with_memories_of_up_to_a_chunk():
    """log U(1, L-1); chunk size 1 and 2 leave no range."""
    for layers, mean, longest in ("rat:16", 8, 15), ("rnn", 128, 255), ("rat:1", 1, 1):
        memory = Mixer(Config(d_model=8192, layers=layers, context=256)).forget_bias.exp()
        assert memory.min() >= 1 and 0.99 * longest < memory.max() <= longest * 1.0001
        assert memory.mean().item() == pytest.approx(mean, rel=0.05)


def masked_matrix(q, k, v, kind):
    """The layer's attention as one matrix: q, k and v (B, H, T, D), before RoPE."""
    i = torch.arange(k.shape[2])
    q, k = (oracle_rope(x.double(), i, 100.0) for x in (q, k))
    scores = q @ k.mT / math.sqrt(k.shape[3])
    return scores.masked_fill(~kind.visible(i[:, None], i), -math.inf).softmax(-1) @ v.double()


CASES = pytest.mark.parametrize("kind, T", [
    (Kind(2, dilation=D, window=W, sinks=S), T) for D, W, S, T in [
        (16, 0, 0, 600), (3, 5, 2, 300), (300, 0, 0, 700), (NEVER, 20, 4, 300), (4, 300, 1, 700),
        (NEVER, 0, 3, 600), (2, 0, 5, 513), (NEVER, 257, 0, 900), (NEVER, 1, 0, 300), (7, 129, 0, 1000),
    ]
], ids=str)  # fmt: skip


def flex_with_gradients(q, k, v, block_mask, return_aux=None):
    """As one matrix: on a CPU, flex_attention has no gradients."""
    seen = block_mask.mask_mod(0, 0, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -1e30)
    y = scores.softmax(-1) @ v
    return (y, types.SimpleNamespace(lse=scores.logsumexp(-1))) if return_aux else y


@CASES
def test_attention_in_blocks_and_by_flex_attention_equals_the_masked_matrix(kind, T, monkeypatch):
    rope = rat.rotary_table(torch.arange(T), 16, 100.0)
    qkv = [torch.randn(1, 2, T, 16).double().requires_grad_() for _ in range(3)]
    monkeypatch.setattr(rat, "fast_attention", flex_with_gradients)
    for mask in None, rat.block_mask(kind, T, torch.device("cpu")):
        expected, tolerance = masked_matrix(*qkv, kind), 1e-6 if mask else 1e-12  # lse is float32
        assert_equal_with_gradients(rat.attend(*qkv, rope, mask, kind), expected, qkv, tolerance)
    monkeypatch.setattr(rat, "fast_attention", rat.flex_attention)
    qkv = [x.detach().float() for x in qkv]
    assert relative_error(rat.attend(*qkv, rope.float(), mask, kind), expected) < 1e-5


@CASES
def test_block_masks_list_the_blocks_that_somebody_sees(kind, T):
    mask, i = rat.block_mask(kind, T, torch.device("cpu")), torch.arange(T)[:, None]
    j = torch.cat([kind.staying(i), i])[: mask.seq_lengths[1], 0]  # far keys, with a window also near ones
    far, near = torch.arange(len(j)) < len(kind.staying(i)), (i - kind.window <= j) & (j <= i)
    seen = torch.where(far, j < i - kind.window, near)
    padded = torch.nn.functional.pad(seen, [0, -len(j) % 128, 0, -T % 128])
    needed = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=3).any(dim=1)
    for row, n, columns in zip(needed, mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0]):
        assert set(row.nonzero()[:, 0].tolist()) <= set(columns[:n].tolist())
        assert n <= row.sum() + 1  # one may be listed in vain where near keys follow far ones


def test_flex_attention_needs_cuda_a_long_sequence_and_far_keys():
    on_cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    for layers, T, masked in [
        ("rat:16", 2048, True), ("swa:9", 2048, True), ("rat:16", 2047, False), ("rnn", 2048, False),
        ("rat:4096", 2048, False), ("rat+:0", 2048, False),
    ]:  # fmt: skip
        mixer, position = Mixer(Config(layers=layers)), torch.arange(T)
        assert mixer.tables(position)[2] is None
        assert (mixer.tables(position.as_subclass(on_cuda))[2] is not None) == masked


# --- Decoding ---
def logits_in_pieces(model, tokens, pieces):
    cache = model.cache(tokens.shape[0], tokens.shape[1])
    with torch.no_grad():
        return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(pieces, dim=1)], dim=1)


def assert_decodes(model, tokens, pieces, tolerance=1e-4):
    logits, whole = logits_in_pieces(model, tokens, pieces), model(tokens)[0]
    assert relative_error(logits, whole) < tolerance
    assert (logits - whole).abs().max() < tolerance * whole.abs().max()


@every_kind
def test_every_kind_decodes_what_the_forward_pass_computes(layers):
    model, tokens = small_model(layers), torch.randint(50, (3, 45))
    for pieces in [1] * 45, [20] + [1] * 25, [5, 3, 1, 17, 1, 18], [45], [1, 44]:
        assert_decodes(model, tokens, pieces)
    assert_decodes(model.double(), tokens, [7, 38], 1e-12)
    exact = model(tokens)[0]
    assert relative_error(model.bfloat16()(tokens)[0], exact) < 0.1  # without autocast
    assert relative_error(logits_in_pieces(model, tokens, [7, 38]), exact) < 0.1
    for block in model.float().blocks:  # wrapped, as LoRA does: in_proj has no weight of its own
        block.mixer.in_proj = torch.nn.Sequential(block.mixer.in_proj)
    assert_decodes(model, tokens, [7, 1, 1, 36])
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.cache(1, 9)[0]
    assert (cache.keys.dtype, cache.state.dtype) == (torch.bfloat16, torch.float32)  # for long memories


@pytest.mark.parametrize("seed", range(16))
def test_random_hybrids_decode_random_pieces(seed):
    r = random.Random(seed)
    T, layers = r.randint(40, 300), ",".join(random_layer(r) for _ in range(r.randint(1, 3)))
    H, G = r.choice([(1, 1), (4, 2), (6, 3)])
    model = small_model(layers, n_layer=3, n_head=H, d_model=24, qk_groups=G)
    ends = sorted(r.sample(range(1, T), r.randint(1, 6)))
    pieces = [end - start for start, end in zip([0, *ends], [*ends, T])]
    assert_decodes(model, torch.randint(50, (2, T)), pieces)


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 9, 1, 8, 1, 14]], ids=["one by one", "in pieces"])
def test_the_cache_holds_exactly_what_later_tokens_can_see(pieces):
    """Values carry their own position, so the slots can be read back."""
    patterns = itertools.product((1, 2, 3, 5, 16, NEVER), (0, 1, 4, 7), (0, 1, 3, 8))
    for kind in (Kind(1, dilation=D, window=W, sinks=S, rope_base=0) for D, W, S in patterns):
        mixer = Mixer(Config(n_head=1, d_model=2))
        mixer.kind = kind
        cache, t = Cache(mixer, 1, 40), 0
        for piece in torch.arange(40).split(pieces):
            for part in piece.split(1 if t else 40):
                x = part.float().view(1, 1, -1, 1).expand(1, 1, -1, 2)
                cache.attend(x, x, x, *mixer.tables(part))
            t += len(piece)
            used = cache.position[:, 0] < t
            held = cache.position[used, 0]
            for slots in cache.keys, cache.values:
                assert torch.equal(held, slots[0, 0, used, 0].long())
            assert sorted(held.tolist()) == [j for j in range(t) if kind.visible(t - 1, j)]
        assert used.all()  # and no slot is there in vain


def test_a_cache_refuses_what_does_not_fit_and_stays_as_it_was():
    model, tokens = small_model("rat+"), torch.arange(12)[None]
    cache = model.cache(1, 12)
    with pytest.raises(ValueError, match="a cache has no gradients: use torch.no_grad"):
        model(tokens[:, :3], cache=cache)
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
        with pytest.raises(ValueError, match="no room in the cache for token 13"):
            model(tokens[:, :5], cache=cache)
        assert relative_error(model(tokens[:, 8:], cache=cache)[0], model(tokens)[0][:, 8:]) < 1e-4
        model.use("rat+:7:1")
        with pytest.raises(ValueError, match="this cache is for other layers"):
            model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("layers", ["attention", "swa:5", "rnn", "rat:4", "rat+", "rat+:4:8:2"])
def test_a_kinds_decoding_is_one_graph_for_all_lengths(layers):
    model, tally = small_model(layers, n_layer=1), CompileCounter()
    cases = [(torch.randint(50, (1, T)), new) for T, new in ((5, 9), (30, 9), (1, 200))]
    expected = [text(model, *case, temperature=0) for case in cases]
    model.decode = torch.compile(model.decode, backend=tally, fullgraph=True)
    for case, whole in zip(cases, expected):
        assert torch.equal(text(model, *case, temperature=0), whole)
    assert tally.frame_count == 1


@pytest.fixture
def model():
    return small_model("rat:4,swa:3", "bytes", vocab_size=30, n_head=2, d_model=16)


def text(model, prompt, n=12, **options):
    return torch.stack(list(model.generate(prompt, n, **options)), dim=1)


def test_generation_is_the_forward_pass_and_repeats_with_its_seed(model):
    prompt = torch.randint(30, (3, 7))
    tokens = torch.cat([prompt, text(model, prompt, temperature=0)], dim=1)
    assert torch.equal(model(tokens)[0].argmax(-1)[:, 6:-1], tokens[:, 7:])
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-39)):
        assert torch.equal(text(model, prompt, **options), tokens[:, 7:])
    assert torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=3))
    assert not torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=4))
    with pytest.raises(ValueError, match="a token is not in the vocabulary, 0 to 29"):
        text(model, prompt + 29)


def test_generation_stops_at_a_token(model):
    prompt = torch.randint(30, (4, 5))
    free = text(model, prompt, 400, temperature=3.0, seed=5)
    stop = next(token for token in range(30) if all(token in row for row in free))
    stopped = text(model, prompt, 400, temperature=3.0, seed=5, stop=stop)
    ends = [(row == stop).nonzero()[0].item() for row in free]
    assert stopped.shape[1] == max(ends) + 1 < 400 and min(ends) < max(ends)
    for i, end in enumerate(ends):
        assert torch.equal(stopped[i, : end + 1], free[i, : end + 1]) and (stopped[i, end:] == stop).all()


def test_sampling_draws_from_the_distribution_that_was_asked_for():
    logits, ties = torch.tensor([2.0, 1.0, 0.5, -1.0, -math.inf]), torch.tensor([1.0, 1.0, 1.0, 0.0, -9.0])
    p, two = logits.softmax(0), logits.where(logits >= 1, -math.inf).softmax(0)
    half = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    for logits, options, expected in [
        (logits, (1.0, None, None), p), (logits, (0.5, None, None), (logits / 0.5).softmax(0)),
        (logits, (1.0, 2, None), two), (logits, (1.0, None, (p[0] + p[1] / 2).item()), two),
        (logits, (1.0, 99, 1.0), p), (ties, (1.0, 2, None), half), (ties, (1.0, None, 0.5), half),
    ]:  # fmt: skip
        drawn = rat.sample(logits.expand(100_000, -1), *options, torch.Generator().manual_seed(0))
        assert torch.allclose(drawn.bincount(minlength=5) / 100_000, expected, atol=0.01)


def test_neither_chunks_of_the_loss_nor_padding_change_it(model, monkeypatch):
    tokens, targets = torch.randint(30, (2, 4, 33))
    targets[0, 5:20] = -100
    whole, parameters, sizes = model(tokens, targets)[1], list(model.parameters()), []
    monkeypatch.setattr(RAT, "LOSS_CHUNK", 16)
    model.nats = lambda x, y: sizes.append(len(x)) or RAT.nats(model, x, y)
    assert_equal_with_gradients(model(tokens, targets)[1], whole, parameters, 1e-6)
    assert max(sizes) == 16  # never the logits of more tokens
    assert model(tokens, torch.full_like(targets, -100))[1] == 0  # nothing to predict
    with torch.no_grad():
        assert len(model.embedding.weight) == 64
        model.embedding.weight[30:] = 100.0
    assert model(tokens, targets)[1].item() == pytest.approx(whole.item(), rel=1e-6)
    assert model(tokens)[0].shape == (4, 33, 30) and text(model, tokens, 50).max() < 30


def test_a_saved_model_loads_from_file_or_folder_and_runs_no_code(model, tmp_path, monkeypatch):
    path, tokens = tmp_path / "ckpt.pt", torch.randint(30, (2, 20))
    model.save(path, step=7)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 7 and [*tmp_path.iterdir()] == [path]
    for prefix in "", "module.", "_orig_mod.", "module._orig_mod.":
        torch.save(saved | {"model": {prefix + name: x for name, x in saved["model"].items()}}, path)
        loaded = RAT.load(tmp_path)
        assert (loaded.config, loaded.tokenizer) == (model.config, "bytes")
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", lambda contents, path: Path(path).write_text("half of it") and 1 / 0)
        model.save(path)
    assert torch.equal(RAT.load(path)(tokens)[0], model(tokens)[0])
    torch.save(saved | {"tokenizer": Path("any class")}, path)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        RAT.load(path)


@pytest.mark.parametrize("name, layers, refused", [
    ("rat+", "rat+:4", "gated"), ("rat+", "rat+,rat+:4:3:2,rat+:0", "rat:1"), ("gated", "gated:0:5", "rat+"),
    ("rat:4", "rat:16", "rat+"), ("attention", "swa:5", "gated"), ("rnn", "rnn", "rat"),
    ("rat,rat,rat,swa", "rat:4,rat,rat,swa:3", "rat,swa"),
])  # fmt: skip
def test_a_trained_models_numbers_change_and_its_weights_do_not(name, layers, refused, tmp_path):
    model = small_model(name, vocab_size=11, n_layer=4, n_head=2, d_model=12)
    model.save(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="has other weights than one of"):
        model.use(refused)
    assert model.config.layers == name and model.blocks[3].mixer.kind == model.config.kind(3)
    loaded, tokens = RAT.load(tmp_path, layers=layers).double(), torch.randint(11, (2, 40))
    model.double().use(layers, context=100)
    assert model.config == dataclasses.replace(loaded.config, context=100)
    p = dict(model.named_parameters())
    expected = torch.stack([oracle_logits(row, p, model.config) for row in tokens])
    for other in (loaded, model):
        assert relative_error(other(tokens)[0], expected) < 1e-11
        assert relative_error(logits_in_pieces(other, tokens, [17, 1, 1, 21]), expected) < 1e-11


# --- Data ---
BYTES = '{"tokenizer": "bytes", "vocab_size": 257}\n'


def tokens_of(folder, split):
    return np.concatenate([prepare_data.read_shard(path) for path in sorted(folder.glob(f"*{split}*.bin"))])


@pytest.mark.parametrize("shard_tokens", [10, 3000, 10**6])
def test_shards_are_the_documents_or_nothing(tmp_path, shard_tokens):
    def texts():
        yield from (f"document {i} " * (i % 7 + 1) for i in range(2000))
        yield "ünïcödé 漢字"
        if not folder.parent.exists():
            raise OSError("the disk went away")

    folder = tmp_path / "new" / "data"
    with pytest.raises(OSError, match="went away"):
        prepare_data.prepare(texts(), folder, "mine", "bytes")
    assert list(tmp_path.iterdir()) == []
    folder.parent.mkdir()
    prepare_data.prepare(texts(), folder, "mine", "bytes", 10, shard_tokens)
    expected = {"train": [], "val": []}
    for i, words in enumerate(texts()):
        expected["val" if i % 10 == 1 else "train"] += [256, *words.encode()]  # <|endoftext|>, the document
    for split, tokens in expected.items():
        assert tokens_of(folder, split).tolist() == tokens
    assert (folder / "mine_val_000000.bin").read_bytes()[:8] == np.array([20240520, 1], "<i4").tobytes()
    assert (folder / "meta.json").read_text() == BYTES
    prepare_data.prepare(["x" * 100], tmp_path / "single", "mine", "bytes")  # its end is for validation
    assert [len(tokens_of(tmp_path / "single", split)) for split in ("train", "val")] == [91, 11]


def test_text_is_read_in_every_form_each_real_file_once(tmp_path, capsys):
    lines = ['{"text": "line one"}', "not json", '{"text": 5}', "[]", '{"text": "line two", "id": 2}']
    files = {
        "a.TXT": b"plain", "b.md": b"\xef\xbb\xbfmarked", "deep/c.py": b"code = 1", "g.txt": b"caf\xe9",
        "d.jsonl": "\n".join(lines).encode(), "e.txt.gz": gzip.compress(b"zipped"), "k.png": b"PNG",
        "f.jsonl.gz": gzip.compress(b'{"text": "zipped line"}\n'), "i.txt": b"  \n", ".venv/x.py": b"hidden",
        "stories.txt": b"<|endoftext|>\nOnce\n<|endoftext|>\nTwice\n<|endoftext|>",
    }  # fmt: skip
    for name, contents in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(contents)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.TXT")
    found = prepare_data.text_files([tmp_path, tmp_path / "deep" / "c.py", tmp_path / "deep" / ".." / "b.md"])
    texts = ["\nOnce\n", "\nTwice\n", "code = 1", "line one", "line two", "marked", "plain", "zipped"]
    assert sorted(prepare_data.documents(found)) == [*texts, "zipped line"]
    assert "9 files, skipped 4 " in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """Two training shards of 100 and 57 tokens and a validation shard, of ascending tokens; llm.c's names."""
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_train.bin", range(100))
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_train_2.bin", range(100, 157))
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_val.bin", range(50))
    (tmp_path / "meta.json").write_text(BYTES)
    return tmp_path


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own(folder):
    def starts(step, size, seed=1):
        return Data(folder, "train", 10, seed).batch(step, size)[0][:, 0].tolist()

    epochs, ordered = [starts(n, 14) for n in range(3)], [*range(0, 90, 10), *range(100, 150, 10)]
    assert all(sorted(epoch) == ordered for epoch in epochs) and starts(0, 14, seed=2) != epochs[0]
    assert epochs[0] != epochs[1] != epochs[2] != ordered
    for size in (2, 5, 13, 40):  # batches of any size, across epochs, from any step
        for step in range(42 // size):
            assert starts(step, size) == sum(epochs, [])[step * size : (step + 1) * size]
    inputs, targets = Data(folder, "train", 10).batch(1, 5)
    assert (inputs == inputs[:, :1] + np.arange(10)).all()
    assert (targets == inputs + 1).all()  # all tokens are targets, the first of a document too
    ahead = prepare_data.prefetch((10 // step for step in range(5, -1, -1)), depth=3)
    assert [next(ahead) for _ in range(5)] == [2, 2, 3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


@pytest.mark.parametrize("damage, message", [
    (lambda raw: b"<html>" + raw[6:], "not a whole shard"), (lambda raw: raw[:-2], "not a whole shard"),
    (lambda raw: raw[:4] + b"\7" + raw[5:], "not a whole shard"),
    (lambda raw: raw[:500], "not a whole shard"), (lambda raw: raw[:-1] + b"\xff", "holds token 65379, "),
])  # fmt: skip
def test_a_bad_shard_is_refused(folder, damage, message):
    path = folder / "tiny_shakespeare_train.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Data(folder, "train", 9).batch(0, 17)


def test_a_download_survives_faults_and_mends_what_is_damaged(folder, monkeypatch):
    faults, requests = [503, "short", 500], []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.fault = faults.pop(0) if faults else None
            return self.send_error(self.fault) if isinstance(self.fault, int) else super().do_GET()

        def copyfile(self, source, to):
            to.write(source.read(300 if self.fault == "short" else -1))

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    names = [f"edu_fineweb_{part}.bin" for part in ("val_000000", "train_000001", "train_000002")]
    for n, name in enumerate(names):
        prepare_data.write_shard(folder / name, range(1000 + n))
    out, whole = folder / "out", {name: (folder / name).read_bytes() for name in names}
    out.mkdir()
    (out / names[0]).write_bytes(whole[names[0]])
    (out / names[1]).write_bytes(whole[names[1]][:-9])
    url = f"--base_url=http://127.0.0.1:{server.server_port}"
    script("prepare_data.py", "fineweb-edu", "--shards=2", url, f"--out={out}")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert len(requests) == 2 + 3 and f"/{names[0]}" not in requests
    with pytest.raises(ValueError, match="train_000003.bin: HTTP Error 404: .* run this again to continue"):
        script("prepare_data.py", "fineweb-edu", "--shards=3", url, f"--out={out}")


def script(*words, stdin=""):
    """Runs a script's main in the workplace and returns what it printed."""
    main, out = importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main, io.StringIO()
    streams = dict(argv=list(map(str, words)), stdin=io.StringIO(stdin), stdout=out)
    with mock.patch.multiple(sys, **streams), contextlib.chdir(script.folder):
        main()
    return out.getvalue()


script.folder = ROOT
TINY = dict(data="data/mine", n_layer=2, d_model=32, n_head=2, context=32, batch_tokens=512, eval_every=10)
TINY |= dict(eval_tokens=1024, dtype="float32", sample_tokens=0)


def flags(**values):
    return [f"--{name}={value}" for name, value in (TINY | values).items()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, data and a trained checkpoint."""
    script.folder = folder = tmp_path_factory.mktemp("scripts")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"The number {i} follows the number {i - 1}. " * 40)
    script("prepare_data.py", "text", "texts", "--tokenizer=bytes", "--out=data/mine")
    shutil.copytree(folder / "data/mine", folder / "data/gpt2")
    (folder / "data/gpt2/meta.json").unlink()  # as in published shards
    script("train.py", *flags(steps=30))
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b, tolerance=1e-5):
    """Equal losses in every line of the logs, to the tolerance, and nearly equal weights."""
    assert len(log_of(a)) == len(log_of(b))
    for line, other in zip(log_of(a), log_of(b)):
        assert line.keys() == other.keys() and line["step"] == other["step"]
        for name in (name for name in line if "loss" in name):
            assert line[name] == pytest.approx(other[name], rel=tolerance)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * tolerance)
    a, b = (RAT.load(folder).state_dict() for folder in (a, b))
    assert all(relative_error(b[name], a[name]) <= 100 * tolerance for name in a)


def test_training_learns_shows_how_and_times_training_alone(workplace, monkeypatch):
    clock, logged, out = [0.0], [], workplace / "whole"

    def timed(name, seconds):
        def call(*args, original=getattr(train.Trainer, name)):
            clock[0] += seconds
            logged.append(name == "save" and len(log_of(out)))
            return original(*args)

        monkeypatch.setattr(train.Trainer, name, call)

    timed("update", 1.0), timed("evaluate", 50.0), timed("save", 50.0)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    options = dict(steps=30, lr=1e-2, log_every=4, sample_tokens=20, eval_tokens=64)
    printed, log = script("train.py", *flags(**options, out=out)), log_of(out)
    assert [line["step"] for line in log] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert [line["step"] for line in log if "val_loss" in line] == [10, 20, 30]
    assert [n for n in logged if n] == [3, 6, 9]  # saved after the step is in the log
    assert {line["tokens_per_second"] for line in log} == {512.0}
    line = r"\nstep 30/30  train [\d.]+  val [\d.]+  bits_per_byte [\d.]+  512 tokens/s  0:00:00 left"
    assert re.search(line, printed) and "how the model continues" in printed
    assert log[-1]["val_loss"] < log[2]["val_loss"] < 5.6 and log[-1]["lr"] == pytest.approx(1e-6)
    assert log[-1]["bits_per_byte"] == pytest.approx(log[-1]["val_loss"] / math.log(2), rel=0.01)


@pytest.mark.parametrize("layers", [{}, dict(layers="rat+", joint="rat+:4")], ids=["rat", "rat+ jointly"])
def test_a_killed_run_resumes_bit_for_bit(workplace, monkeypatch, layers):
    whole, killed, moved = (workplace / f"{name}{len(layers)}" for name in ("whole", "killed", "moved"))
    options = dict(steps=40, log_every=5, **layers)
    script("train.py", *flags(**options, out=whole))
    command = [sys.executable, ROOT / "train.py", *flags(**options, out=killed)]
    run = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL)
    while not (killed / "ckpt.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    run.kill()
    run.wait()
    moved.mkdir()
    killed.rename(moved / "out")
    saved = torch.load(moved / "out/ckpt.pt", weights_only=True)
    saved["settings"]["device"] = "cuda:7"  # of another machine
    torch.save(saved, moved / "out/ckpt.pt")
    with open(moved / "out/log.jsonl", "a") as log:
        log.write('{"step": 1000}\n{"st')  # of a run that was killed later, in the middle of a line
    monkeypatch.setattr(script, "folder", moved)
    script("train.py", "--resume", "--data=../data/mine")
    assert_same_run(whole, moved / "out", 0)
    script("train.py", "--resume", "--steps=41", "--weight_decay=0.03")
    optimizer = torch.load(moved / "out/ckpt.pt", weights_only=True)["optimizer"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.03, 0.0}


def test_what_is_not_finite_is_never_saved(workplace):
    script("train.py", *flags(steps=10, out="finite"))
    before = (workplace / "finite" / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match=r"step \d+: not finite: .*; a lower --lr may help"):
        script("train.py", "--resume", "--out=finite", "--steps=30", "--lr=1e18", "--clip=0")
    trainer = train.Trainer(RAT(Config(d_model=8)), train.Settings(out=str(workplace / "finite")))
    trainer.update((np.ones((16, 256), dtype=np.int64),) * 2, 1e-3)
    p = trainer.model.norm.weight
    for tensor in (p.data, trainer.optimizer.state[p]["exp_avg_sq"]):
        kept, tensor[3] = tensor[3].item(), math.inf
        with pytest.raises(ValueError, match="step 2: the weights are not finite"):
            trainer.save(2)
        tensor[3] = kept
    assert (workplace / "finite" / "ckpt.pt").read_bytes() == before


def test_micro_batches_recompute_and_compile_change_nothing(workplace, monkeypatch):
    def compile(f, original=torch.compile, **options):
        compiled.append(f.__name__)
        return original(f, backend="aot_eager", **options)

    compiled, again, fast = [], dict(recompute=True), dict(compile=True)
    monkeypatch.setattr(torch, "compile", compile)
    for n, more in enumerate([{}, dict(micro_batch=4), again, fast, again | fast]):
        script("train.py", *flags(steps=10, n_layer=1, layers="rat:4", out=f"run{n}", **more))
        assert_same_run(workplace / "run0", workplace / f"run{n}", 1e-4)
    sample = ["sample.py", "--ckpt=run0", "--temperature=0", "--max_new_tokens=40"]
    assert script(*sample, "--compile=true") == script(*sample)
    assert compiled == 2 * ["nats", "forward"] + ["run_blocks"]


@pytest.mark.parametrize("dense, sparse", [("rat+", "rat+:4"), ("gated", "gated:0:6")])
def test_joint_training_updates_sparse_then_dense(workplace, dense, sparse):
    """The recipe of RAT+ by hand: two whole updates on a batch, one step of the schedule."""
    N, lr, out = 4, 1e-2, f"jointly/{dense}"
    script("train.py", *flags(layers=dense, joint=sparse, steps=N, lr=lr, out=out))
    (line,), trained = log_of(workplace / out), RAT.load(workplace / out)
    torch.manual_seed(1)
    model, losses = RAT(trained.config), {sparse: [], dense: []}
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95))
    data = Data(workplace / "data/mine", "train", 32, 1)
    for step in range(N):  # warmup takes one
        if step:
            rate = 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * (step - 1) / (N - 2))) / 2
            groups[0]["lr"] = groups[1]["lr"] = rate
        for layers in (sparse, dense):
            model.use(layers)
            loss = model(*map(torch.from_numpy, data.batch(step, 16)))[1]
            losses[layers].append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    means = [np.mean(losses[layers]) for layers in (sparse, dense)]
    assert (line["train_loss_sparse"], line["train_loss"]) == pytest.approx(means, rel=1e-5)
    for name, p in trained.state_dict().items():
        assert relative_error(p, model.state_dict()[name]) < 1e-3


def test_another_pattern_and_context_for_evaluation_and_adaptation(workplace):
    def loss(*more):  # evaluation does not need --batch_tokens
        printed = script("train.py", *given, "--eval_only", "--batch_tokens=7", *more)
        return pytest.approx(float(re.search(r"validation loss ([\d.]+)", printed)[1]), abs=1e-4)

    plus, given = workplace / "plus", ["--init_from=plus", "--data=data/mine", "--dtype=float32"]
    script("train.py", *flags(layers="rat+", steps=20, eval_tokens=800, out="plus"))
    line = log_of(plus)[-1]
    assert line["val_loss"] == loss("--eval_tokens=800")
    assert line["val_loss_sparse"] == loss("--eval_tokens=800", "--layers=rat+:64")
    layers = "rat+:1:9,rat+:0:9:2"
    x, y = map(torch.from_numpy, Data(workplace / "data/mine", "val", 64).batch(0, 12))
    expected = RAT.load(plus, layers=layers)(x, y)[1].item()
    assert expected == loss("--eval_tokens=768", "--context=64", f"--layers={layers}")
    more = [*given, "--lr=1e-4", "--warmup=0", "--steps=20", "--batch_tokens=512", "--sample_tokens=0"]
    assert "sparse" not in script("train.py", *more, "--layers=rat+:4:3", "--out=plus/adapted")
    adapted = RAT.load(plus / "adapted")
    assert adapted.config.layers == "rat+:4:3"
    assert adapted(x, y)[1] < RAT.load(plus, layers="rat+:4:3")(x, y)[1]
    assert "train_sparse" in script("train.py", *more, "--out=plus/on")  # dense rat+ is trained jointly


def test_training_works_without_the_tokenizer(workplace, monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", mock.Mock(side_effect=OSError("no network")))
    out = script("train.py", *flags(data="data/gpt2", steps=2, d_model=8, sample_tokens=9, out="gpt2"))
    assert "no bits per byte and no sample: tokenizer gpt2 needs the network once" in out and "---" not in out
    assert RAT.load(workplace / "gpt2").config.vocab_size == 50257
    with pytest.raises(ValueError, match="data/mine is in tokens of bytes, the model of gpt2"):
        script("train.py", "--init_from=gpt2", "--data=data/mine", "--eval_only")


@pytest.mark.parametrize("preset, expected", [
    # 24 x (3.25 + 1 + 8) x 2048^2 + 50304 x 2048 = 1336 M, times 6, plus 3 x 24 x 4 x 2048 x 128.5
    ("rat-1b", "1,336.3 M parameters, 100 B tokens .*\n8.09 GFLOP per token, 809 EFLOP in all\n21.4 GB "),
    ("attention-1b", "1,311.* M p.*\n9.07 GFLOP"), ("rat-swa-200m", "204.* M p.*\n1.30 GFLOP"),
    ("rat+-1b", "1,512.* M p.*\n19.38 GFLOP"), ("rat+-7b", "7,722.* M p.*\n95.94 GFLOP"),
])  # fmt: skip
def test_what_a_preset_needs(workplace, preset, expected):
    assert re.search(expected, script("train.py", f"--preset={preset}", "--steps=0", "--out=needs"))
    assert not (workplace / "needs").exists()
    for r in (*train.PRESETS.values(), vars(train.Settings())):  # a forward pass is a third of a step
        assert r["eval_tokens"] / 3 <= 0.1 * r["eval_every"] * r["batch_tokens"]


def test_the_default_data_is_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "folder", tmp_path)
    assert "0.9 M parameters" in script("train.py", "--steps=0")
    assert len(Data(tmp_path / "data/stdlib", "train", 256)) > 1000


@every_kind
def test_the_operations_of_a_kind_are_those_of_the_keys_that_it_sees(layers):
    kind, i = Config(layers=layers).kind(0), torch.arange(48)
    seen = kind.visible(i[:, None], i).sum().item() if kind.qk_heads else 0
    assert train.mixing_flops(kind, 16, 48) == pytest.approx(4 * 16 * seen / 48)


def torchrun(n, *words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command = [*launch, ROOT / words[0], *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.folder, timeout=120)


def test_processes_share_the_work_and_resume_each_others_runs(workplace):
    """One process, two and three with DDP, two with FSDP: the same losses, to 1e-5, on the same batches."""
    options = dict(steps=6, eval_every=6, device="cpu", layers="rat+,rat", joint="rat+:4,rat")
    options |= dict(batch_tokens=384, warmup=0, lr=1e-3)
    script("train.py", *flags(**options, out="runs/alone"))
    script("train.py", "--resume", "--out=runs/alone", "--steps=12")
    for n, parallel, micro in (2, "ddp", 3), (3, "ddp", 4), (2, "fsdp", 2):
        out = f"runs/{parallel}{n}"
        first = torchrun(n, "train.py", *flags(**options, parallel=parallel, micro_batch=micro, out=out))
        assert first.returncode == 0, first.stderr[-3000:]
        again = ["train.py", "--resume", f"--out={out}", "--steps=12"]
        script(*again) if n == 3 else torchrun(2, *again, "--parallel=ddp")
        assert_same_run(workplace / "runs" / "alone", workplace / out)


def test_fsdp_in_bfloat16_computes_what_one_process_does(workplace):
    options = dict(dtype="bfloat16", steps=6, log_every=1, micro_batch=4, device="cpu", layers="rat,rnn")
    script("train.py", *flags(**options, out="runs/one"))
    run = torchrun(2, "train.py", *flags(**options, parallel="fsdp", out="runs/two"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_run(workplace / "runs/one", workplace / "runs/two", 5e-5)


def test_under_torchrun_a_mistake_and_a_sample_come_once(workplace):
    run = torchrun(2, "train.py", *flags(steps=1))
    assert run.returncode and run.stderr.count("is there already") == 1
    run = torchrun(2, "sample.py", "--prompt=The number", "--max_new_tokens=3")
    assert run.returncode == 0 and run.stdout.count("The number") == 1


def test_targets_count_alike_however_they_are_divided(workplace):
    """Answers alone are targets, of a different number in each row: a micro-batch may have none."""
    x = np.random.default_rng(0).integers(0, 256, (12, 32))
    y = np.where(np.arange(32) < np.arange(12)[:, None] ** 2 % 29, x, -100)
    results = []
    for micro_batch in (12, 4, 1):
        torch.manual_seed(0)
        s = train.Settings(batch_tokens=384, micro_batch=micro_batch, dtype="float32", device="cpu")
        trainer = train.Trainer(RAT(Config(n_layer=1, d_model=32, context=32)), s)
        losses = [trainer.update((x, y), 1e-2)[0].item() for _ in range(3)]
        results.append([*losses, trainer.evaluate((x[:11], y[:11]), "rat:16")])
        assert results[-1] == pytest.approx(results[0], rel=1e-5)


def test_the_beginning_of_a_document_is_learned_and_written(workplace):
    (workplace / "once.jsonl").write_text('{"text": "Once upon a time."}\n' * 2000)
    script("prepare_data.py", "text", "once.jsonl", "--tokenizer=bytes", "--out=data/once")
    script("train.py", *flags(data="data/once", n_layer=1, steps=100, lr=1e-2, out="once"))
    assert script("sample.py", "--ckpt=once", "--max_new_tokens=60", "--top_k=1") == "Once upon a time.\n"


def test_sample_continues_a_prompt_a_file_and_standard_input(workplace, monkeypatch):
    (workplace / "prompt.txt").write_text("The number")
    words = ("sample.py", "--max_new_tokens=20")
    direct = script(*words, "--seed=1", "--prompt=The number")
    assert direct.startswith("The number") and len(direct) > len("The number")
    assert script(*words, "--seed=1", "--prompt_file=prompt.txt") == direct
    assert script(*words, "--seed=1", "--prompt_file=-", stdin="The number") == direct
    assert script(*words, "--seed=1", "--prompt=The number", "--top_k=0", "--top_p=1") == direct
    assert script(*words, "--seed=2", "--prompt=The number") != direct
    three = script(*words, "--num_samples=3", "--temperature=0", "--top_k=5", "--prompt=The")
    texts = {text.strip() for text in re.split(r"\n--- \d\n", three)}
    assert len(texts) == 1 and texts.pop().startswith("The") and three.count("---") == 2
    drawn = [torch.tensor([byte]) for byte in "é漢x".encode()]
    monkeypatch.setattr(RAT, "generate", lambda *_: iter(drawn))
    assert script("sample.py") == "é漢x\n"  # whole characters


def test_bench_times_layers_and_models(workplace):
    def rows(*words):
        with mock.patch.object(bench.Hardware, "times", lambda self, step, n: [step(), 0.01][1:] * n):
            script("bench.py", *words, "--repeats=1", "--json=a.json")
        return json.loads((workplace / "a.json").read_text())["results"]

    sizes = ["--d_model=32", "--n_head=2", "--lengths=64", "--tokens=128", "--sequences=3"]
    layers, modes = rows("--layers=rnn,rat:16", *sizes), ["train", "prefill", "decode"]
    order = [(mode, name) for mode in modes for name in ("attention", "rnn", "rat:16")]
    assert [(row["mode"], row["name"]) for row in layers] == order
    assert {"T", "ms", "ratio", "floor", "tokens_per_second", "memory", "cache"} <= layers[0].keys()
    kv, state = 3 * 2 * 32 * 4, 3 * 32 * 4  # bytes of a key and value, of a state; RAT has 3 chunk ends
    assert [row["cache"] for row in layers[6:]] == [64 * kv, state, (1 + 3) * kv + 2 * state]
    models = rows("model", "--prompt=10", "--max_new_tokens=5", "--batch=2,3", "--layers=rat:16")
    assert [(row["mode"][0], row["T"]) for row in models[::2]] == [("t", 2), ("t", 3), ("g", 2), ("g", 3)]
    assert models[4]["cache"] == 2 * 15 * 4 * 2 * 128 * 4 and models[4]["tokens_per_second"] == 1000.0


MISTAKES = """
--learning_rate=1: there is no --learning_rate: see --lr
--batch_size=1: see --batch_tokens
--max_iters=9: see --steps
--block_size=9: see --context
--step=1: there is no --step: see --steps
--vocab_size=9: there is no --vocab_size
--warmup=100: --warmup=100.0 is a fraction of the steps
--data=a --data=b: --data is given 2 times
--compile=maybe: --compile: invalid boolean value: 'maybe'
--dtype=int8: --dtype: invalid choice: 'int8'
--layers=rat,,swa: there is no layer '': take attention, swa, rnn, rat, rat+, gated, rat:16
--layers=rat:0: there is no layer 'rat:0'
--layers=swa:-1: there is no layer 'swa:-1'
--qk_groups=3: n_head 4 is not a multiple of qk_groups 3
--d_model=100 --n_head=8: d_model 100 is not a multiple of 2 * n_head, 16
--eval_only --out=new: --eval_only needs a checkpoint
--data=data/mine: out/ckpt.pt is there already: --resume continues it
--init_from=out: out/ckpt.pt is there already
--data=data/mine --batch_tokens=500 --out=new: batch_tokens 500 is not a multiple of 1 processes x
--data=data/mine --joint=rat+:4 --out=new: has other weights than one of rat+:4
--data=data/none --out=new: there are no shards data/none/*train*.bin
--resume --out=new: No such file or directory: 'new/ckpt.pt'
--resume --preset=rat-200m: has made 30 steps already: a larger --steps continues it
--resume --d_model=64: --d_model=64: the checkpoint has 32, which cannot change
--resume --batch_tokens=1024: --batch_tokens=1024: the checkpoint has 512
--resume --seed=2: --seed=2: the checkpoint has 1
--resume --layers=rat:4: --layers=rat:4: the checkpoint has rat:16
--resume --steps=40 --data=data/gpt2: data/gpt2 is in tokens of gpt2, the model of bytes
--init_from=out --n_head=4 --out=new: --n_head=4: the checkpoint has 2
prepare_data.py text nothing.txt: there is no file or folder nothing.txt
prepare_data.py text texts --val_every=1: val_every is 1: it must be 2 or more
prepare_data.py text texts --tokenizer=llama: there is no tokenizer llama
prepare_data.py text texts --tokenizer=bytes --out=data/mine: data/mine is there already
sample.py --start=The: there is no --start: see --prompt
sample.py --prompt_file=nowhere.txt: No such file or directory: 'nowhere.txt'
bench.py --lengths=64 --tokens=100: --lengths=64 do not divide --tokens=100
bench.py --modes=training: --modes=training: layer has train,prefill,decode
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_clear_line(workplace, monkeypatch, capsys, line):
    monkeypatch.chdir(workplace)
    line = line if line[0] != "-" else f"train.py {line}"
    command, _, phrase = line.partition(": ")
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as exit:
        prepare_data.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "error: " in error and phrase in error, error
    assert not (workplace / "new" / "ckpt.pt").exists()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="too many values to unpack"):
        prepare_data.run(lambda: [_ for _, _ in [(1, 2, 3)]])


def test_imports_form_no_circle():
    for name, absent in ("prepare_data", {"torch", "rat"}), ("rat", {"prepare_data"}), ("sample", {"train"}):
        code = f"import sys, {name}; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert not absent & set(run.stdout.split()) and run.returncode == 0


def test_the_lesson_fits_a_screen(capsys):
    rat.lesson()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "● ○ ○ ● ·" in "\n".join(lines)  # RAT's query 10: the last chunk's end, and itself


@needs_cuda
@every_kind
@pytest.mark.parametrize("compiled, half", [(False, False), (True, False), (True, True)])
def test_every_kind_on_cuda_equals_that_on_the_cpu(layers, compiled, half):
    config, tolerance = Config(n_layer=1, n_head=4, d_model=64, layers=layers), 0.05 if half else 0.01
    exact, mixer = randomize(Mixer(config)).double(), randomize(Mixer(config)).cuda()
    x = torch.randn(2, 2100, 64)  # long enough for flex_attention, and for the associative scan
    x1, x2 = x.double().requires_grad_(), x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        y1, y2 = exact(x1), (torch.compile(mixer, fullgraph=True) if compiled else mixer)(x2)
    assert relative_error(y2.cpu(), y1) < tolerance
    grads = (grad(y.double().square().sum(), [x, *m.parameters()])
             for y, x, m in ((y1, x1, exact), (y2, x2, mixer)))  # fmt: skip
    for a, b in zip(*grads):
        assert b.isfinite().all() and relative_error(b.cpu(), a) < 2 * tolerance


@needs_cuda
def test_prompts_of_twenty_lengths_on_cuda_compile_few_graphs(monkeypatch):
    """Past torch's limit of recompilations, flex_attention would run uncompiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for layers in ("rat:16", "swa:5", "rat+:4:8:2", "rat+:5:0:3"):
        model, before = small_model(layers, n_layer=1, d_model=64).cuda(), counters["stats"]["unique_graphs"]
        for tokens in (torch.randint(50, (1, T), device="cuda") for T in range(2048, 4048, 100)):
            with torch.no_grad():
                logits = logits_in_pieces(model, tokens, [tokens.shape[1] - 2, 1, 1])
                assert relative_error(logits, model(tokens)[0]) < 1e-2
        assert counters["stats"]["unique_graphs"] - before <= 8


@needs_cuda
@every_kind
def test_a_kinds_decoding_on_cuda_never_waits_for_the_gpu(layers):
    model, tokens = small_model(layers, n_head=4, d_model=64), torch.randint(50, (3, 60))
    expected = model(tokens)[0][:, 20:]
    model, tokens = model.cuda(), tokens.cuda()
    model.decode, cache = torch.compile(model.decode, fullgraph=True, dynamic=False), model.cache(3, 256)
    with torch.no_grad():
        model(tokens[:, :20], cache=cache)
        logits = [model(tokens[:, 20:21], cache=cache)[0]]  # compiles
        torch.cuda.set_sync_debug_mode("error")
        logits += [model(token, cache=cache)[0] for token in tokens[:, 21:].split(1, dim=1)]
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(torch.cat(logits, dim=1).cpu(), expected) < 1e-2


@needs_cuda
@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:16", "rat+:16:4:1"])
def test_a_training_step_on_cuda_never_waits_for_the_gpu(layers):
    model, x = RAT(Config(n_layer=2, context=2304, layers=layers)).cuda(), np.ones((4, 2304), dtype=np.int64)
    trainer = train.Trainer(model, train.Settings(batch_tokens=4 * 2304, micro_batch=2))
    for mode in "default", "error":  # the first step compiles
        torch.cuda.set_sync_debug_mode(mode)
        trainer.update((x, x), 1e-4)
