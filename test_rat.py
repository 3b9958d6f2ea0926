"""The claims of this repository, tested. `pytest` runs what the machine can; CUDA tests skip without CUDA.

The oracle is the equation at the top of rat.py in its plainest form: float64, one token after the other, all
T x T scores, sharing no code with rat.py. A new kind of layer needs an entry in KINDS and, in `oracle_mixer`,
its visible keys; then `pytest -k kind` checks its training, gradients, decoding and cache.
"""

import contextlib
import copy
import dataclasses
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
from torch.utils.flop_counter import FlopCounterMode

import bench
import prepare_data
import rat
import train
from prepare_data import Data, get_tokenizer
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
    ("rat:16", (64, 20), "inductor"), *((kind, (64, 33, 20, 50), "aot_eager") for kind in KINDS[::4])
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
    ("rnn", 2048, 16, torch.float32, False), ("swa:100", 2048, 16, torch.float32, True),
    ("rat:4096", 2048, 16, torch.float32, False), ("rat+:0", 2048, 16, torch.float32, False),  # no far key
], ids=str)  # fmt: skip
def test_flex_attention_is_for_long_sequences_on_cuda_alone(layers, T, D, dtype, expected):
    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    mixer, position = Mixer(Config(layers=layers, n_head=2, d_model=2 * D)), torch.arange(T)
    assert mixer.tables(position, dtype)[2] is None
    assert (mixer.tables(position.as_subclass(OnCuda), dtype)[2] is not None) == expected


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


# --- A layer in somebody's own model --------------------------------------------------------------
@every_kind
def test_a_kind_by_hand_decodes_with_positions_from_its_cache(layers):
    """A transformer of the reader's own: two mixers and a norm, tokens in pieces, in float32 and autocast."""
    config = Config(d_model=16, n_head=2, layers=layers)
    mixers, norm, x = [Mixer(config), Mixer(config)], torch.nn.LayerNorm(16), torch.randn(3, 26, 16)

    def forward(x, caches=(None, None)):
        for mixer, cache in zip(mixers, caches):
            x = x + mixer(norm(x), cache)
        return x

    for half, tolerance in (False, 1e-5), (True, 0.02):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            caches = [Cache(mixer, 3, 26) for mixer in mixers]
            pieces = [forward(piece, caches) for piece in x.split([9, 1, 1, 6, 1, 8], dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), forward(x)) < tolerance


# --- The language model ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    config = Config(vocab_size=30, n_layer=2, n_head=2, d_model=16, context=32, layers="rat:4,swa:3")
    return randomize(RAT(config, "bytes"))


def text(model, prompt, n=12, **options):
    return torch.stack(list(model.generate(prompt, n, **options)), dim=1)


def test_greedy_generation_is_the_forward_pass_and_sampling_repeats_with_its_seed(model):
    prompt = torch.randint(30, (3, 7))
    tokens = torch.cat([prompt, text(model, prompt, temperature=0)], dim=1)
    assert torch.equal(model(tokens)[0].argmax(-1)[:, 6:-1], tokens[:, 7:])
    for options in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-39)):
        assert torch.equal(text(model, prompt, **options), tokens[:, 7:])
    assert torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=3))
    assert not torch.equal(text(model, prompt, seed=3), text(model, prompt, seed=4))


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


def test_the_loss_in_chunks_is_the_loss(model, monkeypatch):
    tokens, targets = torch.randint(30, (2, 4, 33))
    targets[0, 5:20] = -100
    whole, parameters, sizes = model(tokens, targets)[1], list(model.parameters()), []
    chunked = copy.copy(model)
    monkeypatch.setattr(RAT, "LOSS_CHUNK", 16)
    chunked.nats = lambda x, y: sizes.append(len(x)) or RAT.nats(model, x, y)
    loss = chunked(tokens, targets)[1]
    assert_equal_with_gradients(loss, whole, parameters, 1e-6)
    assert max(sizes) == 16  # never the logits of more tokens
    assert model(tokens, torch.full_like(targets, -100))[1] == 0  # nothing to predict


