"""The claims of this repository, tested. `pytest` runs what the machine can; CUDA tests skip without CUDA.

The oracle is the equation at the top of rat.py in its plainest form: float64, one token after the other, all
T x T scores, sharing no code with rat.py. A new kind of layer needs an entry in KINDS and, in `oracle_mixer`,
its visible keys; then `pytest -k kind` checks its training, gradients, decoding and cache.
"""

import contextlib
import copy
import dataclasses
import email.utils
import functools
import gc
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bench
import prepare_data
import rat
import sample
import train
from prepare_data import BadInput, Data, get_tokenizer
from rat import NEVER, RAT, Cache, Config, Kind, Mixer, scan

ROOT = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

KINDS = ["attention", "swa:5", "swa:0", "swa", "rnn", "rat:4", "rat:16", "rat:1", "rat:100", "rat+", "rat+:4"]
KINDS += ["rat+:4:8:2", "rat+:3:2:7", "rat+:5:0:3", "rat+:0", "rat+:0:8:2"]
KINDS += ["gated", "gated:4:3", "gated:0:6:2"]
every_kind = pytest.mark.parametrize("layers", KINDS)
HYBRIDS = [
    dict(layers="rat:4,swa:3"), dict(layers="rat:4, rnn, attention"), dict(layers="rat+,rat+:4:2,rat+:0:0:3"),
    dict(layers="attention,swa:3", rope_base=0.0), dict(layers="rat:4,swa:3", rope_base="0,10000"),
    dict(layers="attention", rope_base="0,100,10000.0"), dict(layers="gated:4:1", qk_groups=3),
]  # fmt: skip
hybrids = pytest.mark.parametrize("settings", HYBRIDS, ids=str)
PATTERNS = [
    Kind(1, dilation=D, window=W, sinks=S)
    for D, W, S in itertools.product((1, 2, 3, 5, 16, NEVER), (0, 1, 4, 7), (0, 1, 3, 8))
]


@pytest.fixture(autouse=True)
def same_inputs_every_time():
    torch.manual_seed(0)
    torch.compiler.reset()


# --- The oracle -----------------------------------------------------------------------------------
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


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def assert_equal_with_gradients(a, b, inputs, tolerance):
    """a and b are equal, and so are their gradients in a random direction."""
    weight = torch.randn_like(b)
    assert a.shape == b.shape and relative_error(a, b) < tolerance
    for one, other in zip(*(grad((y * weight).sum(), inputs, allow_unused=True) for y in (a, b))):
        assert relative_error(one, other) < 10 * tolerance


# --- The layer is the equation --------------------------------------------------------------------
def assert_mixer_equals_the_oracle(config, B, T, seed):
    mixer = randomize(Mixer(config), seed).double()
    x = torch.randn(B, T, config.d_model, dtype=torch.float64, requires_grad=True)
    p = dict(mixer.named_parameters())
    expected = torch.stack([oracle_mixer(row, p, config) for row in x])
    assert_equal_with_gradients(mixer(x), expected, [x, *p.values()], 1e-12)


@every_kind
@pytest.mark.parametrize("T", [1, 33])
def test_every_kind_of_layer_and_its_gradients_equal_the_oracle(layers, T):
    assert_mixer_equals_the_oracle(Config(d_model=32, layers=layers), 2, T, seed=T)


def random_layer(r):
    D, W, S = r.choice([0, 1, 2, 3, 16, 300]), r.choice([0, 0, 1, 9, 260]), r.choice([0, 0, 2, 11])
    names = ["attention", "rnn", f"swa:{W}", f"rat+:{D}:{W}:{S}", f"gated:{D}:{W}:{S}"]
    return r.choice([*names, *(f"rat:{r.choice([1, 2, 7, 16, 64, 90, 400])}" for _ in range(3))])


@pytest.mark.parametrize("seed", range(30))
def test_random_layers_equal_the_oracle(seed):
    """Random kinds and sizes, long enough for several blocks of queries."""
    r = random.Random(seed)
    H, G = r.choice([(1, 2), (2, 2), (4, 2), (6, 3), (3, 1), (4, 4)])
    T, B = r.choice([r.randint(1, 40), r.randint(250, 330)]), r.randint(1, 2)
    sizes = dict(n_head=H, qk_groups=G, d_model=H * r.choice([2, 4, 6]), rope_base=r.choice([0, 100, 1e4]))
    assert_mixer_equals_the_oracle(Config(layers=random_layer(r), **sizes), B, T, seed)


@hybrids
def test_a_model_and_its_gradients_equal_the_oracle(settings):
    config = Config(vocab_size=11, n_layer=4, n_head=2, d_model=12, context=32, **settings)
    model = randomize(RAT(config)).double()
    tokens, p = torch.randint(11, (3, 22)), dict(model.named_parameters())
    targets = tokens.roll(-1, dims=1)
    targets[:, ::5] = -100
    expected = torch.stack([oracle_logits(row, p, config) for row in tokens])
    assert_equal_with_gradients(model(tokens)[0], expected, list(p.values()), 1e-11)
    kept = [(b, t) for b in range(3) for t in range(22) if targets[b, t] != -100]
    nats = -sum(expected.log_softmax(-1)[b, t, targets[b, t]] for b, t in kept) / len(kept)
    for dtype in (torch.int64, torch.int32):
        assert model(tokens.to(dtype), targets.to(dtype))[1].item() == pytest.approx(nats.item(), abs=1e-11)
    assert torch.equal(model(tokens.to(torch.uint16))[0], model(tokens)[0])  # the type in shards


@every_kind
def test_every_kind_in_bf16_autocast_is_near_fp32(layers):
    mixer = randomize(Mixer(Config(d_model=64, layers=layers)))
    x = torch.randn(2, 50, 64, requires_grad=True)
    y = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y16 = mixer(x)
    assert y16.dtype == torch.bfloat16 and relative_error(y16.float(), y) < 0.03
    # 0.03 to 0.05: these weights make sharp softmaxes
    assert relative_error(grad(y16.float().square().sum(), x)[0], grad(y.square().sum(), x)[0]) < 0.1


@pytest.mark.parametrize("layers, lengths, backend", [
    ("rat:16", (64, 20), "inductor"), *((kind, (64, 33, 20, 50), "aot_eager") for kind in KINDS[::3])
])  # fmt: skip
def test_a_reader_compiles_a_kind_and_trains_on_several_lengths_cheaply(layers, lengths, backend):
    """torch.compile(model) as it stands: a graph for the first length, and one or two for all others."""
    tally = CompileCounterWithBackend(backend)
    model = randomize(RAT(Config(vocab_size=50, n_layer=1, d_model=32, layers=layers)))
    compiled, p = torch.compile(model, backend=tally, fullgraph=True), list(model.parameters())
    optimizer = torch.optim.AdamW(p, 1e-3)
    for T in lengths:
        tokens = torch.randint(50, (2, T))
        loss, expected = compiled(tokens, tokens)[1], model(tokens, tokens)[1]
        assert_equal_with_gradients(loss, expected, p, 1e-4)
        with torch.autocast("cpu", torch.bfloat16, enabled=backend == "aot_eager"):
            optimizer.zero_grad()
            model(tokens, tokens)[1].backward()
            optimizer.step()
    assert tally.frame_count <= 3


# --- The recurrence -------------------------------------------------------------------------------
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
def test_a_recurrence_and_its_gradients_equal_the_oracle_in_each_way(way, seed):
    r = random.Random(seed)
    T, chunk = r.choice([1, 2, 16, 33, 70]), r.choice([NEVER, 1, 4, 7, 16, 100])
    v, k, g = torch.randn(3, 2, T, 6, dtype=torch.float64).mul(r.choice([1, 1, 1e3])).requires_grad_()
    hs = torch.stack(list(scan([v, k], g, chunk)))
    expected = torch.stack([oracle_scan(x, g, chunk) for x in (v, k)])
    assert_equal_with_gradients(hs, expected, [v, k, g], 1e-13)
    assert_equal_with_gradients(scan([v], g, chunk)[0], oracle_scan(v, g, chunk), [v, g], 1e-13)
    given = torch.ones(2, T, 6, dtype=torch.float64)
    grad(scan([v], g, chunk)[0], [v, g], given)
    assert (given == 1).all()  # though the loop works in place
    first = grad(scan([v], g.detach(), chunk)[0].square().sum(), v, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):  # where it would be wrong
        first.sum().backward()


def test_a_copy_of_the_file_works_beside_it(tmp_path, monkeypatch):
    """As for somebody who compares a change with the original. With one operator for both, it may crash."""
    (tmp_path / "mine.py").write_text((ROOT / "rat.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    assert repr(mine.loop) != repr(rat.loop)
    x, layer, same = torch.randn(2, 50, 128), Mixer(Config()), mine.Mixer(mine.Config())
    same.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), same(x))


def test_a_recurrence_in_bfloat16_is_as_accurate_as_its_inputs_and_keeps_little(way):
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 60, 30).bfloat16()]
    exact, saved = [x.detach().double().requires_grad_() for x in inputs], []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hs = torch.stack(list(scan(inputs[:2], inputs[2], 20)))
    expected = torch.stack([oracle_scan(x, exact[2], 20) for x in exact[:2]])
    assert hs.dtype == torch.bfloat16 and relative_error(hs.double(), expected) < 2**-8
    weights = torch.randn_like(hs)
    for ours, theirs in zip(grad(hs, inputs, weights), grad(expected, exact, weights.double())):
        assert relative_error(ours.double(), theirs) < 2**-7
    assert [x.dtype for x in saved] == [torch.float32] + 4 * [torch.bfloat16]  # f; v, k and both results


def test_forget_biases_start_with_memories_of_up_to_a_chunk():
    """log U(1, L-1); chunk size 1 and 2 leave no range."""
    bias = Mixer(Config(d_model=4096, layers="rat:16")).forget_bias
    assert 0 <= bias.min() < math.log(1.1) and math.log(14.8) < bias.max() <= math.log(15)
    assert bias.exp().mean().item() == pytest.approx(8, rel=0.05)
    rnn = Mixer(Config(d_model=4096, layers="rnn", context=256)).forget_bias
    assert math.log(250) < rnn.max() <= math.log(255)
    assert (Mixer(Config(layers="rat:1")).forget_bias == 0).all()
    assert not hasattr(Mixer(Config(layers="rat+")), "forget_bias")


# --- Attention ------------------------------------------------------------------------------------
def test_the_positions_that_stay_are_those_that_later_queries_see():
    i, j = torch.arange(40)[:, None], torch.arange(40)
    for kind in PATTERNS:
        dilated = (kind.dilation != NEVER) & ((j + 1) % kind.dilation == 0)
        expected = (j <= i) & ((i - j <= kind.window) | (j < kind.sinks) | dilated)
        assert torch.equal(kind.visible(i, j), expected)
        stays = [t for t in range(40) if kind.visible(10**6 + t, t)]
        assert kind.staying(j[:, None])[:, 0].tolist() == stays
        assert [kind.count(n) for n in range(40)] == [sum(t < n for t in stays) for n in range(40)]


def masked_matrix(q, k, v, kind, base=100.0):
    """The layer's attention as one matrix: q, k and v (B, H, T, D), before RoPE."""
    i = torch.arange(k.shape[2])
    q, k = (oracle_rope(x.double(), i, base) for x in (q, k))
    scores = q @ k.mT / math.sqrt(k.shape[3])
    return scores.masked_fill(~kind.visible(i[:, None], i), -math.inf).softmax(-1) @ v.double()


def pattern(dilation=1, window=0, sinks=0):
    return Kind(2, dilation=dilation, window=window, sinks=sinks)


CASES = [
    (pattern(16), 600), (pattern(3, 5, 2), 300), (pattern(300), 700), (pattern(NEVER, 20, 4), 300),
    (pattern(4, 300, 1), 700), (pattern(NEVER, 0, 3), 600), (pattern(2, 0, 5), 513),
    (pattern(NEVER, 257), 900), (pattern(NEVER, 1), 300), (pattern(7, 129), 1000),  # end at a block's edge
]  # fmt: skip


@pytest.mark.parametrize("kind, T", [*CASES, (pattern(1, 3), 20), (pattern(NEVER), 9)], ids=str)
def test_attention_in_blocks_equals_the_masked_matrix(kind, T):
    qkv = [torch.randn(2, 3, T, 4).double().requires_grad_() for _ in range(3)]
    rope = rat.rotary_table(torch.arange(T), 4, 100.0)
    assert_equal_with_gradients(rat.attend(*qkv, rope, None, kind), masked_matrix(*qkv, kind), qkv, 1e-12)


def flex_on_the_cpu(q, k, v, block_mask, return_aux=None):
    """What flex_attention computes, which on a CPU has no gradients, as one matrix."""
    if not q.requires_grad:
        return rat.flex_attention(q, k, v, block_mask=block_mask, return_aux=return_aux)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = block_mask.mask_mod(0, 0, i, j)
    scores = (q @ k.mT / math.sqrt(q.shape[3])).masked_fill(~seen, -math.inf)
    nothing = ~seen.any(1)[:, None]
    y = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v
    return (y, types.SimpleNamespace(lse=scores.logsumexp(-1))) if return_aux else y


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind, T", CASES, ids=str)
def test_flex_attention_with_its_block_mask_equals_the_masked_matrix(kind, T, gradients, monkeypatch):
    monkeypatch.setattr(rat, "fast_attention", flex_on_the_cpu)
    qkv = [torch.randn(1, 2, T, 16, requires_grad=gradients) for _ in range(3)]
    rope = rat.rotary_table(torch.arange(T), 16, 100.0).float()
    y = rat.attend(*qkv, rope, rat.block_mask(kind, T, torch.device("cpu")), kind)
    expected = masked_matrix(*qkv, kind)
    assert relative_error(y.double(), expected) < 1e-5
    if gradients:
        weights = torch.randn_like(y)
        for ours, theirs in zip(grad(y, qkv, weights), grad(expected, qkv, weights.double())):
            assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind, T", CASES, ids=str)