@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:7", "rat+:8:5:2", "gated", "rat:4,swa:9"])
def test_counted_operations_are_those_that_are_needed(layers, monkeypatch):
    """The weights' products as a counter sees them run, and two of width d for each key that a query sees."""
    config = Config(vocab_size=64, n_layer=2, n_head=2, d_model=16, context=48, layers=layers)
    monkeypatch.setattr(rat, "attend", lambda q, k, v, *_: v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        RAT(config)(torch.zeros(1, 48, dtype=torch.long))
    i, kinds = torch.arange(48), [config.kind(layer) for layer in range(2)]
    seen = sum(kind.visible(i[:, None], i).sum().item() for kind in kinds if kind.qk_heads)
    expected = 3 * (counter.get_total_flops() + 4 * 16 * seen) / 48
    assert train.flops_per_token(config) == pytest.approx(expected, rel=1e-9)


def test_a_saved_model_loads_from_file_or_folder_and_runs_no_code(model, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    model.save(path, step=7)
    tokens, saved = torch.randint(30, (2, 20)), torch.load(path, weights_only=True)
    assert saved["step"] == 7 and [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    for prefix in "", "module.", "_orig_mod.", "module._orig_mod.":
        torch.save(saved | {"model": {prefix + name: x for name, x in saved["model"].items()}}, path)
        loaded = RAT.load(tmp_path)
        assert loaded.config == model.config and loaded.tokenizer == "bytes"
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", lambda contents, path: Path(path).write_text("half of it") and 1 / 0)
        model.save(path)
    assert torch.equal(RAT.load(path)(tokens)[0], model(tokens)[0])
    torch.save(saved | {"tokenizer": Path("any class")}, path)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        RAT.load(path)


@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:4", "rat+:4:2"])
def test_wrapped_projections_compute_and_decode(layers):
    model = randomize(RAT(Config(vocab_size=50, n_layer=2, d_model=32, layers=layers)))
    tokens = torch.randint(50, (2, 20))
    whole = model(tokens)[0]
    for block in model.blocks:  # as LoRA does: in_proj has no weight of its own
        block.mixer.in_proj = torch.nn.Sequential(block.mixer.in_proj)
    assert torch.equal(model(tokens)[0], whole)
    assert_decodes(model, tokens, [7, 1, 1, 11])


def test_the_padding_of_the_vocabulary_is_invisible(model):
    model, tokens = copy.deepcopy(model), torch.zeros(4, 3, dtype=torch.long)
    assert model.embedding.weight.shape[0] == 64 and model(tokens)[0].shape == (4, 3, 30)
    before = model(tokens, tokens + 1)[1]
    with torch.no_grad():
        model.embedding.weight[30:] = 100.0
    assert torch.equal(model(tokens, tokens + 1)[1], before) and text(model, tokens, 50).max() < 30


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


@pytest.mark.parametrize("call, message", [
    (lambda m: Config(qk_groups=3), "n_head 4 is not a multiple of qk_groups 3"),
    (lambda m: Config(layers="rat,,swa"), "there is no layer '': take attention, swa, rnn, rat, rat"),
    (lambda m: Config(layers="rat+:1:x"), r"there is no layer 'rat\+:1:x'"),
    (lambda m: Config(layers="rat:16:4"), "there is no layer 'rat:16:4'"),
    (lambda m: Config(layers="swa:-1"), "there is no layer 'swa:-1'"),
    (lambda m: m(torch.full((1, 3), 30)), "a token is not in the vocabulary, 0 to 29"),
    (lambda m: text(m, torch.full((1, 3), -1)), "a token is not in the vocabulary, 0 to 29"),
])  # fmt: skip
def test_what_cannot_be_is_one_clear_line(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(copy.deepcopy(model))


# --- Data ---
def shards_of(folder, split):
    return [prepare_data.read_shard(path) for path in sorted(Path(folder).glob(f"*{split}*.bin"))]


@pytest.mark.parametrize("shard_tokens", [10, 3000, 10**6])
def test_shards_are_the_documents_each_after_an_end_of_text(tmp_path, shard_tokens):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(2000)] + ["ünïcödé 漢字"]
    prepare_data.prepare(texts, tmp_path / "data", "mine", "bytes", 10, shard_tokens)
    expected = {"train": [], "val": []}
    for i, words in enumerate(texts):
        expected["val" if i % 10 == 1 else "train"] += [256, *words.encode()]
    for split, tokens in expected.items():
        assert np.concatenate(shards_of(tmp_path / "data", split)).tolist() == tokens
    raw = (tmp_path / "data" / "mine_val_000000.bin").read_bytes()
    assert raw[:8] == np.array([20240520, 1], "<i4").tobytes()
    assert json.loads((tmp_path / "data" / "meta.json").read_text()) == prepare_data.BYTES
    with pytest.raises(ValueError, match="is there already: choose another folder"):
        prepare_data.prepare(texts, tmp_path / "data", "mine", "bytes")


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


def test_prepare_leaves_nothing_half_made_and_a_single_document_gives_its_end_to_validation(tmp_path):
    def texts():
        yield from ["one", "two", "three"]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        prepare_data.prepare(texts(), tmp_path / "data", "mine", "bytes")
    assert list(tmp_path.iterdir()) == []
    prepare_data.prepare(["x" * 100], tmp_path / "data", "mine", "bytes")
    assert [len(shards_of(tmp_path / "data", split)[0]) for split in ("train", "val")] == [91, 11]


@pytest.fixture
def folder(tmp_path):
    """Two training shards of 100 and 57 tokens and a validation shard, of ascending tokens; llm.c's names."""
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_train.bin", range(100))
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_train_2.bin", range(100, 157))
    prepare_data.write_shard(tmp_path / "tiny_shakespeare_val.bin", range(50))
    (tmp_path / "meta.json").write_text(json.dumps(prepare_data.BYTES))
    return tmp_path


def test_an_epoch_shows_every_window_once_in_an_order_that_only_the_seed_sets(folder):
    data, starts = Data(folder, "train", 10, seed=1), [*range(0, 90, 10), *range(100, 150, 10)]
    assert len(data) == 9 + 5  # 99 and 56 targets
    epochs = [data.batch(epoch, 14)[0][:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == starts for epoch in epochs) and epochs[0] != epochs[1] != epochs[2] != starts
    inputs, targets = data.batch(1, 5)
    assert (inputs == inputs[:, :1] + np.arange(10)).all()
    assert (targets == inputs + 1).all()  # all tokens are targets, the first of a document too
    assert Data(folder, "train", 10, seed=2).batch(0, 14)[0][:, 0].tolist() != epochs[0]
    for size in (2, 5, 13, 40):  # batches of any size, across epochs, from any step
        for step in reversed(range(42 // size)):
            expected = sum(epochs, [])[step * size : (step + 1) * size]
            assert Data(folder, "train", 10, seed=1).batch(step, size)[0][:, 0].tolist() == expected


def test_prefetch_runs_ahead_and_passes_errors_on():
    def numbers():
        yield from range(10)
        raise ValueError("no more")

    ahead = prepare_data.prefetch(numbers(), depth=3)
    assert [next(ahead) for _ in range(10)] == list(range(10))
    with pytest.raises(ValueError, match="no more"):
        next(ahead)


@pytest.mark.parametrize("damage, message", [
    (lambda raw: b"<html>" + raw[6:], "is not a whole shard"), (lambda raw: raw[:-2], "is not a whole shard"),
    (lambda raw: raw[:4] + b"\7" + raw[5:], "is not a whole shard of version 1"),
    (lambda raw: raw[:500], "is not a whole shard"), (lambda raw: b"", "is not a whole shard"),
    (lambda raw: raw[:-2] + b"\xff\xff", "holds token 65535, its vocabulary 257"),
])  # fmt: skip
def test_bad_shards_are_one_clear_line(folder, damage, message):
    path = folder / "tiny_shakespeare_train.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Data(folder, "train", 9).batch(0, 17)


def test_text_streams_whole_characters():
    stream = prepare_data.TextStream(get_tokenizer("bytes"))
    assert [stream(byte) for byte in "é漢x".encode()] == ["", "é", "", "", "漢", "x"]


@pytest.fixture
def server(tmp_path_factory):
    """Serves the files of `folder`; `faults` are what it does first: an HTTP status, or "short"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            fault, path = (self.server.faults or [None]).pop(0), self.server.folder / self.path[1:]
            if isinstance(fault, int) or not path.exists():
                return self.send_error(fault or 404)
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: 300 if fault == "short" else None])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.faults, server.requests = tmp_path_factory.mktemp("served"), [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_download_survives_faults_keeps_what_is_whole_and_mends_what_is_not(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{n:06d}.bin" for n in (1, 2)]
    for n, name in enumerate(names):
        prepare_data.write_shard(server.folder / name, range(1000 + n))
    shutil.copy(server.folder / names[0], tmp_path)
    (tmp_path / names[1]).write_bytes((server.folder / names[1]).read_bytes()[:-9])  # damaged
    server.faults += [503, "short", 500]
    flags = ["fineweb-edu", "--shards=2", f"--base_url={server.url}", f"--out={tmp_path}"]
    script("prepare_data.py", *flags)
    for name in names:
        assert (tmp_path / name).read_bytes() == (server.folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert len(server.requests) == 2 + 3 and f"/{names[0]}" not in server.requests
    with pytest.raises(ValueError, match="train_000003.bin: HTTP Error 404: .* run this again to continue"):
        script("prepare_data.py", *flags[:1], "--shards=3", *flags[2:])
    server.faults += ["short"] * 5
    with pytest.raises(ValueError, match="is not a whole shard"):
        prepare_data.download(f"{server.url}/{names[1]}", tmp_path / "new.bin")
    assert not (tmp_path / "new.bin").exists()


# --- Training ---
def script(*words, stdin=""):
    """Runs a script's main in the workplace and returns what it printed."""
    main, out = importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main, io.StringIO()
    with (
        mock.patch("sys.argv", list(map(str, words))),
        mock.patch("sys.stdin", io.StringIO(stdin)),
        contextlib.chdir(script.folder),
        contextlib.redirect_stdout(out),
    ):
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


def test_training_learns_and_shows_how(workplace):
    options = dict(steps=30, lr=1e-2, log_every=4, sample_tokens=20, eval_tokens=64)
    out = script("train.py", *flags(**options, out="whole"))
    log = log_of(workplace / "whole")
    assert [line["step"] for line in log] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert [line["step"] for line in log if "val_loss" in line] == [10, 20, 30]
    line = r"\nstep 30/30  train [\d.]+  val [\d.]+  bits_per_byte [\d.]+  [\d,]+ tokens/s  0:00:00 left\n"
    assert re.search(line, out) and "how the model continues it" in out and out.endswith("whole/ckpt.pt\n")
    last = log[-1]
    assert last["val_loss"] < log[2]["val_loss"] < 5.6 and last["lr"] == pytest.approx(1e-6)
    assert last["bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=0.01)
    assert last["tokens"] == 30 * 512


def test_speed_is_that_of_training_alone_over_the_steps_since_the_last_line(workplace):
    clock = [0.0]

    def update(*args, update=train.Trainer.update):
        clock[0] += 1.0
        return update(*args)

    def evaluate(*args, evaluate=train.Trainer.evaluate):
        clock[0] += 50.0
        return evaluate(*args)

    fake = types.SimpleNamespace(perf_counter=lambda: clock[0])
    patched = mock.patch.multiple("train.Trainer", update=update, evaluate=evaluate)
    with patched, mock.patch("train.time", fake):
        script("train.py", *flags(steps=5, eval_every=3, log_every=2, out="speed"))
    assert [line["step"] for line in log_of(workplace / "speed")] == [2, 3, 4, 5]
    assert {line["tokens_per_second"] for line in log_of(workplace / "speed")} == {512.0}


@pytest.mark.parametrize("layers", [{}, dict(layers="rat+", joint="rat+:4")], ids=["rat", "rat+ jointly"])
def test_a_killed_run_resumes_to_the_same_losses_and_weights_bit_for_bit(workplace, layers):
    options, n = dict(steps=40, log_every=5, **layers), len(layers)
    script("train.py", *flags(**options, out=f"unbroken{n}"))
    command = [sys.executable, ROOT / "train.py", *flags(**options, out=f"killed{n}")]
    killed = subprocess.Popen(command, cwd=workplace, stdout=subprocess.DEVNULL)
    while not (workplace / f"killed{n}" / "ckpt.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    killed.kill()
    killed.wait()
    (workplace / f"killed{n}").rename(workplace / f"copied{n}")  # a run lives in the folder it is in
    with open(workplace / f"copied{n}" / "log.jsonl", "a") as log:
        log.write('{"step": 1000}\n{"st')  # of a run that was killed later, in the middle of a line
    script("train.py", "--resume", f"--out=copied{n}")
    assert_same_run(workplace / f"unbroken{n}", workplace / f"copied{n}", 0)
    assert not (workplace / f"killed{n}").exists()


def test_killed_between_its_log_and_its_checkpoint_a_run_loses_nothing(workplace):
    script("train.py", *flags(steps=30, out="calm"))
    save, calls = train.Trainer.save, itertools.count(1)

    def killed(*args):
        if next(calls) == 2:
            raise SystemExit
        save(*args)

    with mock.patch("train.Trainer.save", killed), pytest.raises(SystemExit):
        script("train.py", *flags(steps=30, out="torn"))
    assert log_of(workplace / "torn")[-1]["step"] == 20
    script("train.py", "--resume", "--out=torn")
    assert_same_run(workplace / "calm", workplace / "torn", 0)


def test_a_resumed_run_takes_the_flags_the_folder_and_the_machine_that_it_is_given(workplace, monkeypatch):
    shutil.copytree(workplace / "out", workplace / "moved" / "out")
    saved = torch.load(workplace / "out" / "ckpt.pt", weights_only=True)
    saved["settings"] |= {"device": "cuda:7", "out": "elsewhere"}
    torch.save(saved, workplace / "moved" / "out" / "ckpt.pt")
    monkeypatch.setattr(script, "folder", workplace / "moved")
    script("train.py", "--resume", "--steps=31", "--weight_decay=0.03", "--lr=1e-3", "--data=../data/mine")
    saved = torch.load(workplace / "moved" / "out" / "ckpt.pt", weights_only=True)
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.03, 0.0}
    assert log_of(workplace / "moved" / "out")[-1]["tokens"] == 31 * 512


def test_what_is_not_finite_is_never_saved(workplace):
    script("train.py", *flags(steps=10, out="finite"))
    before = (workplace / "finite" / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match=r"step \d+: not finite: .*; a lower --lr may help"):
        script("train.py", "--resume", "--out=finite", "--steps=30", "--lr=1e18", "--clip=0")
    s = train.Settings(out=str(workplace / "finite"))
    trainer = train.Trainer(RAT(Config(n_layer=1, n_head=2, d_model=8), "bytes"), s)
    x = np.ones((16, 256), dtype=np.int64)
    trainer.update((x, x), 1e-3)
    p = trainer.model.norm.weight
    for tensor in (p.data, trainer.optimizer.state[p]["exp_avg_sq"]):
        kept, tensor[3] = tensor[3].item(), math.inf
        with pytest.raises(ValueError, match="step 2: the weights are not finite"):
            trainer.save(2)
        tensor[3] = kept
    assert (workplace / "finite" / "ckpt.pt").read_bytes() == before
    for line in (workplace / "finite" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


def test_micro_batches_recomputation_and_compilation_change_nothing(workplace, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled(f, backend="aot_eager", dynamic=False))
    runs = dict(plain={}, parts=dict(micro_batch=4), again=dict(recompute=True), compiled=dict(compile=True))
    for name, more in (runs | dict(both=dict(recompute=True, compile=True))).items():
        script("train.py", *flags(steps=10, n_layer=1, layers="rat:4", out=name, **more))
        assert_same_run(workplace / "plain", workplace / name, 1e-4)
    sample = ["sample.py", "--ckpt=plain", "--temperature=0", "--max_new_tokens=40"]
    assert script(*sample, "--compile=true") == script(*sample)


compiled = torch.compile


@pytest.mark.parametrize("dense, sparse", [("rat+", "rat+:4"), ("gated", "gated:0:6")])
def test_joint_training_updates_sparse_then_dense_at_one_learning_rate(workplace, dense, sparse):
    """The recipe of RAT+ by hand: two whole updates on a batch, one step of the schedule."""
    N, lr, out = 4, 1e-2, f"jointly/{dense}"
    script("train.py", *flags(layers=dense, joint=sparse, steps=N, lr=lr, out=out))
    (line,), trained = log_of(workplace / out), RAT.load(workplace / out)
    assert trained.config.layers == dense
    torch.manual_seed(1)
    model = RAT(trained.config, "bytes")
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95))
    data, losses = Data(workplace / "data" / "mine", "train", 32, 1), {sparse: [], dense: []}
    rates = [lr] + [1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * n / (N - 2))) / 2 for n in range(N - 1)]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = (torch.from_numpy(part) for part in data.batch(step, 16))
        for layers in (sparse, dense):
            model.use(layers)
            loss = model(x, y)[1]
            losses[layers].append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    means = [np.mean(losses[layers]) for layers in (sparse, dense)]
    assert (line["train_loss_sparse"], line["train_loss"]) == pytest.approx(means, rel=1e-5)
    for name, p in trained.state_dict().items():
        assert relative_error(p, model.state_dict()[name]) < 1e-3


def test_a_model_is_evaluated_and_adapted_with_another_pattern_and_context(workplace):
    out = script("train.py", *flags(layers="rat+", steps=20, eval_tokens=800, out="plus"))
    assert " train_sparse " in out  # a dense rat+ model is trained jointly
    given = ["--init_from=plus", "--data=data/mine", "--dtype=float32", "--eval_only"]

    def loss(*more):
        text = script("train.py", *given, "--batch_tokens=7", *more)  # which evaluation does not need
        return float(re.search(r"validation loss ([\d.]+)", text)[1])

    line = log_of(workplace / "plus")[-1]
    assert loss("--eval_tokens=800") == pytest.approx(line["val_loss"], abs=1e-4)
    assert loss("--eval_tokens=800", "--layers=rat+:64") == pytest.approx(line["val_loss_sparse"], abs=1e-4)
    layers = "rat+:1:9,rat+:0:9:2"
    x, y = (torch.from_numpy(part) for part in Data(workplace / "data" / "mine", "val", 64).batch(0, 12))
    expected = RAT.load(workplace / "plus", layers=layers)(x, y)[1].item()
    found = loss("--eval_tokens=768", "--context=64", f"--layers={layers}")
    assert found == pytest.approx(expected, abs=1e-4)

    more = ["--init_from=plus", "--lr=1e-4", "--warmup=0", "--steps=20", "--batch_tokens=512", *given[1:3]]
    assert "sparse" not in script("train.py", *more, "--layers=rat+:4:3", "--out=plus/adapted")
    adapted = RAT.load(workplace / "plus" / "adapted")
    assert adapted.config.layers == "rat+:4:3"
    assert adapted(x, y)[1] < RAT.load(workplace / "plus", layers="rat+:4:3")(x, y)[1]
    assert "train_sparse" in script("train.py", *more[:4], "--batch_tokens=128", *given[1:3], "--out=plus/on")


def test_a_model_and_data_of_different_tokens_do_not_meet(workplace, folder):
    for meta in ({"tokenizer": "gpt2", "vocab_size": 257}, {"tokenizer": "bytes", "vocab_size": 300}):
        (folder / "meta.json").write_text(json.dumps(meta))
        for words in ["--init_from=out", "--out=mixed"], ["--resume", "--steps=40"]:
            with pytest.raises(ValueError, match=f"is in tokens of {meta['tokenizer']}, the model of bytes"):
                script("train.py", f"--data={folder}", *words)


def test_without_its_tokenizer_training_works_and_says_what_is_missing(workplace, monkeypatch):
    shutil.copytree(workplace / "data" / "mine", workplace / "data" / "gpt2")
    (workplace / "data" / "gpt2" / "meta.json").unlink()  # as in published shards
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", mock.Mock(side_effect=OSError("no network")))
    out = script("train.py", *flags(data="data/gpt2", steps=2, d_model=8, sample_tokens=9, out="gpt2"))
    assert "no bits per byte and no sample: tokenizer gpt2 needs the network once" in out and "---" not in out
    assert RAT.load(workplace / "gpt2").config.vocab_size == 50257
    with pytest.raises(ValueError, match="tokenizer gpt2 needs the network once"):
        script("sample.py", "--ckpt=gpt2")


@pytest.mark.parametrize("preset, parameters, gflop", [
    # rat-1b: 24 x (3.25 + 1 + 8) x 2048^2 + 50304 x 2048 = 1336 M, times 6, plus 3 x 24 x 4 x 2048 x 128.5
    ("rat-1b", "1,336", "8.09"), ("attention-1b", "1,311", "9.07"), ("rat-swa-200m", "204", "1.30"),
    # 24 x (5 + 1 + 8) x 2048^2 + 50304 x 2048 weights; keys of a query: 2048.5 when dense, and 32.5 with D=64
    ("rat+-1b", "1,512", "19.38"), ("rat+-3b", "2,697", "34.16"), ("rat+-7b", "7,722", "95.94"),
])  # fmt: skip
def test_no_steps_print_what_a_run_would_need(workplace, preset, parameters, gflop):
    out = script("train.py", f"--preset={preset}", "--steps=0", "--out=needs")
    assert re.search(rf"parameters +{parameters}\.\d M", out) and f"{gflop} GFLOP per token" in out, out
    if preset == "rat-1b":  # 47684 steps of 2 M tokens
        assert "100 B, 47,684 steps" in out and "5.35 GB per process of weights" in out
    assert not (workplace / "needs").exists()


def torchrun(n, *words):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command = [*launch, ROOT / words[0], *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.folder, timeout=120)


def test_processes_share_the_work_and_change_nothing_and_resume_each_others_runs(workplace):
    """One process, two and three with DDP, two with FSDP: the same losses, to 1e-5, on the same batches."""
    options = dict(steps=6, eval_every=6, device="cpu", layers="rat+,rat", joint="rat+:4,rat")
    options |= dict(batch_tokens=384, warmup=0, lr=1e-3)
    for n, parallel, micro_batch in (2, "ddp", 3), (3, "ddp", 4), (2, "fsdp", 2):
        out = f"runs/{parallel}{n}"
        more = dict(parallel=parallel, micro_batch=micro_batch, out=out)
        first = torchrun(n, "train.py", *flags(**options, **more))
        assert first.returncode == 0, first.stderr[-3000:]
        again = ["--resume", f"--out={out}", "--steps=12"]
        if n == 3:
            script("train.py", *again)
        else:
            assert torchrun(2, "train.py", *again, "--parallel=ddp").returncode == 0
    script("train.py", *flags(**options, out="runs/alone"))
    script("train.py", "--resume", "--out=runs/alone", "--steps=12")
    for other in ("ddp2", "ddp3", "fsdp2"):
        assert_same_run(workplace / "runs" / "alone", workplace / "runs" / other)


def test_fsdp_in_bfloat16_computes_what_one_process_does(workplace):
    """Micro-batches of one size, so that sums differ by the order of the processes alone."""
    options = dict(dtype="bfloat16", steps=6, log_every=1, micro_batch=4, device="cpu", layers="rat,rnn")
    script("train.py", *flags(**options, out="bf16/one"))
    run = torchrun(2, "train.py", *flags(**options, parallel="fsdp", out="bf16/fsdp"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same_run(workplace / "bf16" / "one", workplace / "bf16" / "fsdp", 5e-5)


def test_under_torchrun_a_mistake_is_told_once_and_a_sample_written_once(workplace):
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
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


# --- Sampling, timing, mistakes ---
def test_by_default_evaluation_costs_at_most_a_tenth_of_training():
    """A forward pass is a third of a step, whatever the vocabulary."""
    for preset in ({}, *train.PRESETS.values()):
        r = vars(train.Settings()) | preset
        assert r["eval_tokens"] / 3 <= 0.1 * r["eval_every"] * r["batch_tokens"]


def test_the_beginning_of_a_document_is_learned_and_written(workplace):
    lines = (json.dumps({"text": f"Once upon a time there were {n} cats."}) for n in range(2000))
    (workplace / "once.jsonl").write_text("\n".join(lines))
    script("prepare_data.py", "text", "once.jsonl", "--tokenizer=bytes", "--out=data/once")
    options = dict(data="data/once", n_layer=1, context=64, batch_tokens=1024, steps=150)
    script("train.py", *flags(**options, out="once"))
    assert RAT.load(workplace / "once")(torch.tensor([[256]]))[0][0, 0].softmax(-1)[ord("O")] > 0.9
    assert script("sample.py", "--ckpt=once", "--max_new_tokens=4", "--temperature=0") == "Once\n"


def test_sample_writes_from_a_prompt_a_file_and_standard_input(workplace):
    (workplace / "prompt.txt").write_text("The number")
    options = ("--seed=1", "--max_new_tokens=20")
    direct = script("sample.py", "--prompt=The number", *options)
    assert direct.startswith("The number") and len(direct) > len("The number")
    assert script("sample.py", "--prompt_file=prompt.txt", *options) == direct
    assert script("sample.py", "--prompt_file=-", *options, stdin="The number") == direct
    assert script("sample.py", "--prompt=The number", "--top_k=0", "--top_p=1", *options) == direct
    assert script("sample.py", "--prompt=The number", "--seed=2", "--max_new_tokens=20") != direct
    three = script("sample.py", "--num_samples=3", "--temperature=0", "--top_k=5", "--prompt=The")
    texts = [text.strip() for text in re.split(r"\n--- \d\n", three)]
    assert len(texts) == 3 and len(set(texts)) == 1 and texts[0].startswith("The")


def test_bench_times_layers_and_models(workplace):
    def rows(*words):
        with mock.patch.object(bench.Hardware, "times", lambda self, step, n: [step(), 0.01][1:] * n):
            script("bench.py", *words, "--repeats=1", "--json=a.json")
        return json.loads((workplace / "a.json").read_text())["results"]

    names, sizes = ["attention", "rnn", "rat:16"], ["--d_model=32", "--n_head=2", "--lengths=64"]
    layers = rows("--tokens=128", "--sequences=3", "--layers=rnn,rat:16", *sizes)
    order = [(mode, name) for mode in ("train", "prefill", "decode") for name in names]
    assert [(row["mode"], row["name"]) for row in layers] == order
    assert {"T", "ms", "ratio", "floor", "tokens_per_second", "memory", "cache"} <= layers[0].keys()
    # RAT's own key and 3 chunk ends; the state
    expected = [3 * 64 * 2 * 32 * 4, 3 * 32 * 4, 3 * (1 + 3) * 2 * 32 * 4 + 3 * 2 * 32 * 4]
    assert [row["cache"] for row in layers[6:]] == expected
    models = rows("model", "--prompt=10", "--max_new_tokens=5", "--batch=2,3", "--layers=rat:16")
    order = [("train", 2), ("train", 2), ("generate", 2), ("generate", 2), ("generate", 3), ("generate", 3)]
    assert [(row["mode"], row["T"]) for row in models] == order
    assert models[2]["cache"] == 2 * 15 * 4 * 2 * 128 * 4 and models[2]["tokens_per_second"] == 1000.0


MISTAKES = """
train.py --learning_rate=1: there is no --learning_rate: see --lr
train.py --batch_size=1: see --batch_tokens
train.py --max_iters=9: see --steps
train.py --block_size=9: see --context
train.py --warmup_iters=100: there is no --warmup_iters: see --warmup, a fraction of the steps
train.py --warmup=100 --out=new: --warmup=100.0 is a fraction of the steps
train.py --eval_only --out=new: --eval_only needs a checkpoint
train.py --step=1: there is no --step: see --steps
train.py --data=a --data=b: --data is given 2 times
train.py --steps=many: --steps: invalid int value: 'many'
train.py --compile=maybe: --compile: invalid boolean value: 'maybe'
train.py --dtype=int8: --dtype: invalid choice: 'int8'
train.py --preset=rat-2b: --preset: invalid choice: 'rat-2b'
train.py --layers=rats: there is no layer 'rats'
train.py --init_from=out --data=data/mine: out/ckpt.pt is there already
train.py --layers=rat:0: there is no layer 'rat:0'
train.py --data=data/mine: out/ckpt.pt is there already: --resume continues it
train.py --data=data/mine --batch_tokens=500 --out=new: batch_tokens 500 is not a multiple of 1 processes x
train.py --data=data/mine --micro_batch=5 --out=new: batch_tokens 4096 is not a multiple of
train.py --data=data/mine --joint=rat+:4 --out=new: has other weights than one of rat+:4
train.py --data=data/none --out=new: there are no shards data/none/*train*.bin
train.py --resume --out=new: No such file or directory: 'new/ckpt.pt'
train.py --resume: has made 30 steps already: a larger --steps continues it
train.py --resume --preset=rat-200m: has made 30 steps already
train.py --resume --d_model=64: --d_model=64: the checkpoint has 32, which cannot change
train.py --resume --batch_tokens=1024: --batch_tokens=1024: the checkpoint has 512
train.py --resume --seed=2: --seed=2: the checkpoint has 1
train.py --resume --layers=rat:4: --layers=rat:4: the checkpoint has rat:16
train.py --init_from=out --n_head=4 --out=new: --n_head=4: the checkpoint has 2
train.py --init_from=out --layers=attention --out=new: has other weights than one of attention
train.py --init_from=none.pt --out=new: No such file or directory: 'none.pt'
prepare_data.py text: text takes files or folders
prepare_data.py text nothing.txt: there is no file or folder nothing.txt
prepare_data.py text texts --tokenizer=bytes --val_every=1 --out=fresh: val_every is 1
prepare_data.py text texts --tokenizer=llama: there is no tokenizer llama
prepare_data.py text texts --tokenizer=bytes --out=data/mine: data/mine is there already
sample.py --start=The: there is no --start: see --prompt
sample.py --ckpt=none.pt: No such file or directory: 'none.pt'
sample.py --layers=attention: has other weights than one of attention
sample.py --prompt_file=nowhere.txt: No such file or directory: 'nowhere.txt'
bench.py --layers=rats: there is no layer 'rats'
bench.py --lengths=64 --tokens=100: --lengths=64 do not divide --tokens=100
bench.py --modes=training: --modes=training: layer has train,prefill,decode
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_clear_line(workplace, monkeypatch, capsys, line):
    monkeypatch.chdir(workplace)
    command, _, phrase = line.partition(": ")
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as exit:
        prepare_data.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "error: " in error and phrase in error, error
    assert not (workplace / "new" / "ckpt.pt").exists()


def test_a_bug_keeps_its_traceback():
    def broken():
        _a, _b = [1, 2, 3]

    with pytest.raises(ValueError, match="too many values to unpack"):
        prepare_data.run(broken)


def test_help_names_each_setting_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    for words in ("--steps INT", "--layers STR", "[0.004]", "peak learning rate", "several alternate"):
        assert words in out
    assert "--vocab_size" not in out


def test_prepare_data_imports_no_torch_and_the_scripts_form_no_circle():
    for name, absent in ("prepare_data", {"torch", "rat"}), ("rat", {"prepare_data"}), ("sample", {"train"}):
        code = f"import sys, {name}; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert not absent & set(run.stdout.split()) and run.returncode == 0


def test_the_lesson_fits_a_screen(capsys):
    rat.lesson()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "● ○ ○ ● ·" in "\n".join(lines)  # RAT's query 10: the last chunk's end, and itself


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