def test_block_masks_skip_what_nobody_sees_and_nothing_else(kind, T):
    """The mask of the keys that stay, followed by all keys."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    mask, staying = rat.block_mask(kind, T, torch.device("cpu")), kind.staying(i)[:, 0]
    seen = staying < i - kind.window
    near = (j <= i) & (j >= i - kind.window)
    assert torch.equal(seen.sum(1) + near.sum(1), kind.visible(i, j).sum(1))  # no key twice
    if kind.window:  # with none, a query's only near key is its own, and is not in the mask
        seen = torch.cat([seen, near], dim=1)
    assert torch.equal(mask.mask_mod(0, 0, i, torch.arange(seen.shape[1])), seen)
    padded = torch.nn.functional.pad(seen, [0, -seen.shape[1] % 128, 0, -T % 128])
    needed = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(dim=3).any(dim=1)
    for row, n, columns in zip(needed, mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0]):
        listed = columns[:n].tolist()
        assert set(row.nonzero()[:, 0].tolist()) <= set(listed)
        assert len(listed) <= row.sum() + 1  # where far keys end and near ones begin, first and last mislead


@pytest.mark.parametrize("layers, T, D, dtype, expected", [
    ("rat:16", 2048, 16, torch.float32, True), ("rat:16", 2047, 16, torch.float32, False),
    ("rat:16", 2048, 8, torch.float32, False), ("rat:16", 2048, 16, torch.float64, False),
    ("rat+", 2048, 16, torch.float32, False), ("rnn", 2048, 16, torch.float32, False),
    ("swa:100", 2048, 16, torch.float32, True), ("swa:2047", 2048, 16, torch.float32, False),
    ("rat:4096", 2048, 16, torch.float32, False), ("rat+:0", 2048, 16, torch.float32, False),  # no far key
], ids=str)  # fmt: skip
def test_flex_attention_is_for_long_sequences_on_cuda_alone(layers, T, D, dtype, expected):
    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    mixer, position = Mixer(Config(layers=layers, n_head=2, d_model=2 * D)), torch.arange(T)
    assert mixer.tables(position, dtype)[2] is None
    assert (mixer.tables(position.as_subclass(OnCuda), dtype)[2] is not None) == expected


def test_rope_keeps_scores_a_function_of_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        turned = (rat.rotate(x, rat.rotary_table(torch.tensor([t]), 8, 10000.0)) for x, t in ((q, i), (k, j)))
        return math.prod(turned).sum().item()

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-6) != pytest.approx(score(5, 3), rel=1e-3)


# --- Decoding -------------------------------------------------------------------------------------
def logits_in_pieces(model, tokens, pieces):
    cache = model.cache(tokens.shape[0], tokens.shape[1])
    with torch.no_grad():
        return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(pieces, dim=1)], dim=1)


def assert_decodes(model, tokens, pieces, tolerance=1e-4):
    logits, whole = logits_in_pieces(model, tokens, pieces), model(tokens)[0]
    assert relative_error(logits, whole) < tolerance
    assert (logits - whole).abs().max() < tolerance * whole.abs().max()


@every_kind
def test_every_kind_decodes_in_any_pieces_what_the_forward_pass_computes(layers):
    model = randomize(RAT(Config(vocab_size=50, n_layer=2, d_model=32, layers=layers)))
    for pieces in [1] * 45, [20] + [1] * 25, [5, 3, 1, 17, 1, 19], [45], [1, 44]:
        assert_decodes(model, torch.randint(50, (3, sum(pieces))), pieces)
    assert_decodes(model.double(), torch.randint(50, (1, 30)), [7, 23], 1e-12)
    tokens = torch.randint(50, (1, 30))
    exact = model(tokens)[0]
    assert relative_error(model.bfloat16()(tokens)[0].double(), exact) < 0.1  # without autocast
    assert relative_error(logits_in_pieces(model, tokens, [7, 23]).double(), exact) < 0.1


@pytest.mark.parametrize("seed", range(16))
def test_random_hybrids_decode_random_pieces(seed):
    r = random.Random(seed)
    T, layers = r.randint(40, 300), ",".join(random_layer(r) for _ in range(r.randint(1, 3)))
    H, G = r.choice([(1, 1), (4, 2), (6, 3)])
    model = randomize(RAT(Config(50, n_layer=3, n_head=H, d_model=24, qk_groups=G, layers=layers)))
    ends = sorted(r.sample(range(1, T), r.randint(1, 6)))
    pieces = [end - start for start, end in zip([0, *ends], [*ends, T])]
    assert_decodes(model, torch.randint(50, (2, T)), pieces)


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 9, 1, 8, 1, 14]], ids=["one by one", "in pieces"])
def test_the_cache_holds_exactly_what_later_tokens_can_see(pieces):
    """Values carry their own position, so the slots can be read back."""
    for kind in PATTERNS:
        D = 0 if kind.dilation == NEVER else kind.dilation
        layers = f"gated:{D}:{kind.window}:{kind.sinks}"
        mixer = Mixer(Config(n_layer=1, n_head=1, d_model=2, layers=layers, rope_base=0))
        cache, t = Cache(mixer, 1, 40), 0
        for piece in torch.arange(40).split(pieces):
            for part in piece.split(1 if t else 40):
                x = part.float().view(1, 1, -1, 1).expand(1, 1, -1, 2)
                cache.attend(x, x, x, *mixer.tables(part))
            t += len(piece)
            used = cache.position[:, 0] < t
            held = cache.position[used, 0]
            assert torch.equal(held, cache.values[0, 0, used, 0].long())
            assert torch.equal(held, cache.keys[0, 0, used, 1].long())
            assert sorted(held.tolist()) == [j for j in range(t) if kind.visible(t - 1, j)]
        assert used.all()  # and no slot is there in vain


@every_kind
def test_a_kinds_full_cache_gradients_and_other_numbers_are_one_clear_line_and_change_nothing(layers):
    model = randomize(RAT(Config(vocab_size=50, n_layer=2, d_model=32, layers=layers)))
    tokens = torch.arange(12)[None]
    cache = model.cache(1, 12)
    with pytest.raises(ValueError, match="a cache has no gradients: use torch.no_grad"):
        model(tokens[:, :3], cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match="no room in the cache for token 13"):
            model(torch.arange(13)[None], cache=cache)
        model(tokens[:, :8], cache=cache)
        with pytest.raises(ValueError, match="no room in the cache for token 13"):
            model(tokens[:, :5], cache=cache)
        rest = model(tokens[:, 8:], cache=cache)[0]
        assert relative_error(rest, model(tokens)[0][:, 8:]) < 1e-4
        if layers.startswith(("rat+", "gated")):
            model.use(layers.split(":")[0] + ":7:1")
            with pytest.raises(ValueError, match="this cache is for other layers"):
                model(tokens[:, :1], cache=cache)


def test_under_autocast_a_cache_takes_half_the_memory(model):
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.cache(1, 12)
    assert all(c.keys.dtype == torch.bfloat16 and c.state.dtype == torch.float32 for c in cache)


def test_a_bfloat16_model_keeps_its_state_in_float32():
    """Rounded to bfloat16 at every token, a long memory would stop changing."""
    mixer = Mixer(Config(n_layer=1, n_head=1, d_model=8, layers="rnn")).bfloat16()
    cache, h = Cache(mixer, 1, 300, dtype=torch.bfloat16), torch.zeros(1, 8)
    g = torch.full((1, 1, 8), 6.0).bfloat16()
    for t, x in enumerate(torch.rand(300, 1, 1, 8).bfloat16()):
        cache.scan([x], g, torch.tensor([t]))
        h = torch.lerp(x[:, 0].float(), h, torch.sigmoid(g[:, 0].float()))
    assert cache.state.dtype == torch.float32 and relative_error(cache.state[0], h) < 1e-5


def test_cache_memory_is_constant_for_rnn_and_swa_and_a_chunk_end_each_for_rat():
    def numel(tokens, layers):
        cache = Cache(Mixer(Config(layers=layers)), 2, tokens)
        return cache.keys.numel() + cache.values.numel() + cache.state.numel()

    B, d, kv = 2, 128, 2 * 2 * 128  # kv: the keys and values of one position
    assert numel(100, "rnn") == numel(10**6, "rnn") == B * d
    assert numel(100, "swa:9") == numel(10**6, "swa:9") == kv * 10
    assert numel(4096, "attention") == kv * 4096
    assert numel(4097, "rat:16") == kv * (1 + 4096 // 16) + kv  # and the state
    assert numel(4101, "rat+:64:100:4") == kv * (101 + 4 + 4000 // 64 + 1)


class LargestNew(TorchDispatchMode):
    """Notes the largest new tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if not op.is_view and isinstance(out, torch.Tensor):
            inputs = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            self.numbers = max(self.numbers, out.numel() * (out.data_ptr() not in inputs))
        return out


@pytest.mark.parametrize("layers", ["rnn", "swa:9", "attention", "rat:16"])
def test_a_decoding_step_copies_no_cache(layers):
    model = RAT(Config(n_layer=1, d_model=32, layers=layers))
    cache = model.cache(1, 4000)
    addresses = [x.data_ptr() for x in (cache[0].keys, cache[0].values, cache[0].state)]
    token, largest = torch.zeros(1, 1, dtype=torch.long), []
    with torch.no_grad():
        for _ in range(40):
            with LargestNew() as new:
                model.features(token, cache)
            largest.append(new.numbers)
    assert max(largest) == largest[0] <= max(4001, 5 * 32)  # the positions of the slots, or the projections
    assert addresses == [x.data_ptr() for x in (cache[0].keys, cache[0].values, cache[0].state)]


@pytest.mark.parametrize("layers", ["attention", "swa:5", "rnn", "rat:4", "rat+", "rat+:4:8:2"])
def test_a_kinds_decoding_is_one_graph_for_all_tokens_and_for_prompts_of_all_lengths(layers):
    model = randomize(RAT(Config(vocab_size=50, n_layer=1, d_model=32, layers=layers)))
    tally = CompileCounter()
    cases = [(torch.randint(50, (1, T)), new) for T, new in ((5, 9), (30, 9), (1, 200))]
    expected = [text(model, *case, temperature=0) for case in cases]
    model.decode = torch.compile(model.decode, backend=tally, fullgraph=True)
    for case, whole in zip(cases, expected):
        assert torch.equal(text(model, *case, temperature=0), whole)
    assert tally.frame_count == 1


@pytest.mark.parametrize("layers", ["swa:5", "rat:4"])
def test_another_length_batch_or_no_grad_costs_a_kind_one_graph_each(layers):
    model = RAT(Config(vocab_size=50, n_layer=1, d_model=32, layers=layers))
    tally, counts = CompileCounter(), []
    for block in model.blocks:
        block.compile(backend=tally, fullgraph=True, dynamic=False)  # as train.py does
    first, longer, larger, again = (2, 32, True), (2, 48, True), (3, 32, True), (2, 32, False)
    for B, T, gradients in [first, first, longer, larger, again, longer, again]:
        with torch.set_grad_enabled(gradients):
            model(torch.zeros(B, T, dtype=torch.long))
        counts.append(tally.frame_count)
    assert counts == [1, 1, 2, 3, 4, 4, 4]


# --- A layer in somebody's own model --------------------------------------------------------------
@every_kind
def test_a_kind_by_hand_trains_and_decodes_with_positions_from_its_cache(layers):
    """A transformer of the reader's own: two mixers and a norm, a training loop, then tokens in pieces."""
    config = Config(d_model=16, n_head=2, layers=layers)
    mixers = torch.nn.ModuleList([Mixer(config), Mixer(config)])
    norm, optimizer = torch.nn.LayerNorm(16), torch.optim.AdamW(mixers.parameters(), 1e-2)
    x, y = torch.randn(2, 3, 26, 16)

    def forward(x, caches=(None, None)):
        for mixer, cache in zip(mixers, caches):
            x = x + mixer(norm(x), cache)
        return x

    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (forward(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        caches = [Cache(mixer, 3, 26) for mixer in mixers]
        pieces = [forward(piece, caches) for piece in x.split([9, 1, 1, 6, 1, 8], dim=1)]
        assert relative_error(torch.cat(pieces, dim=1), forward(x)) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            caches = [Cache(mixer, 3, 26) for mixer in mixers]
            pieces = [forward(piece, caches) for piece in x.split([9, 1, 16], dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), forward(x)) < 0.02


class LoRA(torch.nn.Module):
    """A wrapper without `weight` or `in_features`."""

    def __init__(self, linear):
        super().__init__()
        self.linear, (out, inside) = linear, linear.weight.shape
        self.down, self.up = torch.nn.Linear(inside, 2, bias=False), torch.nn.Linear(2, out, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("change", ["LoRA", "quantization"])
@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:4", "rat+:4:2"])
def test_wrapped_and_quantized_projections_compute_and_decode(layers, change):
    model = randomize(RAT(Config(vocab_size=50, n_layer=2, d_model=32, layers=layers)))
    tokens, whole = torch.randint(50, (2, 20)), None
    if change == "LoRA":
        whole = model(tokens)[0]
        for block in model.blocks:
            for name in ("in_proj", "out_proj"):
                lora = LoRA(getattr(block.mixer, name))
                torch.nn.init.zeros_(lora.up.weight)
                setattr(block.mixer, name, lora)
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    if whole is not None:
        assert torch.equal(model(tokens)[0], whole)
        assert_decodes(model, tokens, [7, 1, 1, 11])
    else:  # activations are quantized with the range of what comes in together: near, not equal
        logits = logits_in_pieces(model, tokens, [7, 1, 1, 11])
        assert relative_error(logits, model(tokens)[0]) < 0.2


# --- The language model ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    config = Config(vocab_size=30, n_layer=2, n_head=2, d_model=16, context=32, layers="rat:4,swa:3")
    return randomize(RAT(config, "bytes"))


def text(model, prompt, n=12, **options):
    return torch.stack(list(model.generate(prompt, n, **options)), dim=1)


def test_greedy_generation_takes_the_likeliest_token_of_the_forward_pass(model):
    prompt = torch.randint(30, (3, 7))
    tokens = torch.cat([prompt, text(model, prompt, temperature=0)], dim=1)
    assert torch.equal(model(tokens)[0].argmax(-1)[:, 6:-1], tokens[:, 7:])
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-39), dict(temperature=1e-6)):
        assert torch.equal(text(model, prompt, **options), tokens[:, 7:])


def test_generation_streams_and_repeats_with_its_seed(model):
    prompt = torch.randint(30, (2, 5))
    assert next(model.generate(prompt, 12, seed=3)).shape == (2,)
    assert torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=3))
    assert not torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=4))
    assert not torch.equal(text(model, prompt), text(model, prompt))


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
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -math.inf])
    p, two = logits.softmax(0), torch.tensor([2.0, 1.0, -math.inf, -math.inf, -math.inf]).softmax(0)
    ties, half = torch.tensor([1.0, 1.0, 1.0, 0.0, -9.0]), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    for logits, options, expected in [
        (logits, (1.0, None, None), p), (logits, (0.5, None, None), (logits / 0.5).softmax(0)),
        (logits, (1.0, 2, None), two), (logits, (1.0, None, (p[0] + p[1] / 2).item()), two),
        (logits, (1.0, 99, 1.0), p), (ties, (1.0, 2, None), half), (ties, (1.0, None, 0.5), half),
    ]:  # fmt: skip
        drawn = rat.sample(logits.expand(100_000, -1), *options, torch.Generator().manual_seed(0))
        assert torch.allclose(drawn.bincount(minlength=5) / 100_000, expected, atol=0.01)
    for options in ((1.0, 1, None), (1.0, None, 1e-3), (1e-39, None, None), (0, None, None)):
        drawn = rat.sample(ties.expand(1000, -1), *options, torch.Generator())
        assert (drawn == 0).all()  # the first of equals


class Largest(TorchDispatchMode):
    """The most tokens whose logits were in one tensor."""

    tokens = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (30,):
            self.tokens = max(self.tokens, out.numel() // 30)
        return out


def test_the_loss_in_chunks_is_the_loss(model, monkeypatch):
    tokens, targets = torch.randint(30, (2, 4, 33))
    targets[0, 5:20] = -100
    whole, parameters = model(tokens, targets)[1], list(model.parameters())
    monkeypatch.setattr(RAT, "LOSS_CHUNK", 16)
    compiled = torch.compile(model.nats, fullgraph=True, backend="aot_eager")  # as train.py does
    for nats in (model.nats, compiled):
        chunked = copy.copy(model)
        chunked.nats = nats
        with Largest() if nats == model.nats else contextlib.nullcontext() as largest:
            loss = chunked(tokens, targets)[1]
            grads = grad(loss, parameters)
        assert largest is None or largest.tokens == 16  # never the logits of more tokens than a chunk's
        assert torch.allclose(whole, loss)
        for one, other in zip(grads, grad(whole, parameters, retain_graph=True)):
            assert relative_error(one, other) < 1e-5
    assert model(tokens, torch.full_like(targets, -100))[1] == 0  # nothing to predict


def test_recomputing_blocks_changes_memory_and_no_gradient(model):
    tokens, targets = torch.randint(30, (2, 2, 33))
    kept, grads = [], []
    for recompute in (False, True):
        run = train.Run(copy.deepcopy(model), train.Settings(recompute=recompute), 2)
        sizes = []
        with saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            loss = run.loss(tokens, targets)
        kept.append(sum(sizes))
        grads.append(grad(loss, list(run.model.parameters())))
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_padding_of_the_vocabulary_is_invisible(model):
    model, tokens = copy.deepcopy(model), torch.zeros(4, 3, dtype=torch.long)
    assert model.embedding.weight.shape[0] == 64 and model(tokens)[0].shape == (4, 3, 30)
    before = model(tokens, tokens + 1)[1]
    with torch.no_grad():
        model.embedding.weight[30:] = 100.0
    assert torch.equal(model(tokens, tokens + 1)[1], before) and text(model, tokens, 50).max() < 30


COUNTED = ["attention", "rnn", "rat:7", "swa:9", "rat+:8:5:2", "gated", "rat:4,swa:9"]


@pytest.mark.parametrize("layers", COUNTED)
def test_counted_operations_are_those_that_are_needed(layers, monkeypatch):
    """The weights' products as a counter sees them run, and two of width d for each key that a query sees."""
    config = Config(vocab_size=64, n_layer=2, n_head=2, d_model=16, context=48, layers=layers)
    monkeypatch.setattr(rat, "attend", lambda q, k, v, *_: v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        RAT(config)(torch.zeros(1, 48, dtype=torch.long))
    i, kinds = torch.arange(48), [config.kind(layer) for layer in range(2)]
    seen = sum(kind.visible(i[:, None], i).sum().item() for kind in kinds if kind.qk_heads)
    expected = 3 * (counter.get_total_flops() + 4 * 16 * seen) / 48
    assert bench.flops_per_token(config) == pytest.approx(expected, rel=1e-9)


def test_a_saved_model_loads_as_it_was_and_a_failed_save_leaves_the_old_one(model, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    model.save(path, step=7)
    loaded, tokens = RAT.load(path), torch.randint(30, (2, 20))
    assert loaded.config == model.config and loaded.tokenizer == "bytes"
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert torch.load(path, weights_only=True)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    monkeypatch.setattr(torch, "save", lambda contents, path: Path(path).write_text("half of it") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(path)
    assert torch.equal(RAT.load(path)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name, layers", [
    ("rat+", "rat+:4"), ("rat+:1", "rat+,rat+:4:3:2,rat+:0"), ("gated", "gated:0:5"), ("rat:4", "rat:16"),
    ("attention", "swa:5"),
])  # fmt: skip
def test_a_trained_models_numbers_are_set_when_it_is_loaded_or_in_place(name, layers, tmp_path):
    model = randomize(RAT(Config(vocab_size=11, n_layer=4, n_head=2, d_model=12, context=32, layers=name)))
    model.save(tmp_path / "ckpt.pt")
    loaded, tokens = RAT.load(tmp_path / "ckpt.pt", layers=layers).double(), torch.randint(11, (2, 40))
    model.double().use(layers, context=100)
    p, config = dict(model.named_parameters()), dataclasses.replace(model.config, layers=layers)
    assert model.config == dataclasses.replace(loaded.config, context=100)
    expected = torch.stack([oracle_logits(row, p, config) for row in tokens])
    for other in (loaded, model):
        assert relative_error(other(tokens)[0], expected) < 1e-11
        assert relative_error(logits_in_pieces(other, tokens, [17, 1, 1, 21]), expected) < 1e-11


def test_numbers_that_need_other_weights_are_refused_and_change_nothing(tmp_path):
    for name, others in {
        "rat:16": ("attention", "rnn", "rat+", "swa:5", "gated"), "rat+": ("gated", "attention", "rat:1"),
        "gated": ("attention", "rat+"), "rat:4,rat:4,rat:4,swa:3": ("rat:4,swa:3", "rat:4"),
    }.items():  # fmt: skip
        model = RAT(Config(layers=name, qk_groups=4))
        model.save(tmp_path / "ckpt.pt")
        for other in others:
            with pytest.raises(ValueError, match="has other weights than one of"):
                model.use(other)
            with pytest.raises(ValueError, match="has other weights than one of"):
                RAT.load(tmp_path / "ckpt.pt", layers=other)
        assert model.config.layers == name and model.blocks[0].mixer.kind == model.config.kind(0)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


@pytest.mark.parametrize("call, message", [
    (lambda m: Config(d_model=130), r"d_model 130 is not a multiple of 2 \* n_head, 8"),
    (lambda m: Config(qk_groups=3), "n_head 4 is not a multiple of qk_groups 3"),
    (lambda m: Config(layers="rat,sw"), "there is no layer 'sw': take attention, swa, rnn, rat, rat"),
    (lambda m: Config(layers="rat,,swa"), "there is no layer ''"),
    (lambda m: Config(layers="rat+:1:x"), r"there is no layer 'rat\+:1:x'"),
    (lambda m: Config(layers="rat:16:4"), "there is no layer 'rat:16:4'"),
    (lambda m: Config(layers="swa:-1"), "there is no layer 'swa:-1'"),
    (lambda m: Config(layers="rat:0"), "there is no layer 'rat:0'"),
    (lambda m: m(torch.full((1, 3), 30)), "a token is not in the vocabulary, 0 to 29"),
    (lambda m: m(torch.full((1, 3), -1)), "a token is not in the vocabulary, 0 to 29"),
    (lambda m: text(m, torch.full((1, 3), 30)), "a token is not in the vocabulary, 0 to 29"),
])  # fmt: skip
def test_what_cannot_be_is_one_clear_line(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(model))


def test_training_with_gpt2s_vocabulary_takes_bounded_memory():
    """Logits of 50257 tokens, in pieces of changing size: an allocator that keeps all it frees takes 7 GB."""
    code = """
import resource, train, torch
run = train.Run(train.RAT(train.Config(vocab_size=50257)), train.Settings(dtype="float32"), 24)
for rows in (24, 23):
    x = torch.randint(50257, (rows, 256))  # 6144 tokens, and 5888: two pieces each
    run.update([(x, x, 1.0)], 1e-3)
    with torch.no_grad():
        run.loss(x, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""
    options = dict(cwd=ROOT, capture_output=True, text=True, check=True)
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert float(result.stdout) < 4.5  # GB; it takes 3.2


# --- The papers' checkpoints, made from the oracle's parameters -----------------------------------
OFFICIAL = {
    "attention": (dict(layers="attention"), "vqk"),
    "rnn": (dict(layers="rnn"), "zvg"),
    "rat": (dict(layers="rat"), "zvgqk"),
    "rat L=4, four groups": (dict(layers="rat:4", qk_groups=4), "zvgqk"),
    "rat,swa": (dict(layers="rat,swa:7"), "zvgqk,vqk"),
    "rat+ D=4 W=3 S=2": (dict(layers="rat+:4:3:2"), "zqkvg"),
    "gated": (dict(layers="gated"), "zqkv"),
}


def official(settings, rows, vocab_size=30, d=16, H=4, n_layer=2):
    """Random parameters, as the oracle takes them and as the papers' code names and orders them."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=draw) * (0.3 if len(shape) == 2 else 1)

    embedding, norm = tensor(vocab_size, d), tensor(d)
    ours = {"embedding.weight": embedding, "norm.weight": norm}
    theirs = {"embedding.wte.weight": embedding, "backbone.ln.weight": norm, "head.lm_head.weight": embedding}
    for n in range(n_layer):
        order, name = (text.split(",")[n % len(text.split(","))] for text in (rows, settings["layers"]))
        name = name.split(":")[0]
        heads = settings.get("qk_groups", 2) if name == "rat" else H
        part = {c: tensor(heads * d // H if c in "qk" else d, d) for c in order}
        here, there = f"blocks.{n}.", f"backbone.layers.{n}."
        ours[here + "mixer.in_proj.weight"] = torch.cat([part[c] for c in "zvgqk" if c in order])
        theirs[there + "seq_layer.in_proj.weight"] = torch.cat([part[c] for c in order])
        for mine, other, *shape in [
            ("mixer.out_proj", "seq_layer.out_proj", d, d), ("mixer_norm", "seq_layer.input_norm", d),
            ("mlp.0", "hidden_layer.fc1", 4 * d, d), ("mlp.2", "hidden_layer.fc2", d, 4 * d),
            ("mlp_norm", "hidden_layer.ln", d),
        ]:  # fmt: skip
            ours[f"{here}{mine}.weight"] = theirs[f"{there}{other}.weight"] = tensor(*shape)
        if name in ("rat", "rnn"):
            ours[here + "mixer.forget_bias"] = theirs[there + "seq_layer.gate_bias"] = tensor(d)
    return {name: tensor.double() for name, tensor in ours.items()}, theirs


@pytest.mark.parametrize("settings, rows", OFFICIAL.values(), ids=OFFICIAL)
def test_official_checkpoints_of_every_kind_give_the_oracles_logits(settings, rows, tmp_path):
    ours, theirs = official(settings, rows)
    torch.save({"task": {f"_orig_mod.{n}": x for n, x in theirs.items()}, "step": 7}, tmp_path / "theirs.pt")
    tokens, names = torch.randint(30, (2, 21)), list(theirs)
    for source in (theirs, tmp_path / "theirs.pt"):
        m = prepare_data.load_official(source, n_head=4, **settings)
        assert (m.config.n_layer, m.config.d_model, m.config.context, m.tokenizer) == (2, 16, 4096, "")
        expected = torch.stack([oracle_logits(row, ours, m.config) for row in tokens])
        assert relative_error(m.double()(tokens)[0], expected) < 1e-11
    assert list(theirs) == names  # the dict that was given is as it was


def test_an_official_checkpoint_takes_the_papers_settings_where_none_are_given():
    theirs = official(dict(layers="rat,swa"), "zvgqk,vqk", d=512)[1]
    config = prepare_data.load_official(theirs, layers="rat,swa").config
    assert (config.n_head, config.qk_groups) == (4, 2)
    assert (config.kind(0).restart, config.kind(1).window) == (16, 1024)


def test_a_mismatched_official_checkpoint_is_one_clear_line_that_names_the_tensor(tmp_path):
    theirs, layer = official(*OFFICIAL["rat"])[1], "backbone.layers.0.seq_layer"
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for message, source, settings in [
        ("layers 'rat', n_head 4, qk_groups 4: .*blocks.0.mixer.in_proj.*64, 16", theirs, dict(qk_groups=4)),
        (r"blocks.1.mixer.in_proj.weight.*\[64, 16\]", theirs, dict(layers="rat,swa")),
        ("Missing.*blocks.1.mlp.0", {k: v for k, v in theirs.items() if "1.hidden_layer.fc1" not in k}, {}),
        ("Unexpected key.*blocks.0.mixer.extra", theirs | {f"{layer}.extra": torch.ones(1)}, {}),
        ("head.lm_head.weight is not embedding", theirs | {"head.lm_head.weight": torch.zeros(30, 16)}, {}),
        ("Missing key.*blocks.2", theirs, dict(n_layer=3)),
        ("lacks embedding.wte.weight", {}, {}),
        ("neither a dict of tensors", {"task": 3}, {}),
        ("there is no checkpoint nowhere.pt", "nowhere.pt", {}),
        ("cannot read .*noise.pt: it is damaged", tmp_path / "noise.pt", {}),
    ]:
        with pytest.raises(BadInput, match=message) as error:
            prepare_data.load_official(source, **dict(n_head=4, layers="rat") | settings)
        assert "\n" not in str(error.value)


def test_an_official_checkpoint_runs_no_code_and_may_hold_an_easydict(tmp_path, monkeypatch):
    theirs, path = official(*OFFICIAL["rat"])[1], tmp_path / "theirs.pt"
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    config = module.EasyDict(model=module.EasyDict(depth=2))
    config.lr = 1e-3
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module)
        torch.save({"task": theirs, "config": config}, path)
    assert prepare_data.load_official(path, layers="rat", n_head=4).config.d_model == 16
    torch.save({"task": theirs, "config": Malicious()}, path)
    with pytest.raises(BadInput, match="which is code; if you trust it"):
        prepare_data.load_official(path, layers="rat", n_head=4)


# --- Data -----------------------------------------------------------------------------------------
def shards_of(folder, split):
    return [prepare_data.read_shard(path) for path in sorted(Path(folder).glob(f"*_{split}_*.bin"))]


def test_shards_are_the_documents_each_after_an_end_of_text(tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(50)] + ["ünïcödé <|endoftext|> 漢字"]
    prepare_data.prepare(texts, tmp_path / "data", "mine", "bytes", val_every=10, shard_tokens=300, workers=3)
    expected = {"train": [], "val": []}
    for i, words in enumerate(texts):
        expected["val" if i % 10 == 1 else "train"] += [256, *words.encode()]
    for split, tokens in expected.items():
        shards = shards_of(tmp_path / "data", split)
        assert np.concatenate(shards).tolist() == tokens and all(len(shard) == 300 for shard in shards[:-1])
    raw = (tmp_path / "data" / "mine_train_000005.bin").read_bytes()
    assert raw[:12] == np.array([20240520, 1, 300], "<i4").tobytes() and len(raw) == 1024 + 2 * 300


def test_a_single_document_gives_its_end_to_validation(tmp_path):
    prepare_data.prepare(["x" * 100], tmp_path / "data", "mine", "bytes")
    assert [len(shards_of(tmp_path / "data", split)[0]) for split in ("train", "val")] == [91, 11]


def test_prepare_reads_text_of_every_form_and_counts_what_it_skips(tmp_path):
    lines = ['{"text": "line one"}', '{"text": "half \\ud800"}', "not json", '{"text": 5}', '{"id": 1}', "[]"]
    lines += ['{"prompt": "2 + 3 =", "answer": "5"}', '{"answer": "5"}', '{"prompt": "2 + 3 =", "answer": 5}']
    lines += ['{"prompt": "2 + 3 =", "answer": " "}']
    files = {
        "a.txt": b"plain", "b.md": b"\xef\xbb\xbfmarked", "deep/c.py": b"code = 1", "g.txt": b"caf\xe9",
        "d.jsonl": "\n".join([*lines, "[" * 100_000, '{"text": "line two", "id": 2}']).encode(),
        "e.txt.gz": gzip.compress(b"zipped"), "f.jsonl.gz": gzip.compress(b'{"text": "zipped line"}\n'),
        "j.txt.gz": gzip.compress(b"broken" * 99)[:-9], "k.png": b"PNG", "h.txt": b"a\0b", "i.txt": b"  \n",
    }  # fmt: skip
    for name, contents in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(contents)
    skipped = Counter()
    documents = list(prepare_data.documents(prepare_data.text_files([tmp_path], skipped), skipped))
    documents.remove([("2 + 3 =", False), ("5", True)])
    texts = ["code = 1", "line one", "line two", "marked", "plain", "zipped", "zipped line"]
    assert sorted(documents) == [[(text, True)] for text in texts]
    assert skipped == {"files without text in UTF-8": 3, "files with other endings": 1,
                       "lines that are not JSON with text, or prompt and answer": 9,
                       "files that cannot be read": 1}  # fmt: skip


def test_prepare_leaves_nothing_half_made(tmp_path):
    def texts():
        yield from ["one", "two", "three"]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        prepare_data.prepare(texts(), tmp_path / "data", "mine", "bytes")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.partial").mkdir()  # somebody's own
    (tmp_path / "data.partial" / "old_train_000009.bin").write_bytes(b"old")
    prepare_data.prepare(["one", "two"], tmp_path / "data", "mine", "bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.partial"]
    assert (tmp_path / "data.partial" / "old_train_000009.bin").read_bytes() == b"old"
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == ["meta.json", "mine_train_000000.bin", "mine_val_000000.bin"]
    with pytest.raises(BadInput, match="is there already: choose another folder"):
        prepare_data.prepare(["three", "four"], tmp_path / "data", "mine", "bytes")
    assert [len(shards_of(tmp_path / "data", split)[0]) for split in ("train", "val")] == [4, 4]


def test_of_two_preparations_at_once_one_is_there_and_whole(tmp_path):
    """Each is under way while the other one is, and either may end first."""
    texts = [[f"{name} {n} " * 9 for n in range(99)] for name in ("one", "two")]
    barrier, errors = threading.Barrier(2), []

    def documents(mine):
        yield from mine[:50]
        barrier.wait(60)
        yield from mine[50:]

    def prepare(mine):
        try:
            prepare_data.prepare(documents(mine), tmp_path / "data", "mine", "bytes", workers=1)
        except OSError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=prepare, args=(mine,)) for mine in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and "Directory not empty" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (train,), (val,) = (shards_of(tmp_path / "data", split) for split in ("train", "val"))
    lengths = [len(train) + len(val) == sum(len(text) + 1 for text in mine) for mine in texts]
    assert any(lengths) and (tmp_path / "data" / "meta.json").exists()


def test_two_first_runs_at_once_both_succeed(tmp_path):
    """Both prepare the default data, and train on the one that is there first."""
    flags = "--n_layer=1 --d_model=16 --n_head=1 --context=32 --batch_tokens=64 --eval_tokens=64 --steps=1"
    command = [sys.executable, ROOT / "train.py", *flags.split(), "--sample_tokens=0"]
    options = dict(cwd=tmp_path, stdout=subprocess.DEVNULL)
    runs = [subprocess.Popen([*command, f"--out={name}"], **options) for name in "ab"]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["stdlib"]
    assert sorted(path.name for path in tmp_path.glob("*/ckpt.pt")) == ["ckpt.pt"] * 2


@pytest.mark.parametrize("meta", [
    '{"tokenizer": "bytes", "vocab_size": Infinity, "end_of_text": 256}', "[" * 100_000, "5", "", "\xff",
    '{"tokenizer": "bytes", "vocab_size": 70000, "end_of_text": 256}',
    '{"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 257}', '{"vocab_size": 257}',
], ids=lambda text: text[:70])  # fmt: skip
def test_a_damaged_meta_json_is_one_clear_line(meta, folder):
    (folder / "meta.json").write_bytes(meta.encode("latin-1"))
    with pytest.raises(BadInput, match="meta.json is damaged, expected something like"):
        Data(folder, "train", 10)


def test_the_checksum_of_data_changes_with_what_it_holds(folder, monkeypatch):
    def checksum():
        return Data(folder, "train", 10).checksum()

    before, path = checksum(), folder / "x_train_000001.bin"
    assert checksum() == before
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\1")
    assert checksum() != before
    path.write_bytes(raw)
    assert checksum() == before
    prepare_data.write_shard(folder / "x_train_000002.bin", range(20))
    longer = checksum()
    assert longer != before
    for n, tokens in enumerate((100, 57, 20)):
        (folder / f"x_train_00000{n}.mask").write_bytes(b"\1" * tokens)
    assert checksum() != longer


@pytest.fixture
def folder(tmp_path):
    """Two training shards of 100 and 57 tokens and a validation shard, of ascending tokens."""
    prepare_data.write_shard(tmp_path / "x_train_000000.bin", range(100))
    prepare_data.write_shard(tmp_path / "x_train_000001.bin", range(100, 157))
    prepare_data.write_shard(tmp_path / "x_val_000000.bin", range(50))
    (tmp_path / "meta.json").write_text(json.dumps(prepare_data.BYTES))
    return tmp_path


def test_an_epoch_shows_every_window_once_in_an_order_that_only_the_seed_sets(folder):
    data, starts = Data(folder, "train", 10, seed=1), [*range(0, 90, 10), *range(100, 150, 10)]
    assert len(data) == 9 + 5  # 99 and 56 targets
    epochs = [data.batch(epoch, 14)[0][:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == starts for epoch in epochs) and epochs[0] != epochs[1] != epochs[2] != starts
    inputs, targets = data.batch(1, 5)
    assert (inputs == inputs[:, :1] + np.arange(10)).all() and (targets == inputs + 1).all()
    assert Data(folder, "train", 10, seed=2).batch(0, 14)[0][:, 0].tolist() != epochs[0]
    flat = sum(epochs, [])
    for size in (2, 5, 13, 40):  # batches of any size, across epochs, from any step, by one process or two
        for step in reversed(range(42 // size)):
            expected = flat[step * size : (step + 1) * size]
            assert Data(folder, "train", 10, seed=1).batch(step, size)[0][:, 0].tolist() == expected
            halves = [data.batch(step, size, rows)[0] for rows in (slice(size // 2), slice(size // 2, size))]
            assert np.concatenate(halves)[:, 0].tolist() == expected


def test_prefetch_runs_ahead_and_passes_errors_on():
    def numbers():
        for n in range(10):
            seen.append(n)
            yield n
        raise ValueError("no more")

    seen, ahead = [], prepare_data.prefetch(numbers(), depth=3)
    assert next(ahead) == 0
    deadline = time.time() + 10
    while len(seen) < 4 and time.time() < deadline:
        time.sleep(0.01)
    assert 4 <= len(seen) <= 5
    with pytest.raises(ValueError, match="no more"):
        list(ahead)


def test_every_token_is_a_target_the_first_of_a_document_too(tmp_path):
    prepare_data.prepare(["abc", "val", "defg"], tmp_path / "data", "mine", "bytes")
    inputs, targets = Data(tmp_path / "data", "train", 8).windows(np.array([0]))
    assert inputs[0].tolist() == [256, *b"abc", 256, *b"def"]
    assert targets[0].tolist() == [*b"abc", 256, *b"defg"]


@pytest.mark.parametrize("damage, message", [
    (lambda raw: b"<html>" + raw[6:], "is not a shard: it begins with"),
    (lambda raw: raw[:4] + b"\7" + raw[5:], "is a shard of version 7, not 1"),
    (lambda raw: raw[:-2], "has 1222 bytes, its header says 1224"),
    (lambda raw: raw[:500], "has 500 bytes"),
    (lambda raw: b"", "is not a shard"),
    (lambda raw: raw[:8] + bytes(4) + raw[12:1024], "is a shard of 0 tokens by its header"),
    (lambda raw: raw[:8] + b"\xff" * 4 + raw[12:1022], "is a shard of -1 tokens by its header"),
    (lambda raw: raw[:-2] + b"\xff\xff", "holds token 65535, its tokenizer has 257"),
], ids=["html", "version", "short", "header", "empty", "no tokens", "-1 tokens", "token"])  # fmt: skip
def test_bad_shards_are_one_clear_line(folder, damage, message):
    path = folder / "x_train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=message):
        Data(folder, "train", 99).batch(0, 1)


def test_only_answers_and_where_they_end_are_targets_of_prompts_and_answers(tmp_path, monkeypatch):
    """Prompt and answer are tokenized apart: no token straddles them."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 257}
    special = {"<|endoftext|>": 256}
    tokenizer = prepare_data.tiktoken.Encoding(
        "merging", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(prepare_data, "get_tokenizer", lambda name: tokenizer)
    lines = ['{"prompt": "xa", "answer": "bab"}', '{"text": "val"}', '{"text": "ab"}']
    lines += ['{"prompt": "", "answer": "c"}']
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    documents = prepare_data.documents([tmp_path / "lines.jsonl"], Counter())
    prepare_data.prepare(documents, tmp_path / "data", "mine", "merging", shard_tokens=6)
    train = Data(tmp_path / "data", "train", 3)
    assert np.concatenate(train.shards).tolist() == [256, *b"xab", 257, 256, 257, 256, *b"c"]
    assert np.concatenate(train.masks).tolist() == [1, 0, 0, 1, 1, 1, 1, 1, 1]
    inputs, targets = train.windows(np.array([0]))
    assert inputs.tolist() == [[256, *b"xa"]] and targets.tolist() == [[-100, -100, *b"b"]]


def test_without_prompts_there_are_no_masks_and_a_shard_without_its_mask_is_one_clear_line(folder):
    prepare_data.prepare(["one", "two", "three"], folder / "plain", "mine", "bytes")
    assert not list((folder / "plain").glob("*.mask")) and Data(folder / "plain", "train", 3).masks == []
    first, second = (folder / f"x_train_00000{n}.mask" for n in range(2))
    for contents, message in [
        (bytes(99), "train_000000.mask has 99 bytes, not one for each of its shard's 100 tokens; prepare it"),
        (b"\1" + bytes(99), "there is no .*train_000001.mask, while other shards have masks"),
    ]:
        first.write_bytes(contents)
        with pytest.raises(BadInput, match=message):
            Data(folder, "train", 9)
    with pytest.raises(BadInput, match="there is no .*val_000000.mask"):
        Data(folder, "val", 9)
    second.write_bytes(bytes([0, 0, 1]) + bytes(53) + b"\2")
    with pytest.raises(BadInput, match="holds 2, not 0 or 1: prepare it again"):
        Data(folder, "train", 8).windows(np.array([18]))  # the last window
    targets = Data(folder, "train", 9).windows(np.array([0, 11]))[1]  # from tokens 0 and 100
    assert targets.tolist() == [[-100] * 9, [-100, 102, *[-100] * 7]]


@pytest.mark.parametrize("packed", [0, 1])
def test_recall_asks_for_facts_that_stand_in_the_first_half_spread_or_packed(packed, tmp_path):
    documents = prepare_data.recall(300, [1, 4, 9], packed, 80, seed=1)
    prepare_data.prepare(documents, tmp_path / "data", "recall", "bytes")
    inputs, targets = Data(tmp_path / "data", "train", 80).windows(np.arange(280))
    counts, starts = Counter(), Counter()
    for x, y in zip(inputs, targets):
        assert x[0] == 256 and x[-1] == ord("\n")  # a document in each window
        text = "".join(map(chr, x[1:-1]))
        facts, questions = text[:38], text[38:]
        known = dict(re.findall(r"([a-z])([0-7])", facts))
        assert "".join(known).isalpha() and facts.count(".") == 38 - 2 * len(known)
        assert [known[key] for key in questions[::2]] == list(questions[1::2]) and len(questions) == 40
        assert np.flatnonzero(y != -100).tolist() == [*range(39, 79, 2)]  # a key goes in, its digit comes out
        assert all(chr(token) == known[chr(key)] for key, token in zip(x[39:79:2], y[39:79:2]))
        counts[len(known)] += 1
        stretch = re.fullmatch(r"(\.*)([^.]+)\.*", facts)  # the facts side by side, behind so many dots
        starts[1 + len(stretch[1]) if stretch else None] += 1
    assert counts.keys() == {1, 4, 9} and min(counts.values()) > 60
    assert (set(starts) == {16, 32}) if packed else (starts[None] > 150)
    again = prepare_data.recall(1, [4], packed, 80, seed=1)
    assert list(again) == list(prepare_data.recall(1, [4], packed, 80, seed=1)) != list(
        prepare_data.recall(1, [4], packed, 80, seed=2)
    )


def test_copies_are_a_string_and_the_same_again(tmp_path):
    prepare_data.prepare(prepare_data.copies(40, 5, seed=1), tmp_path / "data", "copy", "bytes")
    inputs, targets = Data(tmp_path / "data", "train", 13).windows(np.arange(37))
    for x, y in zip(inputs, targets):
        assert x[0] == 256 and bytes(x[1:6].tolist()).isalpha() and x[6] == ord("|") and x[12] == ord("\n")
        assert x[7:12].tolist() == y[6:11].tolist() == x[1:6].tolist()
        assert (y != -100).sum() == 5
    assert len({tuple(x) for x in inputs}) == 37


NEEDLES = {"single": (1, 1, 1), "multi-key": (4, 1, 1), "multi-value": (1, 4, 1), "multi-query": (4, 1, 4)}


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_hidden_at_all_depths_and_asked_for_as_in_ruler(name, tmp_path):
    (keys, values, asked), tokenizer = NEEDLES[name], get_tokenizer("bytes")
    made = prepare_data.needles(200, [name], 4, 5, 256, None, tokenizer, seed=1)
    prepare_data.prepare(made, tmp_path / "data", "needle", "bytes")
    inputs, targets = Data(tmp_path / "data", "train", 256).windows(np.arange(180))
    depths, texts = [], set()
    for x, y in zip(inputs, targets):
        assert x[0] == 256  # a document in each window
        text, first = "".join(map(chr, x[1:])), np.flatnonzero(y != -100)[0] - 6  # where the questions begin
        hidden, asking = text[:first], text[first:]
        needles = re.findall(r"\n([a-z]{4}): (\d{5})\.\n", hidden)
        facts = {key: [value for k, value in needles if k == key] for key, _ in needles}
        assert len(facts) == keys and all(len(found) == values for found in facts.values())
        assert re.sub(r"\n.{4}: \d{5}\.\n", "", hidden) in prepare_data.NOISE * 4
        questions = re.findall(r"\n([a-z]{4}):((?: \d{5},)* \d{5})\.", asking)
        assert "".join(f"\n{key}:{answer}." for key, answer in questions) == asking
        assert len({key for key, _ in questions}) == len(questions) == asked
        assert all(answer.split(", ") == [f" {facts[key][0]}", *facts[key][1:]] for key, answer in questions)
        assert bytes(y[y != -100].tolist()).decode() == "".join(a for _, a in questions).replace(",", "")
        depths += [place.start() for place in re.finditer(r"\n.{4}: \d", hidden)]
        texts.add(text)
    assert len(texts) == 180 and min(depths) < 10 and max(depths) > 256 - len(asking) - 30


def test_needles_take_a_haystack_kinds_and_sizes_of_your_own():
    haystack, tokenizer = np.arange(1000) % 90 + 160, get_tokenizer("bytes")
    made = prepare_data.needles(99, ["single", "multi-query"], 1, 2, 128, haystack, tokenizer, seed=1)
    starts, asked = set(), Counter()
    for (text, learned), *questions in made:
        assert not learned and len(text) + sum(len(part) for part, _ in questions) == 127
        answers = [bytes(part).decode() for part, learned in questions if learned]
        assert all(re.fullmatch(r" [1-9]\d", answer) for answer in answers)
        straw = [token for token in text if token >= 160]
        assert all((b - a) % 90 == 1 for a, b in itertools.pairwise(straw))
        starts.add(straw[0])
        asked[len(answers)] += 1
    assert len(starts) > 40 and asked.keys() == {1, 4} and min(asked.values()) > 30
    one, again, other = (
        list(prepare_data.needles(3, ["single"], 4, 7, 99, haystack, tokenizer, seed)) for seed in (1, 1, 2)
    )
    assert one == again != other
    with pytest.raises(BadInput, match="the haystack has 50 tokens, less than --length=256"):
        next(prepare_data.needles(1, ["single"], 4, 7, 256, haystack[:50], tokenizer, seed=1))


def test_shards_of_a_test_end_where_a_document_ends(workplace):
    flags = ("--letters=3", "--documents=50", "--shard_tokens=100", "--out=data/shards")
    script("prepare_data.py", "copy", *flags)
    shards = shards_of(workplace / "data" / "shards", "train")
    assert len(shards) > 3 and all(len(shard) == 99 for shard in shards[:-1])  # of documents of 9


def test_missing_and_tiny_data_are_one_clear_line(folder, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    for call, message in [
        (lambda: Data(folder / "none", "train", 10), "there is no folder .*none"),
        (lambda: Data(folder, "test", 10), "holds no test shards"),
        (lambda: Data(folder, "train", 100), "157 train tokens, less than a window of 100: prepare"),
        (lambda: get_tokenizer("byte"), "there is no tokenizer 'byte'"),
        (lambda: get_tokenizer("none.model"), "none.model needs pip install sentencepiece, and a file"),
        (lambda: get_tokenizer("gpt2"), "gpt2 needs the network once .*Error.*, or use the tokenizer bytes"),
        (lambda: prepare_data.prepare([], folder / "new", "mine", "bytes"), "no text was found"),
        (lambda: prepare_data.prepare([[("a", False), ("b", True)]], folder / "new", "mine", "bytes"),
         "a single prompt was found, none is left for validation: give two or more"),
    ]:
        with pytest.raises(BadInput, match=message):
            call()


def test_text_streams_whole_characters():
    stream = prepare_data.TextStream(get_tokenizer("bytes"))
    assert [stream(byte) for byte in "aé漢".encode()] == ["a", "", "é", "", "", "漢"]
    assert stream(257) == "\ufffd"  # a token that a larger model knows


# --- Download -------------------------------------------------------------------------------------
class Handler(BaseHTTPRequestHandler):
    """Serves server.files, and misbehaves: faults maps a name to a list of faults; each GET uses up one.

    Like Hugging Face, it redirects from hub/, and names the file's SHA-256 there.
    """

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/base/")
        if name.startswith("hub/"):
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(server.files[name[4:]]).hexdigest()}"')
            self.send_header("Location", f"/base/{name[4:]}")
            return self.end_headers()
        if name not in server.files:
            return self.send_error(404)
        fault, content = (server.faults.get(name) or [None]).pop(0), server.files[name]
        start = int(self.headers["Range"][6:-1])
        server.requests.append((name, start))
        if fault == "500":
            return self.send_error(500)
        if fault and fault.startswith("503"):
            self.send_response(503)
            self.send_header("Retry-After", fault[4:])
            return self.end_headers()
        if fault == "silent":
            return time.sleep(60)
        etag = zlib.crc32(content)
        if fault == "wrong bytes":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "too long":
            content += bytes(1 << 22)
        if fault == "html":
            content, start = b"<html>please log in</html>" * 100, 0
        if fault == "wrong length":
            content = content[:-100]
        if start >= len(content):
            return self.send_error(416)
        partial = start and fault != "ignores range"
        sent = content[start:] if partial else content
        self.send_response(206 if partial else 200)
        if server.etags:
            self.send_header("ETag", f'"{etag}"')
        if server.lengths:
            self.send_header("Content-Length", str(len(sent)))
        if partial:
            first = start - 50 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if fault in ("cut", "stalls"):
            sent = sent[: len(sent) // 2]
        with contextlib.suppress(OSError):  # the client has gone
            for a in range(0, len(sent), 1 << 14):
                self.wfile.write(sent[a : a + (1 << 14)])
                server.sent += len(sent[a : a + (1 << 14)])
                time.sleep(server.delay)
        time.sleep(2 if fault == "stalls" else 0)
        self.close_connection = True


def shard_bytes(path, n, seed=0):
    prepare_data.write_shard(path, np.random.default_rng(seed).integers(50257, size=n))
    return path.read_bytes()


@pytest.fixture
def server(tmp_path_factory):
    server, folder = ThreadingHTTPServer(("127.0.0.1", 0), Handler), tmp_path_factory.mktemp("shard")
    server.files = {f"s{i}_train_00000{i}.bin": shard_bytes(folder / "x", 50_000, i) for i in range(4)}
    server.faults, server.requests, server.sent, server.delay = {}, [], 0, 0.0
    server.lengths = server.etags = True
    server.url = f"http://127.0.0.1:{server.server_address[1]}/base"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def download(server, folder, names=None, **options):
    names = list(server.files) if names is None else names
    prepare_data.download(server.url, folder, names, **dict(pause=0.01, timeout=1.0) | options)


def assert_downloaded(server, folder):
    (Path(folder) / ".lock").unlink()
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == server.files


def test_download_fetches_each_shard_once(server, tmp_path):
    for _ in range(2):
        download(server, tmp_path / "new" / "folder")
        assert_downloaded(server, tmp_path / "new" / "folder")
        assert len(server.requests) == 4


@pytest.mark.parametrize("faults, requests", [
    (["cut"] * 9, 10), (["stalls"], 2), (["500", "500"], 3), (["500", "cut", "ignores range"], 3),
    (["html"], 2), (["cut", "wrong range"], 3), (["wrong length", "html"], 3), (["cut"], 2),
    (["too long"], 2), (["wrong length"], 2),
], ids=str)  # fmt: skip
def test_download_survives_a_bad_connection(server, tmp_path, faults, requests):
    name = list(server.files)[1]
    server.faults[name] = list(faults)
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    starts = [start for n, start in server.requests if n == name]
    assert len(starts) == requests
    if set(faults) == {"cut"}:  # each byte came once
        assert starts == sorted(set(starts)) and server.sent == sum(map(len, server.files.values()))


def test_download_continues_a_partial_file_and_replaces_a_damaged_one(server, tmp_path):
    whole, part, long, broken = server.files
    (tmp_path / whole).write_bytes(server.files[whole])
    (tmp_path / f"{part}.partial").write_bytes(server.files[part][:70_000])
    (tmp_path / f"{part}.version").write_text(f'"{zlib.crc32(server.files[part])}"')
    (tmp_path / f"{long}.partial").write_bytes(server.files[long] + b"and more")
    (tmp_path / broken).write_bytes(server.files[broken][:-1])
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    assert whole not in dict(server.requests) and (part, 70_000) in server.requests


def test_a_resumed_download_never_mixes_two_files(server, tmp_path):
    """The server's file changes after a cut, and between two runs; or the server does not say."""
    (name,) = names = list(server.files)[:1]
    server.files = {name: server.files[name]}
    for n, etags in enumerate([True, False]):
        server.etags, other = etags, shard_bytes(tmp_path / "x", 50_000, 9 + n)
        (tmp_path / "x").unlink()
        with pytest.raises(OSError, match="1 times in succession"):
            server.faults = {name: ["cut"]}
            download(server, tmp_path, names, tries=1)
        assert 0 < (tmp_path / f"{name}.partial").stat().st_size < len(other)
        server.files[name] = other
        download(server, tmp_path, names)
        assert_downloaded(server, tmp_path)
        (tmp_path / name).unlink()


def test_a_checksum_that_the_server_names_is_checked(server, tmp_path):
    name, *others = server.files
    server.url += "/hub"
    server.faults[name] = ["cut", "wrong bytes"]  # the rest is wrong, which no length or header shows
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    assert [start > 0 for n, start in server.requests if n == name] == [False, True, False]
    server.faults[name], before = ["wrong bytes"] * 99, (tmp_path / others[0]).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match="does not have the SHA-256 [0-9a-f]{64}, 3 times in succession"):
        download(server, tmp_path, tries=3)
    assert not (tmp_path / name).exists() and (tmp_path / others[0]).read_bytes() == before


@pytest.mark.parametrize("wrong", [
    lambda good: b"<html>" * 300, lambda good: good[:8] + bytes(4) + good[12:5000], lambda good: good + good,
    lambda good: b"", lambda good: good[:5], lambda good: good[:500], lambda good: bytes(len(good)),
], ids=["html", "no tokens", "long", "empty", "short", "header", "zeros"])  # fmt: skip
def test_a_wrong_partial_file_never_stays(wrong, server, tmp_path):
    for name, content in server.files.items():
        (tmp_path / f"{name}.partial").write_bytes(wrong(content))
        (tmp_path / f"{name}.version").write_text(f'"{zlib.crc32(content)}"')
    (tmp_path / f"{name}.version").write_bytes(b"\xff\0")  # damaged, too
    download(server, tmp_path, tries=2)
    assert_downloaded(server, tmp_path)


def test_an_endless_or_empty_answer_is_no_shard(server, tmp_path):
    name = list(server.files)[0]
    server.faults, server.lengths = {name: ["too long"] * 99}, False
    with pytest.raises(OSError, match="is longer than the 101024 bytes that its header says, 2 times"):
        download(server, tmp_path, [name], tries=2)
    server.files[name], server.faults = server.files[name][:8] + bytes(4) + server.files[name][12:1024], {}
    with pytest.raises(OSError, match="is a shard of 0 tokens by its header.*, 2 times"):
        download(server, tmp_path, [name], tries=2)
    assert not list(tmp_path.glob("*.bin"))


def test_a_server_that_asks_to_wait_is_waited_for(server, tmp_path):
    name, start = list(server.files)[0], time.time()
    server.faults[name] = ["503 1"]
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    assert time.time() - start >= 1
    (tmp_path / name).unlink()
    server.faults[name] = ["503 3600"]
    with pytest.raises(OSError, match="503.*: run this again in 3600 seconds"):
        download(server, tmp_path)
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 98 < prepare_data.seconds_until(soon) <= 100
    assert [prepare_data.seconds_until(text) for text in (None, "", "soon", "-5", "7")] == [0, 0, 0, 0, 7]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_silent_server_does_not_delay_the_end(server, tmp_path, number):
    name = "edu_fineweb_val_000000.bin"
    server.files, server.faults = {name: b""}, {name: ["silent"]}
    flags = ["fineweb-edu", "--shards=1", f"--base_url={server.url}", f"--out={tmp_path}"]
    server.files["edu_fineweb_train_000001.bin"] = b""
    server.faults["edu_fineweb_train_000001.bin"] = ["silent"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", *flags], stderr=subprocess.PIPE)
    while len(server.requests) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    start = time.time()
    process.send_signal(number)
    assert process.communicate()[1] == b"" and process.returncode == 130 and time.time() - start < 5


@pytest.mark.parametrize("fault, error, message", [
    ("500", OSError, "500: Internal Server Error, 3 times in succession; run this again"),
    ("html", OSError, "is not a shard: it begins with"),
    ("wrong length", OSError, "has 100924 bytes, its header says 101024"),
    ("404", BadInput, "404: Not Found: is --base_url right"),
    ("address", BadInput, "is not a valid URL: Invalid IPv6 URL: is --base_url right"),
])  # fmt: skip
def test_download_gives_up_with_one_clear_line(server, tmp_path, fault, error, message):
    names = list(server.files)[2:3] + ["missing.bin"] * (fault == "404")
    server.faults = {} if fault == "404" else {names[0]: [fault] * 99}
    server.url = "http://[x" if fault == "address" else server.url
    with pytest.raises(error, match=message):
        download(server, tmp_path, names, tries=3)
    assert not (tmp_path / names[0]).exists() or (tmp_path / names[0]).read_bytes() == server.files[names[0]]


def test_download_checks_the_disk_before_it_starts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=7 * 10**8))
    with pytest.raises(BadInput, match="0.7 GB free, the download needs 0.8 GB: make room"):
        download(server, tmp_path)
    assert server.requests == []
    download(server, tmp_path, list(server.files)[1:])
    assert len(server.requests) == 3


@pytest.mark.parametrize("lengths", [True, False], ids=["with lengths", "without"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_download_continues_where_it_was(server, tmp_path, number, lengths):
    server.lengths = lengths  # not every server sends a Content-Length
    names = ("edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin")
    server.files = {name: shard_bytes(tmp_path / "x", 500_000) for name in names}
    (tmp_path / "x").unlink()
    server.delay, flags = 0.02, ["fineweb-edu", "--shards=1", f"--base_url={server.url}", f"--out={tmp_path}"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", *flags], stderr=subprocess.PIPE)
    while server.sent < 200_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode in (-9, 130) and error == b"" and not list(tmp_path.glob("*.bin"))
    server.delay, server.requests = 0.0, []
    assert "next: python train.py" in script("prepare_data.py", *flags)
    assert_downloaded(server, tmp_path)
    assert all(start > 50_000 for _, start in server.requests)


# --- The scripts ----------------------------------------------------------------------------------
def script(*words, stdin=""):
    """Runs a script's main in the workplace and returns what it printed."""
    main, out = importlib.import_module(words[0].removesuffix(".py")).main, io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with (
        mock.patch("sys.argv", list(map(str, words))),
        mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
        contextlib.chdir(script.folder),
        contextlib.redirect_stdout(out),
    ):
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return out.getvalue()


script.folder = ROOT
TINY = "--data=data/mine --n_layer=2 --d_model=32 --n_head=2 --context=32 --batch_tokens=512".split()
TINY += ["--eval_every=10", "--eval_tokens=1024", "--dtype=float32"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, data and a trained checkpoint."""
    script.folder = folder = tmp_path_factory.mktemp("scripts")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"The number {i} follows the number {i - 1}. " * 40)
    script("prepare_data.py", "text", "--tokenizer=bytes", "--out", "data/mine", "texts")
    script("train.py", *TINY, "--steps=30")
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
    a, b = (RAT.load(folder / "ckpt.pt").state_dict() for folder in (a, b))
    assert all(relative_error(b[name], a[name]) <= 100 * tolerance for name in a)


def test_training_learns_and_shows_how(workplace):
    whole = script("train.py", *TINY, "--steps=30", "--out=whole", "--lr=1e-2", "--log_every=5")
    lines, log = re.findall(r"^step .*", whole, re.MULTILINE), log_of(workplace / "whole")
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30] and len(lines) == 6
    assert [("val_loss" in a, " val " in b) for a, b in zip(log, lines)] == [(False, False), (True, True)] * 3
    line = r"step 30/30  train [0-9.,]+  val [0-9.,]+ \([0-9.,]+ bits/byte\)  [0-9.,]+ tokens/s"
    assert re.fullmatch(line, lines[5])
    assert log[5]["val_loss"] < log[1]["val_loss"] < 5.6 and log[5]["lr"] == pytest.approx(1e-6)
    assert {"train_loss", "grad_norm", "tokens_per_second", "seconds"} < log[0].keys()
    assert log[5]["tokens"] == 30 * 512 and "how the model continues it" in whole
    flags = ("--layers=attention", "--lr=0.01", "--out=whole/attention", "--d_model=32")
    assert all(flag in whole.splitlines()[-1] for flag in flags)  # a comparison with the run's own flags
    seconds = log[5]["seconds"]
    script("train.py", "--resume", "--out=whole", "--steps=35")
    assert log_of(workplace / "whole")[-1]["seconds"] > seconds  # time continues, too


@pytest.mark.parametrize("layers", [[], ["--layers=rat+", "--joint=rat+:4"]], ids=["rat", "rat+ jointly"])
def test_a_killed_run_resumes_to_the_same_losses_and_weights_bit_for_bit(workplace, layers):
    options, name = [*TINY, "--steps=40", "--sample_tokens=0", "--log_every=5", *layers], f"{len(layers)}"
    script("train.py", *options, f"--out=unbroken{name}")
    command = [sys.executable, ROOT / "train.py", *options, f"--out=killed{name}"]
    killed = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL)
    while not (workplace / f"killed{name}" / "ckpt.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    killed.kill()
    killed.wait()
    assert torch.load(workplace / f"killed{name}" / "ckpt.pt", weights_only=True)["step"] < 40
    script("train.py", "--resume", f"--out=killed{name}")
    assert_same_run(workplace / f"unbroken{name}", workplace / f"killed{name}", 0)


def test_an_interrupted_run_leaves_the_log_of_an_unbroken_one(workplace):
    """It ends between two lines of the log: the next one's mean counts the steps before, too."""
    options, update = [*TINY, "--steps=30", "--eval_every=30", "--sample_tokens=0"], train.Run.update
    options += ["--layers=rat+", "--joint=rat+:4", "--log_every=10"]
    script("train.py", *options, "--out=unbroken")
    # A signal in the second update of step 12, 14 and 22: the next step is the last.
    for more, updates, stopped in ([], 24, 13), (["--resume"], 2, 15), (["--resume"], 14, 23):
        if more:  # lines later than the checkpoint, as a killed run leaves them
            with open(workplace / "interrupted" / "log.jsonl", "a") as log:
                log.write('{"step": 1000000}\n' * 99)
        counter = itertools.count(1)

        def interrupted(*args, last=updates, counter=counter):
            if next(counter) == last:
                signal.raise_signal(signal.SIGINT)
            return update(*args)

        with mock.patch("train.Run.update", interrupted), pytest.raises(SystemExit) as exit:
            script("train.py", *options, *more, "--out=interrupted")
        saved = torch.load(workplace / "interrupted" / "ckpt.pt", weights_only=True)
        steps = [line["step"] for line in log_of(workplace / "interrupted")]
        assert exit.value.code == 130 and saved["step"] == stopped
        assert steps == [10, 20][: stopped // 10]
        assert saved["log_bytes"] == (workplace / "interrupted" / "log.jsonl").stat().st_size
    script("train.py", "--resume", "--out=interrupted")
    assert_same_run(workplace / "unbroken", workplace / "interrupted", 0)
    shutil.rmtree(workplace / "unbroken")


def test_a_folder_is_for_one_process_at_a_time(workplace, server):
    """A second run, resume or download in it is told who is there, and touches nothing."""
    calls = {
        "taken": ("train.py", *TINY, "--steps=1", "--out=taken"),
        "out": ("train.py", "--resume", "--steps=99"),
        "shards": ("prepare_data.py", "fineweb-edu", f"--base_url={server.url}", "--out=shards"),
    }
    code = """
import sys, time, prepare_data
with prepare_data.alone(sys.argv[1]):
    print(flush=True)
    time.sleep(99)
"""
    for name, call in calls.items():
        command = [sys.executable, "-c", code, workplace / name]
        holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        holder.stdout.readline()
        before = {path: path.read_bytes() for path in (workplace / name).iterdir()}
        with pytest.raises(BadInput, match=rf"{name} is in use by process {holder.pid} on .*: wait for it"):
            script(*call)
        assert {path: path.read_bytes() for path in (workplace / name).iterdir()} == before
        holder.kill()
        holder.communicate()
        with prepare_data.alone(workplace / name):  # the lock has died with its process
            pass
    with prepare_data.alone(workplace / "out"), pytest.raises(BadInput, match="out is in use by process"):
        script("train.py", *TINY)  # not that a checkpoint is there already, which a run still adds to
    assert server.requests == []
    script(*calls["taken"])
    assert (workplace / "taken" / "ckpt.pt").exists()


@pytest.mark.parametrize("damage, message", [
    (lambda c: c.update(model={}), "Missing key"),
    (lambda c: c["model"].pop("norm.weight"), 'Missing key.*"norm.weight"'),
    (lambda c: c.pop("optimizer"), "has no optimizer state: train it with --init_from"),
    (lambda c: c["optimizer"].update(state={}), "it lacks 'embedding.weight'"),
    (lambda c: c["optimizer"]["state"].pop("norm.weight"), "it lacks 'norm.weight'"),
    (lambda c: c["optimizer"]["state"]["norm.weight"].pop("exp_avg"), "it lacks 'exp_avg'"),
    (lambda c: c["optimizer"]["state"]["norm.weight"].pop("step"), "it lacks 'step'"),
    (lambda c: c["optimizer"]["state"]["norm.weight"].update(exp_avg=torch.ones(3)), "averages of norm"),
    (lambda c: c["optimizer"].pop("param_groups"), "it lacks 'param_groups'"),
    (lambda c: c["optimizer"]["param_groups"][0].update(params=[]), "AdamW's groups are not of these"),
    (lambda c: c.update(optimizer=[]), "damaged: "), (lambda c: c.update(settings=5), "damaged: "),
    (lambda c: c["settings"].update(steps="many"), "damaged: 'many' is not a whole number"),
    (lambda c: c["settings"].update(lr=-1.0), "damaged: '-1.0' is not a number"),
    (lambda c: c.pop("step"), "it lacks 'step'"), (lambda c: c.update(step="3"), "step is '3'"),
    (lambda c: c.update(seconds=math.nan), "seconds is nan"), (lambda c: c.update(history=[1]), "damaged: "),
])  # fmt: skip
def test_a_checkpoint_that_lacks_what_a_run_needs_is_not_resumed(damage, message, workplace):
    contents = torch.load(workplace / "out" / "ckpt.pt", weights_only=True)
    damage(contents)
    (workplace / "damaged").mkdir(exist_ok=True)
    torch.save(contents, workplace / "damaged" / "ckpt.pt")
    with pytest.raises(BadInput, match=message):
        script("train.py", "--resume", "--out=damaged", "--steps=40", "--sample_tokens=0")


def test_what_is_not_finite_is_never_saved(workplace):
    settings = train.Settings(out=str(workplace / "finite"), device="cpu")
    (workplace / "finite").mkdir()
    run = train.Run(RAT(Config(n_layer=1, n_head=2, d_model=8), "bytes"), settings, 1)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.save(1)
    before, p = (workplace / "finite" / "ckpt.pt").read_bytes(), run.model.norm.weight
    for tensor in (p.data, run.optimizer.state[p]["exp_avg_sq"]):
        kept, tensor[3] = tensor[3].item(), math.inf
        with pytest.raises(BadInput, match="step 2: weights are no longer finite; a lower --lr may help"):
            run.save(2)
        tensor[3] = kept
    assert (workplace / "finite" / "ckpt.pt").read_bytes() == before
    run.save(2)


def test_a_run_notices_data_that_changed_under_it(workplace):
    data = workplace / "data" / "changing"
    shutil.copytree(workplace / "data" / "mine", data)
    script("train.py", *TINY, "--data=data/changing", "--steps=2", "--sample_tokens=0", "--out=changing")
    (path,) = data.glob("*_train_*.bin")
    good = path.read_bytes()
    path.write_bytes(good[:-2] + b"a\0")
    resume = ["train.py", "--resume", "--out=changing", "--steps=3", "--sample_tokens=0"]
    with pytest.raises(BadInput, match="data/changing has changed since the run in changing/ckpt.pt was"):
        script(*resume)
    path.write_bytes(good)
    assert "note" not in script(*resume)
    path.write_bytes(good[:-2] + b"a\0")
    accepted = script(*resume[:-2], "--steps=4", "--data=data/changing")
    assert "note: data/changing has changed since" in accepted
    assert "note" not in script(*resume[:-2], "--steps=5")  # of what it holds now


def test_a_token_beyond_the_vocabulary_ends_a_run_with_the_last_good_checkpoint(workplace):
    data = workplace / "data" / "beyond"
    shutil.copytree(workplace / "data" / "mine", data)
    (path,) = data.glob("*_train_*.bin")
    order = Data(data, "train", 32, 1).order(0)
    tokens = np.array(prepare_data.read_shard(path))
    tokens[order[16 * 15] * 32] = 300  # of the 16th batch
    prepare_data.write_shard(path, tokens)
    message = "_000000.bin holds token 300, its tokenizer has 257: .*; last good checkpoint: beyond/ckpt.pt"
    with pytest.raises(BadInput, match=message):
        script("train.py", *TINY, "--data=data/beyond", "--steps=30", "--out=beyond")
    assert torch.load(workplace / "beyond" / "ckpt.pt", weights_only=True)["step"] == 10
    meta = json.loads((data / "meta.json").read_text()) | {"vocab_size": 320}
    (data / "meta.json").write_text(json.dumps(meta))
    for path in data.glob("*_val_*.bin"):
        prepare_data.write_shard(path, np.full(5000, 300))
    with pytest.raises(BadInput, match="the data contains token 300, bytes has 257: prepare it again"):
        script("train.py", *TINY, "--data=data/beyond", "--steps=30", "--out=further")


def test_gradient_accumulation_and_recomputation_change_nothing_but_memory(workplace):
    """Many short documents: the micro-batches have different numbers of targets."""
    texts = ["ab" * (i % 40) + "c" for i in range(2000)]
    prepare_data.prepare(texts, workplace / "data" / "short", "short", "bytes")
    options = [*TINY, "--data=./data/../data/short", "--steps=10", "--sample_tokens=0"]
    for name, more in {"full": [], "parts": ["--micro_batch=4"], "recompute": ["--recompute"]}.items():
        script("train.py", *options, f"--out={name}", *more)
        assert_same_run(workplace / "full", workplace / name)


def test_compiled_training_and_sampling_change_nothing(workplace, monkeypatch):
    traced = functools.partial(torch.compile, backend="aot_eager")  # no C++ to wait for
    monkeypatch.setattr(torch, "compile", traced)
    options = [*TINY, "--steps=10", "--sample_tokens=0", "--layers=rat:4", "--n_layer=1"]
    for name, more in dict(eager=[], compiled=[], recomputed=["--recompute"]).items():
        script("train.py", *options, f"--out={name}", f"--compile={name != 'eager'}".lower(), *more)
        assert_same_run(workplace / "eager", workplace / name, 1e-4)
    sample = ["sample.py", "--ckpt=eager/ckpt.pt", "--temperature=0", "--max_new_tokens=40"]
    assert script(*sample, "--compile") == script(*sample)


@pytest.mark.parametrize("dense, sparse", [("rat+", "rat+:4"), ("gated", "gated:0:6")])
def test_joint_training_updates_sparse_then_dense_at_one_learning_rate(workplace, dense, sparse):
    """The recipe of RAT+ by hand: two whole updates on a batch, one step of the schedule."""
    N, lr, out = 4, 1e-2, f"jointly/{dense}"
    options = [f"--layers={dense}", f"--steps={N}", f"--lr={lr}", "--sample_tokens=0", "--eval_every=4"]
    script("train.py", *TINY, *options, f"--out={out}", f"--joint={sparse}")
    (line,), trained = log_of(workplace / out), RAT.load(workplace / out / "ckpt.pt")
    assert trained.config.layers == dense
    torch.manual_seed(1)
    model = RAT(dataclasses.replace(trained.config), "bytes")
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95))
    data, losses, counts = Data(workplace / "data" / "mine", "train", 32, 1), [[], []], []
    rates = [lr] + [1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * n / (N - 2))) / 2 for n in range(N - 1)]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = (torch.from_numpy(part) for part in data.batch(step, 16))
        counts.append((y != -100).sum().item())
        for layers, values in zip((sparse, dense), losses):
            model.use(layers)
            loss = model(x, y)[1]
            values.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    means = [np.average(values, weights=counts) for values in losses]  # over tokens, not steps
    assert (line["train_loss_sparse"], line["train_loss"]) == pytest.approx(means, rel=1e-5)
    for name, p in trained.state_dict().items():
        assert relative_error(p, model.state_dict()[name]) < 1e-3


def test_a_model_is_evaluated_and_adapted_with_another_pattern_and_context(workplace):
    options, folder = [*TINY, "--steps=20", "--sample_tokens=0", "--eval_tokens=800"], workplace / "plus"
    script("train.py", *options, "--layers=rat+", "--joint=rat+:4", "--out=plus")  # 25 windows in 16s
    assess = ["train.py", "--data=data/mine", "--eval_only", "--init_from=plus/ckpt.pt", "--eval_tokens=800"]

    def loss(*flags):
        return float(re.search(r"validation loss ([\d.]+)", script(*assess, *flags, "--dtype=float32"))[1])

    line = log_of(folder)[-1]
    assert loss() == pytest.approx(line["val_loss"], abs=1e-4)
    assert loss("--layers=rat+:4") == pytest.approx(line["val_loss_sparse"], abs=1e-4)
    text = script(*assess, "--layers=rat+:1:9,rat+:0:9:2", "--context=64", "--dtype=float32")
    model = RAT.load(folder / "ckpt.pt", layers="rat+:1:9,rat+:0:9:2")
    x, y = (torch.from_numpy(part) for part in Data(workplace / "data" / "mine", "val", 64).sample(12))
    nats = -model(x)[0].log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0].detach()
    assert float(re.search(r"loss ([\d.]+)", text)[1]) == pytest.approx(nats[y >= 0].mean().item(), abs=1e-4)
    found = re.findall(r"positions +(\d+) to .*: ([\d.]+)", text)
    rows = {int(first): float(value) for first, value in found}
    assert len(rows) == 16
    for first, value in rows.items():
        part = slice(first, first + 4)
        assert value == pytest.approx(nats[:, part][y[:, part] >= 0].mean().item(), abs=1e-4)

    adapt = ["--init_from=plus/ckpt.pt", "--layers=rat+:4:3", "--lr=1e-4", "--warmup=0"]
    assert "sparse" not in script("train.py", *options, *adapt, "--out=plus/adapted")
    adapted = RAT.load(folder / "adapted" / "ckpt.pt")
    assert adapted.config.layers == "rat+:4:3"
    x, y = (torch.from_numpy(part) for part in Data(workplace / "data" / "mine", "val", 32).sample(32))
    before = RAT.load(folder / "ckpt.pt", layers="rat+:4:3")(x, y)[1]
    assert adapted(x, y)[1] < before
    sample = ["--ckpt=plus/ckpt.pt", "--layers=rat+:8:0:1", "--prompt=The", "--max_new_tokens=9"]
    assert script("sample.py", *sample).startswith("The")


def test_official_checkpoints_are_sampled_and_trained_on(workplace):
    theirs = official(*OFFICIAL["rat+ D=4 W=3 S=2"], vocab_size=320)[1]
    torch.save({"task": theirs}, workplace / "theirs.pt")
    convert = ["prepare_data.py", "checkpoint", "theirs.pt", "--layers=rat+:4", "--n_head=4"]
    assert "2 layers, rat+:4, of width 16" in script(*convert, "--out=theirs/ckpt.pt")
    sample = ["--ckpt=theirs/ckpt.pt", "--prompt=5 17", "--max_new_tokens=6", "--temperature=0"]
    model = prepare_data.load_official(theirs, layers="rat+:4", n_head=4)
    expected = [5, 17, *text(model, torch.tensor([[5, 17]]), 6, temperature=0)[0].tolist()]
    assert list(map(int, script("sample.py", *sample).split())) == expected
    options = ["--context=32", "--batch_tokens=512", "--steps=5", "--sample_tokens=0", "--out=from"]
    script("train.py", *TINY[:1], "--init_from=theirs/ckpt.pt", *options)
    script("train.py", "--resume", "--out=from", "--steps=6")
    trained = RAT.load(workplace / "from" / "ckpt.pt")
    assert trained.tokenizer == "bytes" and trained.config.vocab_size == 320  # the model's: the data uses 257
    script(*convert, "--tokenizer=bytes", "--out=theirs/bytes.pt")
    assert RAT.load(workplace / "theirs" / "bytes.pt").tokenizer == "bytes"


def test_a_sentencepiece_tokenizer_encodes_prepares_and_decodes(workplace):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    options = dict(vocab_size=290, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    trainer.train(input=str(workplace / "texts" / "1.txt"), model_prefix=str(workplace / "tiny"), **options)
    tokenizer = get_tokenizer(str(workplace / "tiny.model"))
    words = "The number 7 follows\nthe number 6 ✓"
    decoded = "".join(map(prepare_data.TextStream(tokenizer), tokenizer.encode_ordinary(words)))
    assert decoded.strip() == words.replace("\n", " ")  # this model's normalizer
    script("prepare_data.py", "text", "texts", "--tokenizer=tiny.model", "--out=data/pieces")
    assert "bits/byte" in script("train.py", *TINY, "--data=data/pieces", "--steps=20", "--out=pieces")
    sample = ["--ckpt=pieces/ckpt.pt", "--prompt=The number", "--max_new_tokens=9", "--seed=1"]
    assert script("sample.py", *sample).startswith("The number")


def test_the_beginning_of_a_document_is_learned(workplace):
    lines = (json.dumps({"text": f"Once upon a time there were {n} cats."}) for n in range(2000))
    (workplace / "once.jsonl").write_text("\n".join(lines))
    script("prepare_data.py", "text", "once.jsonl", "--tokenizer=bytes", "--out=data/once")
    flags = ["--n_layer=1", "--d_model=32", "--context=64", "--batch_tokens=1024", "--sample_tokens=0"]
    script("train.py", "--data=data/once", *flags, "--steps=150", "--out=once")
    logits, _ = RAT.load(workplace / "once" / "ckpt.pt")(torch.tensor([[256]]))
    assert logits[0, 0].softmax(-1)[ord("O")] > 0.9
    assert script("sample.py", "--ckpt=once/ckpt.pt", "--max_new_tokens=4", "--temperature=0") == "Once\n"


def test_sample_writes_from_a_prompt_a_file_and_standard_input(workplace):
    (workplace / "prompt.txt").write_text("The number")
    options = ("--seed=1", "--max_new_tokens=20")
    direct = script("sample.py", "--prompt=The number", *options)
    assert direct.startswith("The number") and len(direct) > len("The number")
    assert script("sample.py", "--prompt_file=prompt.txt", *options) == direct
    assert script("sample.py", "--prompt_file=-", *options, stdin="The number") == direct
    assert script("sample.py", "--prompt", "The number", "--seed=2", "--max_new_tokens=20") != direct
    three = script("sample.py", "--num_samples=3", "--temperature=0", "--top_k=5", "--top_p=0.9")
    assert three.count("---") == 3


def torchrun(*words, script_name="train.py"):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, ROOT / script_name, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.folder, timeout=120)


def test_processes_share_the_work_and_change_nothing_and_resume_each_others_runs(workplace):
    """One process, two with DDP, two with FSDP: the same losses, to 1e-5, on the same global batches."""
    options = [*TINY, "--steps=12", "--eval_every=6", "--device=cpu", "--keep=2", "--sample_tokens=0"]
    options += ["--layers=rat+,rat", "--joint=rat+:4,rat"]
    for parallel, micro_batch in {"one": 16, "ddp": 4, "fsdp": 2}.items():
        flags = [*options, f"--micro_batch={micro_batch}", f"--out=runs/{parallel}"]
        run = None if parallel == "one" else torchrun(*flags, f"--parallel={parallel}")
        assert script("train.py", *flags) if run is None else run.returncode == 0, run.stderr[-3000:]
        assert_same_run(workplace / "runs" / "one", workplace / "runs" / parallel)
        files = sorted(path.name for path in (workplace / "runs" / parallel).iterdir())
        assert files == [".lock", "ckpt-0000006.pt", "ckpt-0000012.pt", "ckpt.pt", "log.jsonl"]
    for writer, reader in ("one", "fsdp"), ("ddp", "one"), ("fsdp", "one"):
        folder = workplace / "resumed" / f"{writer}-{reader}"
        folder.mkdir(parents=True)
        shutil.copy(workplace / "runs" / writer / "ckpt-0000006.pt", folder / "ckpt.pt")
        shutil.copy(workplace / "runs" / writer / "log.jsonl", folder)
        args = ["--resume", f"--out={folder}", "--micro_batch=4"]
        out = script("train.py", *args) if reader == "one" else torchrun(*args, f"--parallel={reader}").stdout
        assert "steps 6 to 12" in out
        assert_same_run(workplace / "runs" / "one", folder)


def test_fsdp_in_bfloat16_computes_what_one_process_does(workplace):
    """Micro-batches of one size, so that sums differ by the order of the processes alone."""
    options = [*TINY, "--dtype=bfloat16", "--steps=6", "--log_every=1", "--micro_batch=4", "--eval_every=6"]
    options += ["--device=cpu", "--layers=rat,rnn", "--sample_tokens=0"]
    script("train.py", *options, "--out=bf16/one")
    run = torchrun(*options, "--parallel=fsdp", "--out=bf16/fsdp")
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_run(workplace / "bf16" / "one", workplace / "bf16" / "fsdp", 5e-5)


def test_a_scheduler_that_signals_all_processes_gets_a_checkpoint(workplace):
    """SIGTERM to torchrun and to each process, which so get two, in a save that takes its time."""
    (workplace / "slow.py").write_text(f"""
import sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
import prepare_data, train
save = torch.save
torch.save = lambda *args: (time.sleep(3), save(*args))
prepare_data.run(train.main)
""")
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [workplace / "slow.py", *TINY, "--steps=100000", "--eval_every=100000", "--log_every=10"]
    run = subprocess.Popen([*command, "--device=cpu", "--out=scheduled"], cwd=workplace, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    while "step 10/" not in run.stdout.readline():
        assert run.poll() is None
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not workers.exists():
        run.kill()
        pytest.skip("needs Linux's list of a process's children")
    for pid in [*map(int, workers.read_text().split()), run.pid]:
        os.kill(pid, signal.SIGTERM)
    run.communicate(timeout=60)
    step = torch.load(workplace / "scheduled" / "ckpt.pt", weights_only=True)["step"]
    assert step >= 10 and not list((workplace / "scheduled").glob("*.partial"))


def test_under_torchrun_a_mistake_is_told_once(workplace):
    result = torchrun(*TINY, "--device=cpu", "--out=never", "--layers=rats")
    assert result.returncode != 0 and result.stderr.count("error: there is no layer 'rats'") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_run_with_a_checkpoint_to_resume_from(workplace, number):
    flags = [*TINY, "--steps=100000", "--log_every=1", f"--out=signal{int(number)}", "--eval_every=100000"]
    process = subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *flags], cwd=workplace, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and error == ""
    step = int(re.search(rf"stopped after step (\d+): python train.py --resume {flags[-2]}", out)[1])
    assert torch.load(workplace / f"signal{int(number)}" / "ckpt.pt", weights_only=True)["step"] == step
    assert f"steps {step} to {step + 2}" in script("train.py", "--resume", flags[-2], f"--steps={step + 2}")


def test_only_the_newest_checkpoints_are_kept(workplace):
    script("train.py", *TINY, "--steps=50", "--keep=2", "--out=keep", "--layers=rat,swa:4")
    names = sorted(path.name for path in (workplace / "keep").glob("ckpt*"))
    assert names == ["ckpt-0000040.pt", "ckpt-0000050.pt", "ckpt.pt"]
    assert torch.load(workplace / "keep" / "ckpt-0000040.pt", weights_only=True)["step"] == 40
    flags = ["--resume", "--out=keep", "--steps=60", "--layers=rat,swa:4", "--weight_decay=0.5"]
    flags += ["--rope_base=10000"]
    assert "steps 50 to 60" in script("train.py", *flags)
    saved = torch.load(workplace / "keep" / "ckpt.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.5, 0.0]
    others = ["ckpt-00-old.pt", "ckpt-1.pt", "ckpt-00000003.pt", "ckpt-20000000.pt", "ckpt-best.pt"]
    others += ["ckpt.pt.mine.partial"]
    for name in others:
        (workplace / "keep" / name).touch()
    (workplace / "keep" / "ckpt.pt.0a_b1c2d.partial").mkdir()  # of a run that was killed as it saved
    torch.save(saved | {"step": 9_999_997}, workplace / "keep" / "ckpt.pt")
    script("train.py", "--resume", "--out=keep", "--steps=10000001", "--eval_every=1", "--sample_tokens=0")
    names = {path.name for path in (workplace / "keep").glob("ckpt*")}
    assert names == {"ckpt.pt", "ckpt-10000000.pt", "ckpt-10000001.pt", *others}


def test_ctrl_c_that_ends_the_reader_of_the_output_too_leaves_a_checkpoint(workplace):
    """As in `python train.py | tee log.txt`."""
    flags = [*TINY, "--steps=100000", "--eval_every=100000", "--log_every=100000", "--out=piped"]
    run = subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *flags], cwd=workplace,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while b"run: steps" not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.stderr.read() == b"" and run.wait(60) == 141
    assert "step" in torch.load(workplace / "piped" / "ckpt.pt", weights_only=True)


def test_ctrl_c_ends_the_sample_at_the_end_of_a_run(workplace):
    flags = [*TINY, "--steps=1", "--sample_tokens=1000000", "--out=sampling"]
    run = subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *flags], cwd=workplace, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while "A piece of the validation data" not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20)[1] == "" and run.returncode == 130


@pytest.mark.parametrize("preset, parameters, gflop", [
    # rat-1b: 24 x (3.25 + 1 + 8) x 2048^2 + 50304 x 2048 = 1336 M, times 6, plus 3 x 24 x 4 x 2048 x 128.5
    ("rat-1b", "1,336", "8.09"), ("attention-1b", "1,311", "9.07"), ("rat-swa-200m", "204", "1.30"),
    # 24 x (5 + 1 + 8) x 2048^2 + 50304 x 2048 weights; keys of a query: 2048.5 when dense, and 32.5 with D=64
    ("rat+-1b", "1,512", "19.38"), ("rat+-3b", "2,697", "34.16"), ("rat+-7b", "7,722", "95.94"),
    ("rat+-200m", "227", "3.04"),
])  # fmt: skip
def test_dry_run_counts_without_building(workplace, preset, parameters, gflop):
    out = script("train.py", f"--preset={preset}", "--dry_run", "--out=dry", "--steps=7")
    assert re.search(rf"parameters +{parameters}\.\d M", out) and f"{gflop} GFLOP per token" in out, out
    assert "steps         7 of" in out
    if preset == "rat-1b":  # keys and values of 2048 for each 16 tokens, and a state of both for each 4096
        bytes = 24 * 2 * 2048 * 4 * (256 + 1) / 4096
        assert f"cache         {bytes:,.0f} bytes per token in float32" in out
    assert not (workplace / "dry").exists()


def test_runs_are_compared_in_a_table_with_the_mean_and_deviation_over_seeds(workplace):
    losses = {"a/1": [4.0, 3.0, 1.0], "a/2": [2.0, 2.0, 2.0], "b": [5.0, 4.0]}
    for name, values in losses.items():
        (workplace / "compared" / name).mkdir(parents=True)
        with open(workplace / "compared" / name / "log.jsonl", "w") as log:
            for step, loss in enumerate(values, start=1):
                record = dict(step=10 * step, tokens=100 * step, tokens_per_second=1000 * loss)
                more = dict(val_loss=loss) | (dict(val_accuracy=loss / 10) if name != "b" else {})
                for line in (record | {"step": 10 * step - 5}, record | more):
                    print(json.dumps(line), file=log)
    table = [line.split() for line in script("train.py", "--compare=compared/**/log.jsonl").splitlines()]
    assert table == [
        "validation loss, nats per token".split(), "after step 10 20 the last tokens/s runs".split(),
        "compared/a 3.000 2.500 1.500 ± 0.707 1,500 2".split(),
        "compared/b 5.000 4.000 4.000 4,000 1".split(), [],
        "answers right".split(), "after step 10 20 the last tokens/s runs".split(),
        "compared/a 0.300 0.250 0.150 ± 0.071 1,500 2".split(), [],
    ]  # fmt: skip
    (workplace / "foreign").mkdir()
    record = '{"step": 1, "tokens": 1, "tokens_per_second": 1, "val_loss": 1}'
    (workplace / "foreign" / "log.jsonl").write_text(record)
    assert "1.000" in script("train.py", "--compare=foreign/log.jsonl")
    for line in ("5", "null", '"val_loss"', '["val_loss"]', '{"val_loss": 1}', "[" * 99_999, "x", "\udc80",
                 record.replace(": 1}", ': "x"}'), record.replace("1", "[]", 1),
                 record.replace("1", "Infinity", 1)):  # fmt: skip
        (workplace / "foreign" / "log.jsonl").write_text(f"{record}\n{line}\n", errors="surrogateescape")
        with pytest.raises(BadInput, match="foreign/log.jsonl is not a log.jsonl of train.py"):
            script("train.py", "--compare=foreign/log.jsonl")
    columns = script("train.py", "--compare=compared/b/log.jsonl").splitlines()
    assert [line.split() for line in columns[1:3]] == [
        "after step 10 the last tokens/s runs".split(), "compared/b 5.000 4.000 4,000 1".split()
    ]  # fmt: skip


def test_runs_are_compared_in_a_picture(workplace):
    pytest.importorskip("matplotlib")
    assert "picture: loss.png" in script("train.py", "--compare=*/log.jsonl", "--plot=loss.png")
    assert (workplace / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_answers_alone_are_learned_and_their_accuracy_is_reported(workplace):
    script("prepare_data.py", "copy", "--letters=3", "--documents=2000", "--out=data/copy")
    flags = ["--data=data/copy", "--context=9", "--batch_tokens=1152", "--layers=rat:2"]
    flags += ["--d_model=64", "--n_layer=2", "--n_head=2", "--lr=1e-2", "--dtype=float32"]
    flags += ["--eval_tokens=450"]
    printed = script("train.py", *flags, "--steps=60", "--eval_every=30", "--sample_tokens=99", "--out=copy")
    record = log_of(workplace / "copy")[-1]
    model = RAT.load(workplace / "copy" / "ckpt.pt")
    x, y = Data(workplace / "data" / "copy", "val", 9).sample(50)
    logits = model(torch.from_numpy(x))[0].detach()
    right = (logits.argmax(-1).numpy() == y)[:, 4:7]  # the bar and two letters go in, three letters come out
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
    assert record["val_loss"] == pytest.approx(nats.item(), abs=1e-4) and (y != -100).sum() == 150
    assert record["val_accuracy"] == pytest.approx(right.mean()) and 0.2 < right.mean() < 1
    assert f"{right.mean():.1%} of answer tokens right" in printed
    assert re.search(r"validation data:\n<\|endoftext\|>([a-z]{3})\|\n.*:\n...\n\n", printed)  # an answer
    printed = script("train.py", "--init_from=copy/ckpt.pt", *flags[:1], *flags[-2:], "--eval_only")
    share = f"{right.mean():.1%} of their tokens, all of them in {right.all(1).mean():.1%} of 50 windows"
    assert share in printed and f"validation loss {nats.item():.3f}" in printed and "150 tokens" in printed
    found = f"answers found at 10 to  20% of the window: {right.all(1).mean():.1%} of 50 right"
    assert printed.count("answers found at") == 1 and found in printed
    assert len(re.findall("positions", printed)) == 3


def test_the_depth_of_an_answer_is_where_it_occurs_before_if_that_is_one_place():
    x = np.array([9, 7, 8, 5, 5, 9, 7, 8, 5, 5, 3, 4])
    hits = np.ones(12, bool)
    hits[6] = False
    for targets, expected in [
        ({4: 7, 5: 8}, [(1 / 12, True)]),  # 7 8, once before
        ({5: 7, 6: 8}, [(1 / 12, False)]),  # not all of it is right
        ({4: 7, 5: 8, 6: 0}, [(1 / 12, True)]),  # 0 is the end of a text
        ({10: 3, 11: 4}, []),  # nowhere before
        ({9: 5}, []),  # at more than one place
        ({0: 7, 1: 8, 2: 5}, []),  # longer than what is before
        ({4: 9, 9: 3, 11: 3}, [(0.0, True), (10 / 12, True)]),
    ]:
        wanted = np.full(12, -100)
        wanted[list(targets)] = list(targets.values())
        assert list(train.depths(x[None], wanted[None], hits[None], 0)) == expected


def test_windows_without_answers_are_harmless_unless_there_are_no_others(workplace):
    folder = workplace / "data" / "few"
    shutil.copytree(workplace / "data" / "mine", folder)
    for path in folder.glob("*.bin"):
        mask = np.zeros(len(prepare_data.read_shard(path)), np.uint8)
        mask[:3000] = 1  # of 60,000
        path.with_suffix(".mask").write_bytes(mask.tobytes())
    flags = [*TINY, "--data=data/few", "--log_every=1", "--sample_tokens=0"]
    script("train.py", *flags, "--steps=10", "--out=few")
    log = log_of(workplace / "few")
    assert any(line["train_loss"] == 0 for line in log) and any(line["train_loss"] > 0 for line in log)
    assert math.isfinite(log[-1]["val_loss"]) and 0 <= log[-1]["val_accuracy"] <= 1
    for path in folder.glob("*_val_*.mask"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BadInput, match="no target is among the --eval_tokens: raise them, or prepare more"):
        script("train.py", *flags, "--steps=1", "--out=fewer")


def test_evaluation_prints_what_the_gates_remember(workplace):
    config = Config(n_layer=4, n_head=2, d_model=8, context=32, layers="rat+,attention,rnn,rat")
    model, memories = randomize(RAT(config, "bytes")), {}
    model.save(workplace / "gates.pt")
    for n in (0, 2, 3):  # the layers with a recurrence

        def note(module, inputs, output, n=n, mixer=model.blocks[n].mixer):
            z, v, g, q, k = output.split(mixer.sizes, dim=-1)
            gate = torch.sigmoid(g.double() + (mixer.forget_bias if n > 0 else 0))
            memories[n] = (1 / (1 - gate)).flatten().tolist()

        model.blocks[n].mixer.in_proj.register_forward_hook(note)
    model(torch.from_numpy(Data(workplace / "data" / "mine", "val", 32).sample(3)[0]))
    flags = ("--data=data/mine", "--init_from=gates.pt", "--eval_tokens=96", "--dtype=float32")
    printed = script("train.py", *flags, "--eval_only")
    table = [line.split() for line in printed[printed.index("tokens remembered") :].splitlines()]
    assert table[0][-9:] == [str(2**n) for n in range(9)]
    for row, (n, values) in zip(table[1:], memories.items(), strict=True):
        octaves = Counter(min(8, int(math.log2(value))) for value in values)
        assert len(octaves) > 2 and row[:2] == ["layer", str(n)]
        assert row[2:] == [f"{octaves[octave] / len(values):.1%}" for octave in range(9)]


# --- Tasks of lm-evaluation-harness ----------------------------------------------------------------
def requests(*args):
    return [types.SimpleNamespace(args=words) for words in args]


def oracle_loglikelihood(model, tokens, first, max_length):
    """Token by token, each with its own forward pass over as much as fits: log-probabilities, and hits."""
    nats, hits = [], []
    for t in range(first, len(tokens)):
        end = min(len(tokens), first + ((t - first) // max_length + 1) * max_length)  # of t's window
        logits = model(torch.tensor([tokens[max(0, end - 1 - max_length) : t]]))[0][0, -1].double()
        nats.append(logits.log_softmax(-1)[tokens[t]].item())
        hits.append(logits.argmax().item() == tokens[t])
    return sum(nats), all(hits)


@pytest.mark.parametrize("layers", ["attention", "swa:5", "rnn", "rat:4", "rat+", "rat+:4:8:2"])
def test_loglikelihoods_are_those_of_full_forwards_token_by_token(layers):
    config = Config(n_layer=2, n_head=4, d_model=32, context=64, layers=layers)
    model, tokenizer = randomize(RAT(config)).eval(), get_tokenizer("bytes")
    contexts = [np.array(row) for row in ([7, 8, 9] * 5, [1], [4] * 20)]
    greedy = text(model, torch.tensor(contexts[0][None]), n=3, temperature=0)[0].numpy()
    targets = [np.array([3, 4, 5]), np.array([6, 7]), greedy]
    for given in contexts, contexts[:1]:
        rows = zip(sample.log_probabilities(model, given, targets), given * 3, targets)
        for (nats, right), context, wanted in rows:
            logits = model(torch.tensor([[*context, *wanted[:-1]]]))[0][0, len(context) - 1 :]
            picked = logits.log_softmax(-1)[range(len(wanted)), wanted]
            assert torch.allclose(nats, picked, atol=1e-4)
            assert torch.equal(right, logits.argmax(-1) == torch.from_numpy(wanted))
    assert right.all()  # of the greedy ones, behind the shared context
    harness, long = sample.Harness(model, tokenizer, 70), "It was the best of times. " * 2
    asked = [(long, end) for end in ("a", "b", "\xe9")] + [(long + "It ", "was"), ("", "It was"), ("  ", "b")]
    asked += [(long * 2, "the worst"), ("x", "y" * 90)]
    for (context, end), (nats, right) in zip(asked, harness.loglikelihood(requests(*asked))):
        tokens = [256, *(context + end).encode()]
        expected = oracle_loglikelihood(model, tokens, 1 + len(context.rstrip().encode()), 70)
        assert nats == pytest.approx(expected[0], abs=1e-4 * max(1, len(end))) and right == expected[1]
    assert harness.cut == 2
    texts = ["", "a", long[:45], long * 4]
    for words, nats in zip(texts, harness.loglikelihood_rolling(requests(*((words,) for words in texts)))):
        assert nats == pytest.approx(oracle_loglikelihood(model, [256, *words.encode()], 1, 70)[0], abs=1e-2)


@pytest.mark.parametrize("step", [64, 10**6], ids=["context read once", "one forward pass"])
def test_a_long_context_that_requests_share_is_read_once_and_greedy_ones_are_known(step, monkeypatch):
    model = randomize(RAT(Config(n_layer=1, n_head=2, d_model=16, layers="rat"))).eval()
    harness, read, usual = sample.Harness(model, get_tokenizer("bytes"), 2000), [], model.features
    monkeypatch.setattr(model, "features", lambda x, cache=None: read.append(x.numel()) or usual(x, cache))
    monkeypatch.setattr(sample, "STEP", step)
    with torch.no_grad():
        model.embedding.weight[128:] = 0  # so that bytes of ASCII, positive below, are the likeliest
        model.norm.weight.copy_(model.norm.weight.abs())
    context = "0123456789" * 40
    prompt = torch.from_numpy(harness.encode(context).astype(np.int64))[None]
    end = bytes(text(model, prompt, n=3, temperature=0)[0].tolist()).decode()
    wrong = end[:2] + chr((ord(end[2]) + 1) % 128)
    read.clear()
    answers = harness.loglikelihood(requests((context, end), (context, end[0]), (context, wrong)))
    assert [right for _, right in answers] == [True, True, False] and answers[0][0] > answers[2][0]
    assert read == ([401, 3 * 2] if step == 64 else [3 * 403])


def test_batches_hold_all_rows_and_no_more_tokens_than_allowed_unless_one_row_has_more(monkeypatch):
    monkeypatch.setattr(sample, "BATCH", 100)
    rows = [(n, range(n * 7 % 60), range(5)) for n in range(40)]
    for more in (0, 20, 90):
        made = list(sample.batches(rows, more))
        assert sorted(row[0] for batch in made for row in batch) == list(range(40))
        sizes = [len(batch) * (max(len(row[1]) for row in batch) + 5 + more) for batch in made]
        assert all(size <= 100 or len(batch) == 1 for size, batch in zip(sizes, made))
        assert len(made) < 40 or more == 90


def test_tasks_without_the_harness_are_one_clear_line(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput, match="needs lm-evaluation-harness: pip install 'lm-eval"):
        script("sample.py", "--tasks=piqa")


@pytest.fixture(scope="module")
def tasks(workplace):
    """Tasks of lm-evaluation-harness as its users write them, on this disk."""
    pytest.importorskip("lm_eval")
    draw, folder = random.Random(1), workplace / "tasks"
    folder.mkdir()
    shared = "test_split: test\ndataset_path: json\n"
    shared += f"dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\n"
    (folder / "choose.yaml").write_text(
        f"task: choose\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: ['39', '6', '12 follows the number 11.']\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{shared}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: ' 7'\ngeneration_kwargs: {until: ['.', 'zz'], max_gen_toks: 20, do_sample: false}\n"
        "metric_list: [{metric: exact_match}, {metric: chrf}]\n"
    )
    (folder / "follow.yaml").write_text(
        f"task: follow\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    with open(folder / "documents.jsonl", "w") as file:
        for n in range(12):
            question = "The number 7 follows the number 6. " * draw.randrange(4)
            question += f"The number {n} follows the"
            print(json.dumps({"question": question, "answer": n % 3}), file=file)
    return ",".join(str(folder / f"{name}.yaml") for name in ("choose", "write", "follow"))


def test_the_harness_gets_the_numbers_of_its_own_hugging_face_model(workplace, tasks):
    """Both hold one model: with up_proj at 1, a LLaMA with GELU is our attention model."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    ours = randomize(RAT(Config(layers="attention", n_layer=2, n_head=2, d_model=32, context=64), "bytes"))
    with torch.no_grad():
        ours.embedding.weight *= 0.5
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=128, num_attention_heads=2)
    sizes |= dict(num_hidden_layers=2, hidden_act="gelu", mlp_bias=True, tie_word_embeddings=True)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rms_norm_eps=1e-6)).eval()
    weights = {"model.norm.weight": ours.norm.weight}
    weights["model.embed_tokens.weight"] = ours.embedding.weight[:257]
    for n, block in enumerate(ours.blocks):
        layer, (z, v, g, q, k) = f"model.layers.{n}.", block.mixer.in_proj.weight.split(block.mixer.sizes)
        for name, x in {"q": q, "k": k, "v": v, "o": block.mixer.out_proj.weight}.items():
            weights[f"{layer}self_attn.{name}_proj.weight"] = x
        weights[f"{layer}input_layernorm.weight"] = block.mixer_norm.weight
        weights[f"{layer}post_attention_layernorm.weight"] = block.mlp_norm.weight
        up, down = block.mlp[0].weight, block.mlp[2].weight
        for name, weight, bias in ("gate", up, 0), ("up", 0 * up, 1), ("down", down, 0):
            weights[f"{layer}mlp.{name}_proj.weight"] = weight
            weights[f"{layer}mlp.{name}_proj.bias"] = torch.full(weight.shape[:1], float(bias))
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["lm_head.weight"]  # tied
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # GPT-2's characters for bytes
    ids = {chr(byte): byte for byte in printable}
    ids |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - printable))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ids | {"<|endoftext|>": 256}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    tokenizer.add_bos_token = True
    LM.register(sample.Harness)
    harness, options = sample.Harness(ours, get_tokenizer("bytes"), 64), dict(max_length=64, batch_size=1)
    for names, bos in ([tasks.split(",")[:2], True], [tasks.split(",")[2:], False]):  # rolling adds its own
        reference = HFLM(theirs, tokenizer=tokenizer, add_bos_token=bos, **options)
        mine, wanted = (simple_evaluate(lm, tasks=names, bootstrap_iters=0) for lm in (harness, reference))
        for name, samples in wanted["samples"].items():
            for a, b in zip(mine["samples"][name], samples, strict=True):
                if name == "write":
                    (mine_text,), (their_text,) = a["resps"][0], b["resps"][0]
                    assert mine_text.rstrip("\ufffd") == their_text.rstrip("\ufffd")  # the end of a character
                else:
                    flat = (torch.tensor(x["resps"], dtype=torch.float64).flatten() for x in (a, b))
                    assert torch.allclose(*flat, atol=1e-4)
        written = [answer["resps"][0][0] for answer in mine["samples"].get("write", [])]
        assert any(written) or not bos


def test_tasks_are_run_from_the_command_line_alone_and_by_several_processes(workplace, tasks):
    flags = [f"--tasks={tasks}", "--limit=8", "--max_length=64", "--seed=1"]
    printed = script("sample.py", *flags, "--json=scores/one.json")
    assert all(f"|{name}" in printed for name in ("choose", "write", "follow", "acc", "bits_per_byte"))
    assert re.search(r"\d+ texts were longer than --max_length=64: cut from the left", printed)
    scores = json.loads((workplace / "scores" / "one.json").read_text())
    assert scores["results"].keys() == {"choose", "write", "follow"} and scores["texts_cut"] > 0
    questions = [json.loads(line)["question"] for line in open(workplace / "tasks" / "documents.jsonl")][:8]
    model, tokenizer = RAT.load(workplace / "out" / "ckpt.pt"), get_tokenizer("bytes")
    nats = sum(oracle_loglikelihood(model, [256, *text.encode()], 1, 64)[0] for text in questions)
    bits = -nats / math.log(2) / sum(map(len, questions))
    assert scores["results"]["follow"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    for words in questions[:3]:
        drawn = list(model.generate(torch.tensor([[256, *words.encode()][-44:]]), 20, temperature=0))
        whole = bytes(torch.stack(drawn).flatten().tolist()).decode()
        for stops in ([], [whole[12:14], whole[5:8]]):
            options = dict(until=stops, max_gen_toks=20, do_sample=False, temperature=1.0)
            (answer,) = sample.Harness(model, tokenizer, 64).generate_until(requests((words, options)))
            assert answer == (whole[: min(map(whole.find, stops))] if stops else whole)
    many = requests(*[(questions[0], dict(max_gen_toks=20, do_sample=True, temperature=1.0))] * 300)
    with torch.no_grad():  # as many as fill several batches: all different, and the same again
        first, again = (sample.Harness(model, tokenizer, 64, 1).generate_until(many) for _ in range(2))
    assert first == again and len(set(first)) > 250
    for flag, message in [
        ("--tasks=hellaswa", "there is no task 'hellaswa': did you mean hellaswag?"),
        ("--max_length=20", "max_length is 20, and a task writes 20 tokens after its prompt: give more"),
    ]:
        with pytest.raises(BadInput, match=message):
            script("sample.py", *flags, flag)


# --- bench.py: that it measures what it says; how fast is no test ----------------------------------
@pytest.fixture(scope="module")
def cpu():
    """The machine, measured once, with nothing of earlier tests to be collected before each case."""
    gc.freeze()
    yield bench.Hardware(torch.device("cpu"), torch.float32)
    gc.unfreeze()


def bench_rows(cpu, name, *flags):
    """What `bench.py` prints, and the rows that it writes to the file `name`."""
    with mock.patch("bench.Hardware", lambda *_: cpu):
        table = script("bench.py", *flags, "--repeats=1", f"--json={name}")
    return table, json.loads((script.folder / name).read_text())["results"]


def test_bench_times_every_kind_at_every_length(workplace, cpu):
    flags = ["--lengths=64", "--tokens=128", "--d_model=32", "--n_head=2", "--decode_batch=3"]
    table, rows = bench_rows(cpu, "a.json", *flags)
    names = ["attention", "swa", "rnn", "rat:16", "rat+", "rat+:16"]
    assert [row["name"] for row in rows] == 3 * names and all(row["name"] in table for row in rows)
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert [row["ratio"] for row in rows if row["name"] == "attention"] == [1, 1, 1]
    cache = {row["name"]: row["cache"] for row in rows[12:]}
    assert cache["attention"] == 3 * 64 * 2 * 32 * 4 and cache["rnn"] == 3 * 32 * 4
    assert cache["rat:16"] == 3 * (1 + 3) * 2 * 32 * 4 + 3 * 2 * 32 * 4  # its own, 3 chunk ends; the state
    assert max(map(len, table.splitlines()[1:])) <= 80


def test_bench_takes_kinds_of_ones_own_and_draws_them(workplace, cpu):
    pytest.importorskip("matplotlib")
    flags = ["--layers=rat+:1:2,rat+:8:2", "--lengths=16,32", "--tokens=32"]
    _, rows = bench_rows(cpu, "b.json", "layer", *flags, "--modes=decode", "--plot=b.png")
    names = [(row["T"], row["name"]) for row in rows]
    assert names == [(T, name) for T in (16, 32) for name in ("attention", "rat+:1:2", "rat+:8:2")]
    assert (workplace / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_times_models(workplace, cpu):
    flags = ["--prompt=10", "--max_new_tokens=5", "--batch=2,3"]
    _, rows = bench_rows(cpu, "c.json", "model", *flags)
    names = ["attention", "rat", "rnn"] + ["attention"] * 2 + ["rat"] * 2 + ["rnn"] * 2
    assert [(row["name"], row["T"]) for row in rows] == list(zip(names, [16] * 3 + [2, 3] * 3))
    assert rows[3]["cache"] == 2 * 15 * 4 * 2 * 128 * 4 and all(row["tokens_per_second"] > 0 for row in rows)


def test_out_of_memory_costs_a_bench_one_row_and_peak_memory_is_that_of_the_step(cpu, capsys):
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    good = bench.Case("good", lambda: lambda: torch.ones(50_000_000).sum(), 1, flops=1.0, bytes=cpu.bandwidth)
    cases = [bench.Case("step", lambda: step, 1), good, bench.Case("setup", lambda: step(), 1)]
    rows = bench.measure([("title", 1, [lambda case=case: case for case in cases])], 2, cpu)
    assert [row.get("error") for row in rows] == ["out of memory", None, "out of memory"]
    assert rows[1]["floor_ms"] == pytest.approx(1000) and capsys.readouterr().out.count("out of memory") == 2
    assert 190e6 < rows[1]["memory"] < 260e6 or not os.path.exists("/proc/self/clear_refs")


# --- Mistakes, and help ---------------------------------------------------------------------------
MISTAKES = """
train.py --learning_rate=1: unknown setting --learning_rate=1: --help lists all
train.py --step=1: unknown setting --step=1: did you mean --steps?
train.py --steps=many: --steps: 'many' is not a whole number from 0 to
train.py --steps=-3: --steps: '-3' is not a whole number from 0 to
train.py --lr=inf: --lr: 'inf' is not a number from 0 to
train.py --weight_decay=-1: --weight_decay: '-1' is not
train.py --compile=maybe: --compile: 'maybe' is not true or false
train.py --layers=rats: there is no layer 'rats'
train.py --layers=rat,,swa: there is no layer ''
train.py TINY: ckpt.pt is there already: --resume continues it
train.py TINY --batch_tokens=500 --out=new: batch_tokens 500 is not a multiple of context 32
train.py TINY --batch_tokens=1e15 --out=new: batch_tokens is 1000000000000000: it must be from 1 to
train.py TINY --micro_batch=5 --out=new: does not divide into 1 processes with micro-batches of 5
train.py TINY --min_lr=10 --out=new: min_lr is 10.0
train.py TINY --device=tpu9 --out=new: there is no device 'tpu9' here
train.py TINY --dtype=float8 --out=new: dtype is 'float8'
train.py TINY --parallel=pipeline --out=new: parallel is 'pipeline': it must be ddp or fsdp
train.py TINY --steps=0 --out=new: steps is 0
train.py TINY --joint=rat+:4 --out=new: --joint=rat+:4 has other weights than --layers=rat
train.py TINY --eval_only --out=new: --eval_only needs a checkpoint
train.py TINY --init_from= --out=new: --init_from: '' is not a value: leave it out
train.py TINY --out=: --out: '' is not a value
train.py --resume --eval_only: --eval_only goes with --init_from, not --resume
train.py TINY --init_from=out/ckpt.pt --resume: --resume continues the run in --out, --init_from begins one
train.py --data=data/none --out=new: there is no folder data/none
train.py --resume --out=new: there is no checkpoint
train.py --resume: has made 30 steps, --steps is 30: a larger --steps continues it
train.py --resume --d_model=64: --d_model=64: the model in out/ckpt.pt has 32
train.py --preset=rat-2b: there is no preset 'rat-2b': it is KIND-SIZE, KIND one of rat
train.py --preset=: --preset: '' is not a value
train.py --init_from=out/ckpt.pt --d_model=64 --out=new: --d_model=64: the model has 32, and its weights
train.py --init_from=out/ckpt.pt --layers=rnn --out=new: has other weights than one of rnn
train.py --compare=none/*.jsonl: no run matches 'none/*.jsonl'
train.py --compare=texts/1.txt: texts/1.txt is not a log.jsonl
train.py --plot=loss.png: --plot goes with --compare
prepare_data.py recall here: 'recall here' is not a source
prepare_data.py recall --out=data/new --pairs=4,26 --packed=0.5 --length=128: 26 pairs do not fit into half of
prepare_data.py recall --out=data/new --pairs=53 --length=1000: pairs is 53: there are 26 keys
prepare_data.py recall --out=data/new --length=126: length is 126: it must be a multiple of 4
prepare_data.py recall --out=data/new --documents=21: documents is 21
prepare_data.py copy --out=data/new --tokenizer=gpt2: tokenizer is 'gpt2': copy has bytes
prepare_data.py needle --out=data/new --needles=triple: needles is 'triple': it is a list of single, multi-key
prepare_data.py needle --out=data/new --length=25: length is 25: needles and questions alone take
prepare_data.py needle --out=data/new --letters=0: letters is 0: it must be from 1 to 100
prepare_data.py needle --out=data/new --digits=0: digits is 0: it must be from 1 to 100
prepare_data.py needle data/none --out=data/new: there is no file or folder data/none
prepare_data.py needle data/mine --tokenizer=gpt2 --out=data/new: data/mine has tokens of bytes, not gpt2
prepare_data.py recall --pairs=x: pairs is 'x': it is a list of whole numbers above 0
prepare_data.py recall --out=data/new --packed=2: packed is 2.0: it is a share of the documents
prepare_data.py copy --letters=0 --out=data/new: letters is 0: it must be 1 or more
bench.py layers: unexpected 'layers'
bench.py --lengths=64,x --tokens=64: lengths is '64,x'
bench.py --lengths=64 --tokens=100: tokens 100 is not a multiple of length 64
bench.py --modes=training: modes is 'training'
bench.py --compile=perhaps: --compile: 'perhaps' is not
bench.py --seed=1e30: --seed: '1e30' is not a whole number from 0 to 2**63 - 1
bench.py --json=texts: texts exists and is not a regular file: choose another name
bench.py --json=/dev/null: /dev/null exists and is not a regular file
bench.py --json=texts/1.txt/a.json: [Errno 17] File exists: 
bench.py --repeats=0: repeats is 0
bench.py --d_model=0: d_model is 0
bench.py --d_model=-5: --d_model: '-5' is not
bench.py model --preset=rat-2b: there is no preset 'rat-2b'
bench.py model --layers=rat: --layers is for layer
sample.py --ckpt=none.pt: there is no checkpoint none.pt
sample.py --ckpt=ids.pt --prompt=The: must be token ids
sample.py --prompt=a --prompt_file=b: both --prompt and --prompt_file
sample.py --temperature=-1: --temperature: '-1' is not
sample.py --num_samples=1e6: num_samples is 1000000: it must be from 1 to 1000
sample.py --context=64: unknown setting --context=64
sample.py --prompt_file=nowhere.txt: No such file or directory: 'nowhere.txt'
sample.py --max_new_tokens=1e15: out of memory: smaller sizes
sample.py --ckpt=ids.pt --tasks=piqa: this checkpoint names no tokenizer: give --tokenizer
sample.py --tasks=piqa --tokenizer=none.model: none.model needs pip install sentencepiece
sample.py --tasks=piqa --max_length=0: max_length is 0: it must be 1 or more
sample.py --json=scores.json: --json goes with --tasks
sample.py --tasks=piqa --limit=0: limit is 0: it must be 1 or more
sample.py --tasks=piqa --top_k=3: --top_k has no effect on --tasks: leave it out
prepare_data.py text nothing.txt: there is no file or folder nothing.txt
prepare_data.py text: 'text' is not a source: give stdlib (default), text FILES OR FOLDERS
prepare_data.py texts: 'texts' is not a source
prepare_data.py --layers=rat: --layers is for checkpoint
prepare_data.py text texts --val_every=1 --tokenizer=bytes --out=data/new: val_every is 1
prepare_data.py text texts --tokenizer=bytes --out=data/mine: data/mine is there already
prepare_data.py fineweb-edu --shards=2000: shards is 2000
prepare_data.py fineweb-edu --base_url=huggingface.co/x: it must begin with http
prepare_data.py fineweb-edu --base_url=file:///x: it must begin with http
prepare_data.py text texts --tokenizer=bytes --out=.: . is there already: choose another folder
prepare_data.py text texts --tokenizer=bytes --out=: --out: '' is not a value
prepare_data.py checkpoint: 'checkpoint' is not a source
prepare_data.py checkpoint official.pt --layers=rat: --out is missing
prepare_data.py checkpoint official.pt --out=new/ckpt.pt: --layers is missing
prepare_data.py checkpoint official.pt --layers=rat --n_head=4 --out=out/ckpt.pt: out/ckpt.pt is there already
prepare_data.py checkpoint official.pt --layers=rnn --n_head=4 --out=new/ckpt.pt: size mismatch
prepare_data.py checkpoint official.pt --layers=rat --n_head=4 --tokenizer=bytes --out=new/c.pt: bytes has 257
prepare_data.py checkpoint theirs.bin --layers=rat --out=new/ckpt.pt: there is no checkpoint theirs.bin
""".strip().splitlines()


def test_mistakes_are_one_clear_line_each(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    torch.save(official(*OFFICIAL["rat"])[1], "official.pt")
    prepare_data.load_official("official.pt", layers="rat", n_head=4).save("ids.pt")
    for line in MISTAKES:
        command, _, phrase = line.partition(": ")
        words = command.replace("TINY", " ".join(TINY)).split()
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit:
            prepare_data.run(importlib.import_module(words[0].removesuffix(".py")).main)
        out, error = capsys.readouterr()
        *notes, error = error.splitlines()
        assert exit.value.code == 2 and out == "" and all(note.startswith("note: ") for note in notes), line
        assert error.startswith(f"{words[0]}: error: ") and phrase in error, (line, error)
    assert not (workplace / "new").exists() and not (workplace / "data" / "new").exists()


def test_a_bug_keeps_its_traceback_and_a_diverging_run_its_last_checkpoint(workplace, monkeypatch, capsys):
    def broken(*args):
        raise TypeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(TypeError, match="a bug"):
        patch.setattr(Mixer, "forward", broken)
        prepare_data.run(lambda: script("train.py", *TINY, "--steps=1", "--out=bug"))
    script("train.py", *TINY, "--steps=10", "--out=diverged")
    before = (workplace / "diverged" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as exit:
        flags = ["--resume", "--out=diverged", "--steps=30", "--lr=1e18", "--clip=0"]
        prepare_data.run(lambda: script("train.py", *flags))
    error = capsys.readouterr().err
    message = r"error: step \d+: loss .*, norm of the gradient .*; a lower --lr may help; last good .*: "
    assert exit.value.code == 2 and re.search(message + r"diverged/ckpt.pt\n", error), error
    # A loss that is still finite, and weights that no longer are: in the very step that would be saved.
    for flags in ["--resume", "--out=diverged", "--steps=30", "--lr=1e17", "--eval_every=1"], [
        *TINY, "--steps=1", "--lr=1e18", "--sample_tokens=0", "--out=never"
    ]:  # fmt: skip
        with pytest.raises(SystemExit):
            prepare_data.run(lambda: script("train.py", *flags))
        error = capsys.readouterr().err
        assert re.search(r"error: step \d+: .*; a lower --lr may help; last good checkpoint: ", error), error
    assert (workplace / "diverged" / "ckpt.pt").read_bytes() == before
    assert not (workplace / "never" / "ckpt.pt").exists()
    for line in (workplace / "diverged" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


def test_the_lesson_fits_a_screen(capsys):
    rat.lesson()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "● ○ ○ ● ·" in "\n".join(lines)  # RAT's query 10: the last chunk's end, and itself


def test_samples_survive_a_terminal_without_utf8(workplace):
    for encoding, prompt in ("utf-8", "漢字"), ("cp1252", "??"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        words = ["", f"--ckpt={workplace}/out/ckpt.pt", "--max_new_tokens=3", "--prompt=漢字"]
        with mock.patch("sys.argv", words), mock.patch("sys.stdout", out):
            prepare_data.run(sample.main)
        out.flush()
        assert out.buffer.getvalue().decode(encoding).startswith(prompt)


def test_help_names_each_setting_and_its_default():
    result = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    for words in ("--steps INT", "--layers STR", "[0.004]", "peak learning rate", "several alternate"):
        assert words in result.stdout
    assert "--vocab_size" not in result.stdout


def test_a_reader_who_leaves_early_causes_no_traceback():
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process = subprocess.Popen([sys.executable, "train.py", "--dry_run"], **options)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (141, -signal.SIGPIPE)


# --- CUDA -----------------------------------------------------------------------------------------
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, T", CASES, ids=str)
def test_flex_and_its_gradients_equal_the_masked_matrix_on_cuda(kind, T, dtype, compiled):
    q, k, v = (torch.randn(2, 4, T, 64, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
    rope = rat.rotary_table(torch.arange(T, device="cuda"), 64, 100.0).float()
    attend = torch.compile(rat.attend, fullgraph=True) if compiled else rat.attend
    y = attend(q, k, v, rope, rat.block_mask(kind, T, q.device), kind)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected, tolerance = masked_matrix(*exact, kind), 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(y.double().cpu(), expected) < tolerance
    weight = torch.randn_like(expected)
    grads = grad((y * weight.to(dtype).cuda()).sum(), [q, k, v])
    for one, other in zip(grads, grad((expected * weight).sum(), exact)):
        assert one.isfinite().all() and relative_error(one.double().cpu(), other) < 2 * tolerance


@needs_cuda
@every_kind
@pytest.mark.parametrize("compiled", [False, True])
def test_every_kind_on_cuda_equals_that_on_the_cpu(layers, compiled):
    config = Config(n_layer=1, n_head=4, d_model=64, layers=layers)
    exact, mixer = randomize(Mixer(config)).double(), randomize(Mixer(config)).cuda()
    x = torch.randn(2, 2100, 64)  # long enough for flex_attention, and for the associative scan
    x1, x2 = x.double().requires_grad_(), x.cuda().requires_grad_()
    y1, y2 = exact(x1), (torch.compile(mixer, fullgraph=True) if compiled else mixer)(x2)
    assert relative_error(y2.cpu(), y1) < 1e-2
    grads = (grad(y.square().sum(), [x, *m.parameters()]) for y, x, m in ((y1, x1, exact), (y2, x2, mixer)))
    for a, b in zip(*grads):
        assert relative_error(b.cpu(), a) < 2e-2


@needs_cuda
def test_a_block_mask_for_131072_tokens_is_small():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rat.block_mask(pattern(16), 131072, torch.device("cuda"))
    assert torch.cuda.max_memory_allocated() - before < 1 << 28


@needs_cuda
def test_prompts_of_twenty_lengths_compile_a_handful_of_graphs(monkeypatch):
    """All kinds in one process, never reset: past the limit, torch would run flex_attention uncompiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for layers in ("rat:16", "swa:5", "rat+:4:8:2", "rat+:5:0:3"):
        model = randomize(RAT(Config(n_layer=1, layers=layers))).cuda()
        before = counters["stats"]["unique_graphs"]
        for T in range(2048, 4048, 100):
            tokens = torch.randint(257, (1, T), device="cuda")
            with torch.no_grad():
                assert relative_error(logits_in_pieces(model, tokens, [T - 2, 1, 1]), model(tokens)[0]) < 1e-2
        assert counters["stats"]["unique_graphs"] - before <= 8


@needs_cuda
@every_kind
def test_every_kinds_compiled_step_on_cuda_never_waits_for_the_gpu(layers):
    config = Config(vocab_size=50, n_layer=2, n_head=4, d_model=64, layers=layers)
    model, tokens = randomize(RAT(config)), torch.randint(50, (3, 60))
    expected = model(tokens)[0][:, 20:]
    model, tokens = model.cuda(), tokens.cuda()
    model.decode, cache = torch.compile(model.decode, fullgraph=True, dynamic=False), model.cache(3, 256)
    with torch.no_grad():
        model(tokens[:, :20], cache=cache)
        logits = [model(tokens[:, 20:21], cache=cache)[0]]  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits += [model(token, cache=cache)[0] for token in tokens[:, 21:].split(1, dim=1)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert relative_error(torch.cat(logits, dim=1).cpu(), expected) < 1e-2


@needs_cuda
@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:16", "rat+:16:4:1"])
def test_a_training_step_on_cuda_never_waits_for_the_gpu(layers):
    model = RAT(Config(n_layer=2, context=2304, layers=layers)).cuda()
    run, x = train.Run(model, train.Settings(), 2), torch.randint(257, (2, 2304), device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run.update([(x, x, 0.5), (x.clone(), x, 0.5)], 1e-4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
