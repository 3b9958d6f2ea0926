"""The claims of this repository, tested. `pytest` runs everything that the machine can run; CUDA tests skip without CUDA.

The oracle is the equation at the top of rat.py in its plainest form: float64, one token after the other, all T x T
scores, written with no code of rat.py.
"""

import copy
import dataclasses
import gzip
import importlib
import importlib.util
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from argparse import Namespace
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import prepare_data
import rat
import train
from prepare_data import Data
from rat import NEVER, RAT, Cache, Config, Kind, Mixer, scan

ROOT = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Every kind of layer, by the settings that choose it. T runs from 1 to a few chunks, mostly not in whole chunks.
KINDS = {
    "attention": dict(layers="attention"),
    "attention, NoPE": dict(layers="attention", rope_base=0.0),
    "attention, one head": dict(layers="attention", n_head=1),
    "swa": dict(layers="swa", window=5),
    "swa, default window": dict(layers="swa"),
    "swa, window 0": dict(layers="swa", window=0),
    "rnn": dict(layers="rnn"),
    "rnn, one head": dict(layers="rnn", n_head=1),
    "rat L=4": dict(layers="rat", chunk_size=4),
    "rat L=16": dict(layers="rat", chunk_size=16),
    "rat L=1": dict(layers="rat", chunk_size=1),
    "rat L=100": dict(layers="rat", chunk_size=100),
    "rat, one head": dict(layers="rat", chunk_size=4, n_head=1),
    "rat, G=1": dict(layers="rat", chunk_size=4, qk_groups=1),
    "rat, G=H": dict(layers="rat", chunk_size=4, qk_groups=4),
    "rat, NoPE": dict(layers="rat", chunk_size=4, rope_base=0.0),
    "rat+ dense": dict(layers="rat+"),
    "rat+ D=4": dict(layers="rat+", dilation=4),
    "rat+ D=4 W=8 S=2": dict(layers="rat+", dilation=4, window=8, sinks=2),
    "rat+ D=16 W=4 S=1": dict(layers="rat+", dilation=16, window=4, sinks=1),
    "rat+ D=3 W=2 S=7": dict(layers="rat+", dilation=3, window=2, sinks=7),
    "rat+ D=5 S=3": dict(layers="rat+", dilation=5, sinks=3),
    "rat+ D=none": dict(layers="rat+", dilation="none"),
    "rat+ D=none W=8 S=2": dict(layers="rat+", dilation="none", window=8, sinks=2),
    "rat+ without recurrence": dict(layers="rat+", recurrence=False),
    "rat+ without recurrence, D=4 W=3": dict(layers="rat+", recurrence=False, dilation=4, window=3),
}
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
PATTERNS = [Kind(dilation=D, window=W, sinks=S) for D in (1, 2, 3, 5, 16, NEVER) for W in (0, 1, 4, 7) for S in (0, 1, 3, 8)]


@pytest.fixture(autouse=True)
def same_inputs_every_time():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------------------
# The oracle


def oracle_rope(x, position, base):
    """x (T, D): channels c and c + D/2 are one complex number, turned by position * base^(-2c/D)."""
    if base == 0:
        return x
    D = x.shape[-1]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    theta = torch.tensor([base ** (-2 * c / D) for c in range(D // 2)], dtype=torch.float64)
    z = z * torch.polar(torch.ones(len(position), D // 2, dtype=torch.float64), position[:, None] * theta)
    return torch.cat([z.real, z.imag], dim=-1)


def oracle_mixer(x, p, H, layers, context=0, chunk_size=16, dilation=None, window=None, sinks=None, qk_groups=2, recurrence=True, rope_base=10000.0):
    """One layer on x (T, d). p: its parameters by name. Settings as in Config."""
    T, d = x.shape
    D_h = d // H
    qk_heads = {"rat": 1 if H == 1 else qk_groups, "rnn": 0}.get(layers, H)
    has_gate = layers in ("rat", "rnn") or (layers == "rat+" and recurrence)
    sizes = [d if layers in ("rat", "rnn", "rat+") else 0, d, d if has_gate else 0, qk_heads * D_h, qk_heads * D_h]
    z, v, g, q, k = torch.split(x @ p["in_proj.weight"].T, sizes, dim=-1)
    g = torch.sigmoid(g + p["forget_bias"]) if "forget_bias" in p else torch.sigmoid(g)
    restart = chunk_size if layers == "rat" else 10**9
    visible = lambda i, j: j <= i  # attention
    if layers == "swa":
        visible = lambda i, j: 0 <= i - j <= (1024 if window is None else window)
    elif layers == "rat":
        visible = lambda i, j: j == i or (j < i and (j + 1) % chunk_size == 0)
    elif layers == "rat+":
        kept = lambda j: dilation != "none" and (j + 1) % (dilation or 1) == 0
        visible = lambda i, j: j <= i and (j == i or kept(j) or i - j <= (window or 0) or j < (sinks or 0))
    outputs = []
    for h in range(H):
        mine = slice(h * D_h, (h + 1) * D_h)
        group = slice(h % qk_heads * D_h, (h % qk_heads + 1) * D_h) if qk_heads else slice(0, 0)
        keys, values = list(k[:, group]), list(v[:, mine])
        if has_gate:
            for t in range(T):
                gate, new = g[t, mine], t % restart == 0
                values[t] = (0 if new else gate * values[t - 1]) + (1 - gate) * values[t]
                if qk_heads:
                    keys[t] = (0 if new else gate * keys[t - 1]) + (1 - gate) * keys[t]
        keys, values = torch.stack(keys), torch.stack(values)
        if layers == "rnn":
            outputs.append(values)
            continue
        position = torch.arange(T) // (chunk_size if layers == "rat" else 1)
        scores = oracle_rope(q[:, group], position, rope_base) @ oracle_rope(keys, position, rope_base).T / math.sqrt(D_h)
        mask = torch.tensor([[visible(i, j) for j in range(T)] for i in range(T)])
        outputs.append(torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1) @ values)
    y = torch.cat(outputs, dim=-1)
    return (torch.sigmoid(z) * y if sizes[0] else y) @ p["out_proj.weight"].T


def oracle_logits(tokens, p, config):
    """The language model on one sequence, tokens (T,). p: its parameters by name."""
    norm = lambda x, weight: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight
    settings = dataclasses.asdict(config)
    recurrence = settings["recurrence"] is not False
    x = p["embedding.weight"][tokens]
    for n in range(config.n_layer):
        own = {name.removeprefix(f"blocks.{n}."): value for name, value in p.items() if name.startswith(f"blocks.{n}.")}
        names = config.layers.split(",")
        tiled = {name: settings[name] for name in ("dilation", "window", "sinks")}
        for name, value in tiled.items():
            if isinstance(value, str):
                value = value.split(",")[n % len(value.split(","))]
                tiled[name] = value if value == "none" else int(value)
        same = {name: settings[name] for name in ("context", "chunk_size", "qk_groups", "rope_base")}
        mixer = {name.removeprefix("mixer."): value for name, value in own.items()}
        y = norm(x, own["mixer_norm.weight"])
        x = x + oracle_mixer(y, mixer, config.n_head, names[n % len(names)], recurrence=recurrence, **tiled, **same)
        y = norm(x, own["mlp_norm.weight"]) @ own["mlp.0.weight"].T
        x = x + (y * (1 + torch.erf(y / math.sqrt(2))) / 2) @ own["mlp.2.weight"].T
    return norm(x, p["norm.weight"]) @ p["embedding.weight"][: config.vocab_size].T


def randomize(module, seed=0):
    """Parameters large enough that every part of the equation matters; the initial ones make all scores nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 2 else 1.0))
    return module


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


# ----------------------------------------------------------------------------------------------------------------------
# The layer is the equation


@every_kind
@pytest.mark.parametrize("T", [1, 2, 15, 16, 33])
def test_layer_and_its_gradients_equal_the_oracle(settings, T):
    config = Config(**dict(n_layer=1, n_head=4, d_model=32, context=64) | settings)
    mixer = randomize(Mixer(config), seed=T).double()
    x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, T, 32, dtype=torch.float64)
    inputs = [x, *mixer.parameters()]
    y = mixer(x)
    grads = torch.autograd.grad((y * weight).sum(), inputs)
    p = dict(mixer.named_parameters())
    expected = torch.stack([oracle_mixer(row, p, config.n_head, **settings_for_oracle(settings)) for row in x])
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    assert relative_error(y, expected) < 1e-12
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_error(grad, expected_grad) < 1e-11


def settings_for_oracle(settings):
    return {name: value for name, value in settings.items() if name != "n_head"}


@pytest.mark.parametrize("seed", range(24))
def test_random_layers_equal_the_oracle(seed):
    """Random kinds and sizes, long enough for several blocks of queries and for the blocked scan."""
    r = random.Random(seed)
    H, G = r.choice([(1, 1), (2, 2), (4, 2), (6, 3), (6, 2)])
    settings = dict(r.choice(list(KINDS.values())), n_head=H, rope_base=r.choice([0.0, 100.0, 10000.0]))
    if settings["layers"] == "rat":
        settings |= dict(chunk_size=r.choice([1, 2, 7, 16, 64, 90]), qk_groups=G)
    T, B = r.choice([r.randint(1, 40), r.randint(250, 330)]), r.randint(1, 2)
    d = H * r.choice([2, 4, 6])
    mixer = randomize(Mixer(Config(n_layer=1, d_model=d, **settings)), seed).double()
    x = torch.randn(B, T, d, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, T, d, dtype=torch.float64)
    inputs, p = [x, *mixer.parameters()], dict(mixer.named_parameters())
    y = mixer(x)
    expected = torch.stack([oracle_mixer(row, p, H, **settings_for_oracle(settings)) for row in x])
    assert relative_error(y, expected) < 1e-12
    grads, expected_grads = (torch.autograd.grad((out * weight).sum(), inputs) for out in (y, expected))
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_error(grad, expected_grad) < 1e-11


def test_sinks_without_dilation_work_at_widths_that_are_no_multiple_of_4():
    """Where a stride of NEVER tokens once overflowed."""
    mixer = randomize(Mixer(Config(n_layer=1, n_head=1, d_model=6, layers="rat+", dilation="none", sinks=2))).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    expected = oracle_mixer(x[0], dict(mixer.named_parameters()), 1, "rat+", dilation="none", sinks=2)
    assert relative_error(mixer(x)[0], expected) < 1e-12


INTERLEAVED = {
    "rat,swa": dict(layers="rat,swa", chunk_size=4, window=3),
    "attention,swa, NoPE": dict(layers="attention,swa", window=3, rope_base=0.0),
    "rat+ with lists": dict(layers="rat+", dilation="1,4,none", window="0,2", sinks="0,0,3"),
    "rat,rnn,attention": dict(layers="rat,rnn,attention", chunk_size=4),
}


@pytest.mark.parametrize("settings", INTERLEAVED.values(), ids=INTERLEAVED)
def test_model_and_its_gradients_equal_the_oracle(settings):
    config = Config(vocab_size=11, n_layer=4, n_head=2, d_model=12, context=32, **settings)
    model = randomize(RAT(config)).double()
    tokens = torch.randint(11, (3, 22))
    targets = tokens.roll(-1, dims=1)
    targets[:, ::5] = -100
    p = dict(model.named_parameters())
    logits, loss = model(tokens)[0], model(tokens, targets)[1]
    expected = torch.stack([oracle_logits(row, p, config) for row in tokens])
    log_p = expected.log_softmax(-1)
    kept = [(b, t) for b in range(3) for t in range(22) if targets[b, t] != -100]
    expected_loss = -sum(log_p[b, t, targets[b, t]] for b, t in kept) / len(kept)
    assert relative_error(logits, expected) < 1e-11
    assert abs(loss.item() - expected_loss.item()) < 1e-11
    grads = torch.autograd.grad((logits * expected.detach()).sum(), p.values())
    expected_grads = torch.autograd.grad((expected * expected.detach()).sum(), p.values())
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_error(grad, expected_grad) < 1e-10


@every_kind
def test_bf16_autocast_is_near_fp32(settings):
    config = Config(**dict(n_layer=1, n_head=4, d_model=64, context=64) | settings)
    mixer = randomize(Mixer(config))
    x = torch.randn(2, 50, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    (grad16,) = torch.autograd.grad(y.float().square().sum(), x)
    assert relative_error(y.float(), mixer(x)) < 0.03
    assert relative_error(grad16, grad) < 0.1  # 0.03 to 0.05: these weights make sharp softmaxes


# ----------------------------------------------------------------------------------------------------------------------
# scan


def oracle_scan(x, gate, state, start, chunk):
    h, out = torch.zeros_like(gate[:, 0]) if state is None else state, []
    for t in range(gate.shape[1]):
        h = (h * 0 if t > 0 and (start + t) % chunk == 0 else h) * gate[:, t] + (1 - gate[:, t]) * x[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


SCANS = [
    (1, 0, NEVER), (64, 0, NEVER), (65, 0, NEVER), (300, 7, NEVER), (2500, 3, NEVER), (1, 3, 4), (3, 0, 4), (4, 0, 4), (50, 0, 4), (50, 3, 4),
    (50, 8, 4), (5, 2, 7), (200, 0, 100), (300, 30, 100), (10, 5, 1), (257, 255, 256), (3000, 900, 1000),
]  # fmt: skip


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("T, start, chunk", SCANS)
def test_scan_and_its_gradients_equal_the_recurrence(T, start, chunk, with_state, in_blocks, monkeypatch):
    monkeypatch.setattr(rat, "BLOCK", rat.BLOCK if in_blocks else 1 << 30)
    x = torch.randn(2, T, 1, 3, dtype=torch.float64, requires_grad=True)  # broadcast against the gate, as RAT's k is
    gate = torch.rand(2, T, 5, 3, dtype=torch.float64).pow(0.2).requires_grad_()
    state = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True) if with_state else None
    inputs = [x, gate] + [state] * with_state
    h, expected = scan(x, gate, state, start, chunk), oracle_scan(x, gate, state, start, chunk)
    assert h.shape == (2, T, 5, 3)
    assert relative_error(h, expected) < 1e-14
    weight = torch.randn_like(h)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (h, expected))):
        assert relative_error(a, b) < 1e-13


def test_a_long_scan_is_an_associative_scan_over_blocks_and_others_are_loops(monkeypatch):
    calls, scan_blocks = [], rat.associative_scan
    monkeypatch.setattr(rat, "associative_scan", lambda combine, x, **options: calls.append(x[0].shape[1]) or scan_blocks(combine, x, **options))
    for B, T, d, blocks in [(1, 1000, 64, [16]), (1, 64, 64, []), (64, 65, 64, [2])]:
        calls.clear()
        scan(torch.randn(B, T, d), torch.rand(B, T, d))
        assert calls == blocks
        scan(torch.randn(B, T, d), torch.rand(B, T, d, requires_grad=True)).sum().backward()
        assert calls == 3 * blocks


def test_scan_survives_gates_at_zero_and_one():
    x, gate = torch.randn(1, 200, 4, requires_grad=True), torch.rand(1, 200, 4).round().requires_grad_()
    h = scan(x, gate)
    assert relative_error(h, oracle_scan(x, gate, None, 0, NEVER)) < 1e-6
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(h.sum(), [x, gate]))


@pytest.mark.parametrize("T, chunk, with_state", [(130, 16, False), (50, NEVER, True), (2000, NEVER, True), (1000, 300, False)])
def test_compiled_scan_and_its_gradients_equal_the_recurrence(T, chunk, with_state):
    x, gate = torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True), torch.rand(2, T, 8, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 8, dtype=torch.float64, requires_grad=True) if with_state else None
    inputs = [x, gate] + [state] * with_state
    torch.compiler.reset()
    h = torch.compile(lambda *inputs: scan(*inputs, chunk=chunk), fullgraph=True, backend="aot_eager")(*inputs)
    expected = oracle_scan(x, gate, state, 0, chunk)
    assert relative_error(h, expected) < 1e-14
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (h, expected))):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("name", ["attention", "swa", "rnn", "rat L=4", "rat+ dense", "rat+ D=16 W=4 S=1"])
def test_layers_compile_without_a_graph_break_to_the_same_results(name):
    torch.compiler.reset()
    config = Config(**dict(n_layer=1, n_head=4, d_model=32, context=64) | KINDS[name])
    mixer = randomize(Mixer(config))
    x = torch.randn(1, 70, 32, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for a, b in zip(*([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], allow_unused=True)] for y in (compiled(x), mixer(x)))):
        assert relative_error(a, b) < 1e-4


def test_compiled_by_inductor_scan_equals_eager_scan():
    x, gate = torch.randn(2, 40, 8, requires_grad=True), torch.rand(2, 40, 8, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, gate: scan(x, gate, chunk=16), fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x, gate).square().sum(), [x, gate]) for f in (compiled, lambda *a: scan(*a, chunk=16)))):
        assert relative_error(a, b) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# attend


def test_the_positions_that_stay_are_those_that_later_queries_see():
    T = 40
    i, j = torch.arange(T)[:, None], torch.arange(T)
    for kind in PATTERNS:
        expected = (j <= i) & ((i - j <= kind.window) | (j < kind.sinks) | (kind.dilation != NEVER) & ((j + 1) % kind.dilation == 0))
        assert torch.equal(kind.visible(i, j), expected)
        stays = [t for t in range(T) if kind.visible(10**6 + t, t)]
        assert kind.staying(T).tolist() == stays and [t for t in range(T) if kind.stays(t)] == stays
        assert [kind.count(n) for n in range(T)] == [sum(t < n for t in stays) for n in range(T)]


def masked_matrix(q, k, v, kind, base=100.0):
    """The layer's attention as one matrix: q (B, G, T, D), k and v (B, H, T, D), before RoPE."""
    T, D = k.shape[2:]
    i = torch.arange(T, device=q.device)
    q, k = (oracle_rope(x.transpose(0, 2).flatten(1, 2).transpose(0, 1).double(), i, base).view(x.shape[1], x.shape[0], T, D).transpose(0, 1)
            for x in (q, k))  # fmt: skip
    scores = q.repeat(1, k.shape[1] // q.shape[1], 1, 1) @ k.mT / math.sqrt(D)
    return scores.masked_fill(~kind.visible(i[:, None], i), -math.inf).softmax(-1) @ v.double()


CASES = [
    (Kind(dilation=16), 600), (Kind(dilation=3, window=5, sinks=2), 300), (Kind(dilation=1, window=3), 20), (Kind(dilation=300), 700),
    (Kind(dilation=NEVER, window=20, sinks=4), 300), (Kind(dilation=NEVER, window=5), 300), (Kind(dilation=4, window=300, sinks=1), 700),
    (Kind(dilation=4, sinks=1), 9), (Kind(dilation=NEVER, sinks=3), 600), (Kind(dilation=2, sinks=5), 513),
    (Kind(dilation=NEVER, window=257), 900), (Kind(dilation=NEVER, window=1), 300), (Kind(dilation=7, window=129), 1000),  # windows that end at a block's edge
]  # fmt: skip


@pytest.mark.parametrize("kind, T", CASES, ids=str)
def test_attention_in_blocks_equals_the_masked_matrix(kind, T):
    q, k, v = (torch.randn(2, heads, T, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 4, 4))
    rope = rat.rotary_table(torch.arange(T), 4, 100.0)
    y, expected = rat.attend(q, k, v, rope, kind), masked_matrix(q, k, v, kind)
    assert relative_error(y, expected) < 1e-13
    weight = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), [q, k, v]) for out in (y, expected))):
        assert relative_error(a, b) < 1e-12


class OnCuda(torch.Tensor):
    """A tensor that is on the CPU and says it is not."""

    is_cuda = property(lambda self: True)


def flex_attention_on_a_pretended_gpu(monkeypatch):
    """The CUDA path's keys and mask on the CPU, where flex_attention has a forward pass. Returns the list of calls to come."""
    calls, flex_attention = [], rat.flex_attention

    def on_the_cpu(*qkv, block_mask):
        calls.append(qkv[0].shape[2])
        return flex_attention(*(x.as_subclass(torch.Tensor) for x in qkv), block_mask=block_mask)

    monkeypatch.setattr(rat, "flex_attention", on_the_cpu)
    monkeypatch.setattr(rat, "torch", types.SimpleNamespace(**vars(torch) | {"compile": lambda function: function}))
    return calls


@pytest.mark.parametrize("kind, T", CASES, ids=str)
def test_flex_attention_with_its_block_mask_equals_the_masked_matrix(kind, T, monkeypatch):
    q, k, v = (torch.randn(1, heads, T, 16) for heads in (1, 2, 2))
    rope = rat.rotary_table(torch.arange(T), 16, 100.0).float()
    expected, calls = masked_matrix(q, k, v, kind), flex_attention_on_a_pretended_gpu(monkeypatch)
    monkeypatch.setattr(rat, "FUSED", 0)
    y = rat.attend(*(x.as_subclass(OnCuda) for x in (q, k, v)), rope, kind)
    assert calls == [T] * (kind.dilation > 1 and T > kind.window + 1)
    assert relative_error(y.as_subclass(torch.Tensor).double(), expected) < 1e-5


@pytest.mark.parametrize("kind, T", [*CASES, (Kind(dilation=1), 512), (Kind(dilation=4, window=700), 1500)], ids=str)
def test_block_masks_skip_what_nobody_sees_and_nothing_else(kind, T):
    mask, staying = rat.block_mask(kind, T, torch.device("cpu")), kind.staying(T)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = torch.cat([staying < i - kind.window, (j <= i) & (j >= i - kind.window)], dim=1)  # the keys that stay, then all
    assert torch.equal(mask.mask_mod(0, 0, i, torch.arange(len(staying) + T)), seen)
    assert torch.equal(seen.sum(1), kind.visible(i, j).sum(1))  # no key twice
    grid = torch.zeros(-(-T // 128), -(-seen.shape[1] // 128), dtype=torch.bool)
    for row, (n, columns) in enumerate(zip(mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0].tolist())):
        grid[row, columns[:n]] = True
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            assert grid[row, column] == seen[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128].any()


def test_flex_attention_is_for_long_sequences_on_cuda_alone(monkeypatch):
    calls = flex_attention_on_a_pretended_gpu(monkeypatch)
    for kind, T, D, fused in [
        (Kind(dilation=16), 2048, 16, True), (Kind(dilation=16), 2047, 16, False), (Kind(dilation=16), 2048, 8, False),
        (Kind(), 2048, 16, False), (Kind(dilation=NEVER, window=100), 2048, 16, True), (Kind(dilation=NEVER, window=2047), 2048, 16, False),
    ]:  # fmt: skip
        rope = rat.rotary_table(torch.arange(T), D, 100.0).float()
        for on, expected in ((OnCuda, [T] * fused), (torch.Tensor, [])):
            rat.attend(*(torch.randn(1, 1, T, D).as_subclass(on) for _ in range(3)), rope, kind)
            assert calls == expected
            calls.clear()


def test_rope_keeps_scores_a_function_of_distance():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turn = lambda x, position: rat.rotate(x, rat.rotary_table(torch.tensor([position]), 8, 10000.0))
    score = lambda i, j: (turn(q, i) * turn(k, j)).sum().item()
    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-6) and score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)


def test_the_rotary_table_is_made_once_for_all_layers_of_a_kind(monkeypatch):
    model, made, table = RAT(Config(n_layer=6, n_head=2, d_model=16, layers="rat,swa,rat", chunk_size=4)), [], rat.rotary_table
    monkeypatch.setattr(rat, "rotary_table", lambda *args: made.append(args[0].tolist()) or table(*args))
    model(torch.zeros(1, 9, dtype=torch.long))
    assert made == [[0, 0, 0, 0, 1, 1, 1, 1, 2], list(range(9))]


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 45, [20] + [1] * 25, [5, 3, 1, 17, 1, 19], [45], [1, 44]], ids=str)
def test_decoding_in_any_pieces_equals_the_forward_pass(settings, pieces):
    config = Config(**dict(vocab_size=50, n_layer=2, n_head=4, d_model=32, context=64) | settings)
    model = randomize(RAT(config))
    tokens = torch.randint(50, (3, sum(pieces)))
    with torch.no_grad():
        expected, cache = model(tokens)[0], model.cache(3, tokens.shape[1])
        logits = torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(pieces, dim=1)], dim=1)
    assert relative_error(logits, expected) < 1e-4
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_long_continuation_of_a_cached_prompt_equals_the_forward_pass():
    for settings in INTERLEAVED.values():
        model = randomize(RAT(Config(vocab_size=50, n_layer=4, n_head=2, d_model=32, context=64, **settings)))
        tokens = torch.randint(50, (2, 120))
        with torch.no_grad():
            cache = model.cache(2, 120)
            logits = torch.cat([model(piece, cache=cache)[0] for piece in tokens.split([21, 50, 1, 48], dim=1)], dim=1)
            assert relative_error(logits, model(tokens)[0]) < 1e-4


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_cache_holds_exactly_what_later_tokens_can_see(one_by_one):
    """Values carry their own position, so the slots can be read back."""
    T = 40
    for kind in PATTERNS:
        dilation = "none" if kind.dilation == NEVER else kind.dilation
        mixer = Mixer(Config(n_layer=1, n_head=1, d_model=2, layers="rat+", dilation=dilation, window=kind.window, sinks=kind.sinks, rope_base=0))
        cache = Cache(mixer, 1, T)
        for piece in torch.arange(T).split([1] * T if one_by_one else [7, 9, 1, 8, 1, 14]):
            kv = piece.float().view(1, 1, -1, 1).expand(1, 1, -1, 2)
            with torch.no_grad():
                cache.attend(kv, kv, kv, mixer.rope_table(len(piece), cache.length))
            cache.length = t = cache.length + len(piece)
            held = cache.values[0, 0, : cache.used(t), 0].long()
            assert torch.equal(held, cache.keys[0, 0, : len(held), 1].long())
            # The last token's own window is still there; of it, the oldest token leaves with the next token.
            expected = [j for j in range(t) if kind.visible(t - 1, j)]
            assert sorted(held.tolist()) == expected
            assert len(held) <= kind.window + 1 + kind.sinks + t // kind.dilation
        assert cache.keys.shape[2] == cache.used(T)


def test_a_full_cache_says_so():
    mixer = Mixer(Config(n_layer=1, chunk_size=4))
    cache = Cache(mixer, 1, 4)
    with torch.no_grad():
        mixer(torch.zeros(1, 4, 128), cache)
        with pytest.raises(ValueError, match="no room in the cache for token 5"):
            mixer(torch.zeros(1, 1, 128), cache)


@every_kind
def test_a_cache_and_gradients_exclude_each_other_in_one_clear_line(settings):
    model = RAT(Config(**dict(vocab_size=50, n_layer=1, n_head=4, d_model=32) | settings))
    cache, tokens = model.cache(1, 10), torch.zeros(1, 3, dtype=torch.long)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a cache has no gradients: call the model under torch.no_grad\(\)"):
            model(tokens, cache=cache)
        with torch.no_grad():
            model(tokens, cache=cache)


def test_cache_memory_is_constant_for_rnn_and_swa_and_a_chunk_end_each_for_rat():
    numel = lambda tokens, **settings: Cache(Mixer(Config(n_layer=1, **settings)), 2, tokens).nbytes() // 4
    d, B = 128, 2
    assert numel(100, layers="rnn") == numel(10**6, layers="rnn") == B * d
    assert numel(100, layers="swa", window=9) == numel(10**6, layers="swa", window=9) == B * 2 * d * 10
    assert numel(4096, layers="attention") == B * 2 * d * 4096
    assert numel(4097, layers="rat", chunk_size=16) == B * 2 * d * (1 + 4096 // 16) + B * 2 * d  # slots, and the state
    assert numel(4101, layers="rat+", dilation=64, window=100, sinks=4) == B * 2 * d * (101 + 4 + 4000 // 64 + 1)


class Traffic(TorchDispatchMode):
    """Counts the numbers that operations take in, and notes the largest new tensor that one makes."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if not op.is_view:
            self.taken += sum(x.numel() for x in args if isinstance(x, torch.Tensor))
            old = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}  # in place, there is no new tensor
            new = [x.numel() for x in (out,) if isinstance(x, torch.Tensor) and x.data_ptr() not in old]
            self.largest = max([self.largest, *new])
        return out


@pytest.mark.parametrize("settings", [dict(layers="rnn"), dict(layers="swa", window=9), dict(layers="attention"), dict(layers="rat")], ids=str)
def test_a_decoding_step_copies_no_cache_and_its_work_grows_only_where_it_should(settings):
    mixer, taken = Mixer(Config(n_layer=1, d_model=32, **settings)), []
    cache, x = Cache(mixer, 1, 400), torch.randn(1, 1, 32)
    address = cache.keys.data_ptr()
    with torch.no_grad():
        for t in range(400):
            with Traffic() as traffic:
                traffic.taken = traffic.largest = 0
                mixer(x, cache)
            taken.append(traffic.taken)
            assert traffic.largest <= 5 * 32  # no more than the projections of the one token
    assert cache.keys.data_ptr() == address
    assert (taken[399] > taken[79]) == (settings["layers"] in ("attention", "rat"))


@pytest.mark.parametrize("settings", [dict(layers="rat"), dict(layers="attention"), dict(layers="rat+", dilation=16, window=32, sinks=4)], ids=str)
def test_compiled_decoding_compiles_nothing_as_the_position_grows(settings):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, model = CompileCounter(), RAT(Config(n_layer=2, n_head=4, d_model=32, **settings)).eval()
    for block in model.blocks:
        block.compile(backend=counter)
    tokens, counts = [], []
    for token in model.generate(torch.zeros(1, 5, dtype=torch.long), 200, temperature=0):
        tokens.append(token.item())
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1] == counts[199]  # once for the prompt, once for single tokens
    torch.compiler.reset()
    for block in model.blocks:
        block._compiled_call_impl = None
    assert tokens == [token.item() for token in model.generate(torch.zeros(1, 5, dtype=torch.long), 200, temperature=0)]


# ----------------------------------------------------------------------------------------------------------------------
# The language model: generation, checkpoints, settings


@pytest.fixture(scope="module")
def model():
    return randomize(RAT(Config(vocab_size=30, n_layer=2, n_head=2, d_model=16, context=32, layers="rat,swa", chunk_size=4, window=3), "bytes"))


def text(model, prompt, n=12, **options):
    return torch.stack(list(model.generate(prompt, n, **options)), dim=1)


def test_greedy_generation_takes_the_likeliest_token_of_the_forward_pass(model):
    prompt = torch.randint(30, (3, 7))
    tokens = torch.cat([prompt, text(model, prompt, temperature=0)], dim=1)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0].argmax(-1)[:, 6:-1], tokens[:, 7:])
    assert torch.equal(text(model, prompt, top_k=1), tokens[:, 7:])
    assert torch.equal(text(model, prompt, top_p=1e-9), tokens[:, 7:])


def test_the_loss_in_chunks_is_the_loss(model, monkeypatch):
    tokens, targets = torch.randint(30, (2, 4, 33))
    targets[0, 5:20] = -100
    whole = model(tokens, targets)[1]
    grads = torch.autograd.grad(whole, list(model.parameters()))
    monkeypatch.setattr(RAT, "LOSS_CHUNK", 16)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            out = op(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (30,):
                largest = max(largest, out.numel() // 30)
            return out

    with Largest():
        chunked = model(tokens, targets)[1]
        chunked_grads = torch.autograd.grad(chunked, list(model.parameters()))
    assert largest == 16  # never the logits of more tokens than a chunk's
    assert torch.allclose(whole, chunked)
    for a, b in zip(chunked_grads, grads):
        assert relative_error(a, b) < 1e-5
    assert model(tokens, torch.full_like(targets, -100))[1] == 0  # nothing to predict


def test_recomputing_blocks_changes_memory_and_no_gradient(model):
    tokens, targets = torch.randint(30, (2, 2, 33))
    model, kept, grads = copy.deepcopy(model), [], []
    for recompute in (False, True):
        sizes = []
        for block in model.blocks if recompute else ():
            train.recompute(block)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            loss = model(tokens, targets)[1]
        kept.append(sum(sizes))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_padding_of_the_vocabulary_is_invisible(model):
    assert model.embedding.weight.shape[0] == 64 and model(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 30)
    with torch.no_grad():
        before = model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))[1]
        model.embedding.weight[30:] = 100.0
        assert torch.equal(model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))[1], before)
        assert text(model, torch.zeros(4, 3, dtype=torch.long), 50).max() < 30


@pytest.mark.parametrize("settings", [
    dict(layers="attention"), dict(layers="rnn"), dict(layers="rat", chunk_size=8), dict(layers="rat", chunk_size=7), dict(layers="swa", window=9),
    dict(layers="rat+"), dict(layers="rat+", dilation=8), dict(layers="rat+", dilation=8, window=5, sinks=2),
    dict(layers="rat+", recurrence=False), dict(layers="rat,swa", chunk_size=4, window=9),
], ids=str)  # fmt: skip
def test_counted_operations_are_those_that_are_needed(settings, monkeypatch):
    """The weights' products as a counter sees them run, and two products of width d for each key that a query sees, its own
    apart where it sees no other in a window."""
    from torch.utils.flop_counter import FlopCounterMode

    config = Config(vocab_size=64, n_layer=2, n_head=2, d_model=16, context=48, **settings)
    monkeypatch.setattr(rat, "attend", lambda q, k, v, *_: v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        RAT(config)(torch.zeros(1, 48, dtype=torch.long))
    seen, i = 0, torch.arange(48)
    for kind in map(config.kind, range(2)):
        visible = kind.visible(i[:, None], i)
        seen += (visible if kind.window or kind.dilation == 1 else visible & (i[:, None] != i)).sum().item()
    assert train.flops_per_token(config) == pytest.approx(3 * (counter.get_total_flops() + 4 * 16 * seen) / 48, rel=1e-9)


def test_a_token_outside_the_vocabulary_is_one_clear_line(model):
    with pytest.raises(ValueError, match="token 30 is not in the vocabulary, 0 to 29"):
        model(torch.full((1, 3), 30))


def test_generation_streams_and_repeats_with_its_seed(model):
    prompt = torch.randint(30, (2, 5))
    stream = model.generate(prompt, 12, seed=3)
    assert next(stream).shape == (2,)
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
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : end + 1], free[row, : end + 1]) and (stopped[row, end:] == stop).all()


def test_sampling_draws_from_the_distribution_that_was_asked_for():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -math.inf])
    many = logits.expand(100_000, -1)
    draw = lambda *options: rat.sample(many, *options, torch.Generator().manual_seed(0)).bincount(minlength=5) / 100_000
    assert torch.allclose(draw(1.0, None, None), logits.softmax(0), atol=0.01)
    assert torch.allclose(draw(0.5, None, None), (logits / 0.5).softmax(0), atol=0.01)
    two = torch.tensor([2.0, 1.0, -math.inf, -math.inf, -math.inf]).softmax(0)
    assert torch.allclose(draw(1.0, 2, None), two, atol=0.01)
    p = logits.softmax(0)
    assert torch.allclose(draw(1.0, None, (p[0] + p[1] / 2).item()), two, atol=0.01)
    assert torch.allclose(draw(1.0, 99, 1.0), p, atol=0.01)


def test_a_saved_model_loads_as_it_was(model, tmp_path):
    model.save(tmp_path / "ckpt.pt", step=7)
    loaded, tokens = RAT.load(tmp_path / "ckpt.pt"), torch.randint(30, (2, 20))
    assert loaded.config == model.config and loaded.tokenizer == "bytes"
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


PATTERN_CHANGES = [dict(dilation=4), dict(dilation="1,4,none", window="3,0", sinks=2), dict(window=5), dict(dilation="none"), dict(context=100)]


@pytest.mark.parametrize("changes", PATTERN_CHANGES, ids=str)
def test_a_trained_models_pattern_is_set_when_it_is_loaded(changes, tmp_path):
    model = randomize(RAT(Config(vocab_size=11, n_layer=4, n_head=2, d_model=12, context=32, layers="rat+")))
    model.save(tmp_path / "ckpt.pt")
    loaded, tokens = RAT.load(tmp_path / "ckpt.pt", **changes).double(), torch.randint(11, (2, 40))
    p = dict(model.double().named_parameters())
    for other in (loaded, model):  # the same by RAT.use, in place
        expected = torch.stack([oracle_logits(row, p, dataclasses.replace(model.config, **changes)) for row in tokens])
        assert relative_error(other(tokens)[0], expected) < 1e-11
        with torch.no_grad():
            cache = other.cache(2, 40)
            pieces = torch.cat([other(piece, cache=cache)[0] for piece in tokens.split([17, 1, 1, 21], dim=1)], dim=1)
        assert relative_error(pieces, expected) < 1e-11
        model.use(**changes)
    with pytest.raises(ValueError, match="d_model is 24: this model has 12, its weights depend on it"):
        RAT.load(tmp_path / "ckpt.pt", d_model=24)
    with pytest.raises(ValueError, match="dilation is x"):
        RAT.load(tmp_path / "ckpt.pt", dilation="x")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_bad_checkpoints_are_one_clear_line(model, tmp_path):
    path = tmp_path / "ckpt.pt"

    def refused(message):
        with pytest.raises(ValueError, match=message):
            RAT.load(path)

    refused("there is no checkpoint")
    path.write_bytes(b"not a checkpoint")
    refused("not a checkpoint of train.py, or damaged")
    torch.save(Malicious(), path)
    refused("not a checkpoint of train.py, or damaged")
    model.save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    refused("not a checkpoint of train.py, or damaged")
    torch.save({"model": {}}, path)
    refused("damaged: 'config'")
    good = {"config": dataclasses.asdict(model.config), "tokenizer": "bytes", "model": model.state_dict()}
    torch.save(good | {"config": good["config"] | {"colour": 1}}, path)
    refused("unexpected keyword argument 'colour'")
    torch.save(good | {"config": good["config"] | {"d_model": 32}}, path)
    refused("size mismatch for embedding.weight")


def test_a_failed_save_leaves_the_old_checkpoint(model, tmp_path):
    path = tmp_path / "ckpt.pt"
    model.save(path)
    before = path.read_bytes()
    script = f"""
import resource, signal, torch, rat
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # files may not grow beyond 10 kB: a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    rat.RAT.load({str(path)!r}).save({str(path)!r}, more=torch.zeros(100_000))
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "cannot write" in result.stdout and "what was there before is untouched" in result.stdout, result
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("settings, message", [
    (dict(d_model=130), "d_model 130 must be a multiple of 2 \\* n_head, 8"),
    (dict(d_model=12), "d_model 12 must be a multiple of 2 \\* n_head, 8"),
    (dict(n_layer=0), "n_layer is 0: it must be a whole number above 0"),
    (dict(chunk_size=2.5), "chunk_size is 2.5"),
    (dict(layers=["rat"]), "there is no layer \"\\['rat'\\]\""),
    (dict(layers="rat,atention"), "there is no layer 'atention': layers is a list of attention, swa, rnn, rat, rat+"),
    (dict(layers="rat+", dilation="1,x"), "dilation is x: it must be a whole number from 1 on, or none"),
    (dict(layers="swa", window=-1), "window is -1: it must be a whole number from 0 on"),
    (dict(layers="rat+", dilation=0), "dilation is 0"),
    (dict(dilation=4), "dilation is for rat\\+, but layers is 'rat': leave it out"),
    (dict(layers="attention", window=4), "window is for rat\\+, swa, but layers is 'attention'"),
    (dict(qk_groups=3), "n_head 4 is not divisible by qk_groups 3"),
    (dict(rope_base=-1.0), "rope_base is -1.0"),
], ids=lambda x: str(x) if isinstance(x, dict) else "")  # fmt: skip
def test_impossible_configs_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize("prompt, options, message", [
    (torch.zeros(1, 0, dtype=torch.long), {}, "the prompt is empty"),
    (torch.full((1, 3), 30), {}, "token 30 is not in the vocabulary, 0 to 29"),
    (torch.zeros(1, 3, dtype=torch.long), dict(temperature=-1), "temperature is -1"),
    (torch.zeros(1, 3, dtype=torch.long), dict(top_k=0), "top_k is 0"),
    (torch.zeros(1, 3, dtype=torch.long), dict(top_p=1.5), "top_p is 1.5"),
    (torch.zeros(1, 3, dtype=torch.long), dict(n=0), "max_new_tokens is 0"),
    (torch.zeros(1, 3, dtype=torch.long), dict(n=10**20), "max_new_tokens is 10*: it must be from 1 to"),
], ids=lambda x: str(x) if isinstance(x, dict) else "")  # fmt: skip
def test_impossible_generation_is_one_clear_line(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        text(model, prompt, **options)


@pytest.mark.parametrize("n", [10**15, 10**18])
def test_a_cache_without_memory_for_it_is_one_clear_line(model, n, capsys):
    with pytest.raises(SystemExit):
        prepare_data.run(lambda: text(model, torch.zeros(1, 3, dtype=torch.long), n))
    error = capsys.readouterr().err
    assert "out of memory: smaller sizes, batches, prompts or samples need less" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The papers' own checkpoints, written here from the oracle's parameters

OFFICIAL = {
    "attention": (dict(layers="attention"), "vqk"),
    "rnn": (dict(layers="rnn"), "zvg"),
    "rat": (dict(layers="rat"), "zvgqk"),
    "rat L=4, four groups": (dict(layers="rat", chunk_size=4, qk_groups=4), "zvgqk"),
    "rat L=1": (dict(layers="rat", chunk_size=1), "zvgqk"),
    "rat,swa": (dict(layers="rat,swa", window=7), "zvgqk,vqk"),
    "attention,swa": (dict(layers="attention,swa", window=7), "vqk,vqk"),
    "rat+": (dict(layers="rat+"), "zqkvg"),
    "rat+ D=4 W=3 S=2": (dict(layers="rat+", dilation=4, window=3, sinks=2), "zqkvg"),
    "rat+ without recurrence": (dict(layers="rat+", recurrence=False), "zqkv"),
}


def official(settings, rows, vocab_size=30, d=16, H=4, n_layer=2, seed=0):
    """Random parameters, as the oracle takes them and as the papers' code names and orders them."""
    draw = torch.Generator().manual_seed(seed)
    tensor = lambda *shape: torch.randn(*shape, generator=draw) * (0.3 if len(shape) == 2 else 1)
    embedding, norm = tensor(vocab_size, d), tensor(d)
    ours = {"embedding.weight": embedding.double(), "norm.weight": norm.double()}
    theirs = {"embedding.wte.weight": embedding, "backbone.ln.weight": norm, "head.lm_head.weight": embedding}
    for n in range(n_layer):
        order, name = (text.split(",")[n % len(text.split(","))] for text in (rows, settings["layers"]))
        heads = settings.get("qk_groups", 2) if name == "rat" else H
        part = {letter: tensor(heads * d // H if letter in "qk" else d, d) for letter in order}
        here, there = f"blocks.{n}.", f"backbone.layers.{n}."
        ours[here + "mixer.in_proj.weight"] = torch.cat([part[letter] for letter in "zvgqk" if letter in order]).double()
        theirs[there + "seq_layer.in_proj.weight"] = torch.cat([part[letter] for letter in order])
        same = {"mixer.out_proj.weight": ("seq_layer.out_proj.weight", d, d), "mixer_norm.weight": ("seq_layer.input_norm.weight", d),
                "mlp.0.weight": ("hidden_layer.fc1.weight", 4 * d, d), "mlp.2.weight": ("hidden_layer.fc2.weight", d, 4 * d),
                "mlp_norm.weight": ("hidden_layer.ln.weight", d)}  # fmt: skip
        if name in ("rat", "rnn"):
            same["mixer.forget_bias"] = ("seq_layer.gate_bias", d)
        for ours_name, (theirs_name, *shape) in same.items():
            theirs[there + theirs_name] = tensor(*shape)
            ours[here + ours_name] = theirs[there + theirs_name].double()
    return ours, theirs


@pytest.mark.parametrize("settings, rows", OFFICIAL.values(), ids=OFFICIAL)
def test_official_checkpoints_of_every_kind_give_the_oracles_logits(settings, rows, tmp_path):
    ours, theirs = official(settings, rows)
    torch.save({"task": {f"_orig_mod.{name}": tensor for name, tensor in theirs.items()}, "step": 7}, tmp_path / "theirs.pt")
    tokens = torch.randint(30, (2, 21))
    for source in (theirs, tmp_path / "theirs.pt"):
        model = prepare_data.load_official(source, n_head=4, **settings)
        assert model.config.n_layer == 2 and model.config.d_model == 16 and model.config.context == 4096 and model.tokenizer == ""
        expected = torch.stack([oracle_logits(row, ours, model.config) for row in tokens])
        assert relative_error(model.double()(tokens)[0], expected) < 1e-11
    assert len(theirs) == len(ours) + 1  # the dict that was given is as it was


def test_an_official_checkpoint_takes_the_papers_settings_where_none_are_given():
    config = prepare_data.load_official(official(dict(layers="rat,swa"), "zvgqk,vqk", d=512)[1], layers="rat,swa").config
    assert (config.n_head, config.chunk_size, config.qk_groups, config.context, config.kind(1).window) == (4, 16, 2, 4096, 1024)


def test_a_mismatched_official_checkpoint_is_one_clear_line_that_names_the_tensor(tmp_path):
    theirs = official(*OFFICIAL["rat"])[1]

    def refused(message, source=theirs, **settings):
        with pytest.raises(ValueError, match=message) as error:
            prepare_data.load_official(source, **dict(n_head=4, layers="rat") | settings)
        assert "\n" not in str(error.value)

    refused(r"the tensor backbone.layers.0.seq_layer.in_proj.weight has the shape \(64, 16\), in a model of layers 'rat', n_head 4, qk_groups 4 it has \(80, 16\)",
            qk_groups=4)  # fmt: skip
    refused(r"the tensor backbone.layers.1.seq_layer.in_proj.weight has the shape \(64, 16\)", layers="rat,swa")
    refused("lacks the tensor backbone.layers.1.hidden_layer.fc1.weight", {k: v for k, v in theirs.items() if "1.hidden_layer.fc1" not in k})
    refused("has the tensor backbone.layers.0.seq_layer.extra, which a model of layers 'rat'", theirs | {"backbone.layers.0.seq_layer.extra": torch.ones(1)})
    refused("head.lm_head.weight is not embedding.wte.weight", theirs | {"head.lm_head.weight": theirs["head.lm_head.weight"] + 1})
    refused("n_layer is 3: the checkpoint has 2", n_layer=3)
    refused("lacks the tensor embedding.wte.weight", {})
    refused("neither a dict of tensors", {"task": 3})
    refused("there is no checkpoint nowhere.pt", "nowhere.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    refused("cannot read .*noise.pt: it is damaged", tmp_path / "noise.pt")


def test_an_official_checkpoint_runs_no_code_and_may_hold_an_easydict(tmp_path, monkeypatch):
    theirs, path = official(*OFFICIAL["rat"])[1], tmp_path / "theirs.pt"
    module = types.ModuleType("easydict")
    exec("class EasyDict(dict):\n    def __setattr__(self, name, value):\n        super().__setattr__(name, value); self[name] = value", vars(module))
    module.EasyDict.__module__ = "easydict"
    config = module.EasyDict(model=module.EasyDict(depth=2))
    config.lr = 1e-3
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module)
        torch.save({"task": theirs, "config": config}, path)
    assert prepare_data.load_official(path, layers="rat", n_head=4).config.d_model == 16
    torch.save({"task": theirs, "config": Malicious()}, path)
    with pytest.raises(ValueError, match="which is code; where you trust it, keep its tensors alone"):
        prepare_data.load_official(path, layers="rat", n_head=4)


def test_forget_biases_start_with_memories_of_up_to_a_chunk():
    """log U(1, L-1); chunk size 1 and 2 leave no range."""
    bias = Mixer(Config(d_model=4096, layers="rat", chunk_size=16)).forget_bias
    assert 0 <= bias.min() < math.log(1.1) and math.log(14.8) < bias.max() <= math.log(15)
    assert bias.exp().mean().item() == pytest.approx(8, rel=0.05)
    assert math.log(250) < Mixer(Config(d_model=4096, layers="rnn", context=256)).forget_bias.max() <= math.log(255)
    assert (Mixer(Config(chunk_size=1)).forget_bias == 0).all()
    assert not hasattr(Mixer(Config(layers="rat+")), "forget_bias")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def shards_of(folder, split):
    return [prepare_data.read_shard(path) for path in sorted(Path(folder).glob(f"*_{split}_*.bin"))]


def test_shards_are_the_documents_each_after_an_end_of_text(tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(50)] + ["ünïcödé <|endoftext|> 漢字"]
    prepare_data.prepare(texts, tmp_path / "data", "mine", "bytes", val_every=10, shard_tokens=300, workers=3)
    splits = {split: np.concatenate(shards_of(tmp_path / "data", split)) for split in ("train", "val")}
    expected = {"train": [], "val": []}
    for i, words in enumerate(texts):
        expected["val" if i % 10 == 1 else "train"] += [256, *words.encode()]
    for split in splits:
        assert splits[split].tolist() == expected[split]
        assert all(len(shard) == 300 for shard in shards_of(tmp_path / "data", split)[:-1])
    assert len(shards_of(tmp_path / "data", "train")) > 5
    raw = (tmp_path / "data" / "mine_train_000000.bin").read_bytes()
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (300).to_bytes(4, "little")
    assert len(raw) == 1024 + 2 * 300


def test_a_single_document_gives_its_end_to_validation(tmp_path):
    prepare_data.prepare(["x" * 100], tmp_path / "data", "mine", "bytes")
    assert [len(shards_of(tmp_path / "data", split)[0]) for split in ("train", "val")] == [91, 11]


def test_prepare_reads_text_of_every_form_and_counts_what_it_skips(tmp_path):
    files = tmp_path / "files"
    (files / "deep").mkdir(parents=True)
    (files / "a.txt").write_text("plain")
    (files / "b.md").write_bytes(b"\xef\xbb\xbfwith a mark")
    (files / "deep" / "c.py").write_text("code = 1")
    (files / "d.jsonl").write_text('{"text": "line one"}\n{"text": "half \\ud800"}\nnot json\n{"text": 5}\n{"other": 1}\n[]\n{"text": "line two", "id": 2}\n')
    (files / "e.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (files / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped line"}\n'))
    (files / "g.txt").write_bytes(b"caf\xe9")
    (files / "h.txt").write_bytes(b"a\0b")
    (files / "i.txt").write_text("  \n")
    (files / "j.txt.gz").write_bytes(gzip.compress(b"broken off" * 99)[:-9])
    (files / "k.png").write_bytes(b"PNG")
    skipped = Counter()
    texts = list(prepare_data.documents(prepare_data.text_files([files], skipped), skipped))
    assert sorted(texts) == sorted(["plain", "with a mark", "code = 1", "line one", "line two", "zipped", "zipped line"])
    assert skipped == {
        "texts that are not UTF-8": 2, "binary files": 1, "empty texts": 1, "files that cannot be read": 1,
        "lines that are no JSON object with a text": 4, "files with other endings": 1,
    }  # fmt: skip


def test_prepare_leaves_nothing_half_made(tmp_path):
    def texts():
        yield from ["one", "two", "three"]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        prepare_data.prepare(texts(), tmp_path / "data", "mine", "bytes")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.partial").mkdir()  # what a killed run leaves
    (tmp_path / "data.partial" / "old_train_000009.bin").write_bytes(b"old")
    prepare_data.prepare(["one", "two"], tmp_path / "data", "mine", "bytes")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["meta.json", "mine_train_000000.bin", "mine_val_000000.bin"]
    with pytest.raises(ValueError, match="is there already: remove it first"):
        prepare_data.prepare(["three", "four"], tmp_path / "data", "mine", "bytes")
    assert [len(shards_of(tmp_path / "data", split)[0]) for split in ("train", "val")] == [4, 4]


@pytest.fixture
def folder(tmp_path):
    """Two training shards of 100 and 57 tokens and a validation shard, of ascending tokens."""
    for name, tokens in (("x_train_000000", range(100)), ("x_train_000001", range(100, 157)), ("x_val_000000", range(50))):
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.write(prepare_data.shard_header(len(tokens)) + np.array(tokens, "<u2").tobytes())
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256}')
    return tmp_path


def test_an_epoch_shows_every_window_once_in_an_order_that_only_the_seed_sets(folder):
    data = Data(folder, "train", 10, seed=1)
    assert len(data) == 9 + 5  # 99 and 56 targets
    epochs = [[data.batch(step, 7)[0][:, 0].tolist() for step in (2 * e, 2 * e + 1)] for e in range(3)]
    flat = [sum(epoch, []) for epoch in epochs]
    starts = [*range(0, 90, 10), *range(100, 150, 10)]
    assert all(sorted(epoch) == starts for epoch in flat) and flat[0] != flat[1] != flat[2] != starts
    inputs, targets = data.batch(1, 5)
    assert (inputs == inputs[:, :1] + np.arange(10)).all() and (targets == inputs + 1).all()
    again = Data(folder, "train", 10, seed=1)
    assert again.batch(5, 7)[0][:, 0].tolist() == epochs[2][1]  # any step, in any order
    assert again.batch(0, 7)[0][:, 0].tolist() == epochs[0][0]
    one_by_one = [again.batch(step, 1)[0][0, 0] for step in range(42)]
    assert one_by_one == sum(flat, [])  # in batches of any size, across epochs
    assert Data(folder, "train", 10, seed=2).batch(0, 14)[0][:, 0].tolist() != flat[0]


def test_batches_may_span_epochs_and_a_run_may_resume_at_any_step(folder):
    in_order = Data(folder, "train", 10, seed=3)
    for size in (5, 13, 14, 40):
        for step in range(60):
            fresh = Data(folder, "train", 10, seed=3).batch(step, size)[0]
            assert np.array_equal(fresh, in_order.batch(step, size)[0])
            halves = [in_order.batch(step, size, rows)[0] for rows in (slice(0, size // 2), slice(size // 2, size))]
            assert np.array_equal(np.concatenate(halves), fresh)  # as two processes read it


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


def test_nothing_is_predicted_across_documents(tmp_path):
    prepare_data.prepare(["abc", "val", "defg"], tmp_path / "data", "mine", "bytes")
    inputs, targets = Data(tmp_path / "data", "train", 8).windows(np.array([0]))
    assert inputs[0].tolist() == [256, *b"abc", 256, *b"def"]
    assert targets[0].tolist() == [-100, *b"bc", 256, -100, *b"efg"]


@pytest.mark.parametrize("damage, message", [
    (lambda raw: b"<html>" + raw[6:], "is not a shard: it begins with"),
    (lambda raw: raw[:4] + b"\7" + raw[5:], "is a shard of version 7, not 1"),
    (lambda raw: raw[:-2], "has 1222 bytes, not the 1224 of its 100 tokens"),
    (lambda raw: raw[:500], "has 500 bytes"),
    (lambda raw: b"", "is not a shard"),
    (lambda raw: raw[:-2] + b"\xff\xff", "holds the token 65535, but the tokenizer bytes has only 257"),
], ids=["html", "version", "short", "header", "empty", "token"])  # fmt: skip
def test_bad_shards_are_one_clear_line(folder, damage, message):
    path = folder / "x_train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        Data(folder, "train", 99).batch(0, 1)


def test_missing_and_tiny_data_are_one_clear_line(folder):
    with pytest.raises(ValueError, match="holds no test shards"):
        Data(folder, "test", 10)
    with pytest.raises(ValueError, match="shorter than one window of 100 tokens: lower --context"):
        Data(folder, "train", 100)
    with pytest.raises(ValueError, match="there is no tokenizer 'byte'"):
        prepare_data.get_tokenizer("byte")
    with pytest.raises(ValueError, match="no text was found"):
        prepare_data.prepare([], folder / "new", "mine", "bytes")


def test_text_streams_whole_characters():
    stream = prepare_data.TextStream(prepare_data.get_tokenizer("bytes"))
    assert [stream(byte) for byte in "aé漢".encode()] == ["a", "", "é", "", "", "漢"]


def test_the_gpt2_tokenizer_without_a_network_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match="gpt2 has to be downloaded once, and that failed .*Error.* or use the tokenizer bytes"):
        prepare_data.get_tokenizer("gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# Download


class Server(ThreadingHTTPServer):
    """Serves files (name to bytes) and misbehaves: faults maps a name to a list of faults, one used up by each GET."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.sent, self.delay = {}, {}, [], 0, 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/base"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        server, name = self.server, self.path.removeprefix("/base/")
        if name not in server.files:
            return self.send_error(404)
        faults, content, status = server.faults.get(name, []) if body else [], server.files[name], 200
        fault = faults.pop(0) if faults else None
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if body:
            server.requests.append((name, start))
        if fault == "500":
            return self.send_error(500)
        if fault == "html":
            content, start = b"<html>please log in</html>" * 100, 0
        if fault == "wrong length":
            content = content[:-100]
        if start and fault != "ignores range":
            if start >= len(content):
                return self.send_error(416)
            status, content = 206, content[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{start + len(content)}")
        self.end_headers()
        if not body:
            return
        if fault in ("cut", "ignores range and cuts", "stalls"):
            content = content[: len(content) // 2]
        for a in range(0, len(content), 1 << 14):
            try:
                self.wfile.write(content[a : a + (1 << 14)])
            except OSError:  # the client has gone
                return
            server.sent += len(content[a : a + (1 << 14)])
            time.sleep(server.delay)
        if fault == "stalls":
            time.sleep(3)
        self.close_connection = True


def shard_bytes(n, seed=0):
    return prepare_data.shard_header(n) + np.random.default_rng(seed).integers(50257, size=n).astype("<u2").tobytes()


@pytest.fixture
def server():
    server = Server()
    server.files = {f"s{i}_train_00000{i}.bin": shard_bytes(50_000, i) for i in range(4)}
    yield server
    server.shutdown()


def download(server, folder, **options):
    options = dict(pause=0.01, timeout=1.0) | options
    prepare_data.Download(server.url, folder, list(server.files), **options).run()


def assert_downloaded(server, folder):
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == server.files


def test_download_fetches_each_shard_once(server, tmp_path):
    download(server, tmp_path / "new" / "folder")
    assert_downloaded(server, tmp_path / "new" / "folder")
    assert len(server.requests) == 4
    download(server, tmp_path / "new" / "folder")
    assert len(server.requests) == 4


@pytest.mark.parametrize("faults, requests", [
    (["cut"], 2), (["cut"] * 9, 10), (["stalls"], 2), (["500", "500"], 3), (["500", "cut", "ignores range"], 3),
], ids=str)  # fmt: skip
def test_download_survives_a_bad_connection(server, tmp_path, faults, requests):
    name = list(server.files)[1]
    server.faults[name] = list(faults)
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    starts = [start for n, start in server.requests if n == name]
    assert len(starts) == requests and (starts[-1] > 0) == (set(faults) != {"500"})
    if set(faults) == {"cut"}:  # each byte came once
        assert starts == sorted(set(starts)) and server.sent == sum(map(len, server.files.values()))


def test_download_goes_on_with_a_partial_file_and_replaces_a_damaged_one(server, tmp_path):
    whole, part, long, broken = server.files
    (tmp_path / whole).write_bytes(server.files[whole])
    (tmp_path / f"{part}.partial").write_bytes(server.files[part][:70_000])
    (tmp_path / f"{long}.partial").write_bytes(server.files[long] + b"and more")
    (tmp_path / broken).write_bytes(server.files[broken][:-1])
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)
    assert whole not in dict(server.requests) and (part, 70_000) in server.requests


@pytest.mark.parametrize("fault, error, message", [
    ("500", OSError, "500 Internal Server Error, 3 times in succession; run the command again"),
    ("html", OSError, "what was sent is no shard .* it begins with"),
    ("wrong length", OSError, "what was sent is no shard .* has 100924 bytes, not the 101024"),
    ("404", ValueError, "404 Not Found: is --base_url right"),
])  # fmt: skip
def test_download_gives_up_with_one_clear_line(server, tmp_path, fault, error, message):
    name = list(server.files)[2]
    if fault == "404":
        downloaded = prepare_data.Download(server.url, tmp_path, [name, "missing.bin"], pause=0.01)
    else:
        server.faults[name] = [fault] * 99
        downloaded = prepare_data.Download(server.url, tmp_path, [name], tries=3, pause=0.01)
    with pytest.raises(error, match=message):
        downloaded.run()
    assert not (tmp_path / name).exists() or (tmp_path / name).read_bytes() == server.files[name]


def test_download_checks_the_disk_before_it_starts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: Namespace(free=404_000))
    with pytest.raises(ValueError, match="0.0 GB free, the download needs 0.0 GB: make room"):
        download(server, tmp_path)
    assert server.requests == []
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: Namespace(free=404_096))
    download(server, tmp_path)
    assert_downloaded(server, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path, number):
    server.files = {name: shard_bytes(500_000) for name in ("edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin")}
    server.delay = 0.02
    command = [sys.executable, ROOT / "prepare_data.py", "fineweb-edu", "--shards=1", f"--base_url={server.url}", f"--out={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while server.sent < 200_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode in (-9, 130) and "Traceback" not in error
    assert not list(tmp_path.glob("*.bin"))
    server.delay, server.requests = 0.0, []
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "next: python train.py" in result.stdout, result.stderr
    assert_downloaded(server, tmp_path)
    assert all(start > 50_000 for _, start in server.requests)


def test_parquet_is_read_with_pyarrow_and_asked_for_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet needs pyarrow to be read: pip install pyarrow"):
        list(prepare_data.documents([tmp_path / "a.parquet"], Counter()))
    monkeypatch.undo()
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"] * 300, "id": range(900)}), tmp_path / "b.parquet")
    assert list(prepare_data.documents([tmp_path / "b.parquet"], Counter())) == ["one", "two"] * 300
    with pytest.raises(ValueError, match="a.parquet is no .parquet file with a column text"):
        list(prepare_data.documents([tmp_path / "a.parquet"], Counter()))


# ----------------------------------------------------------------------------------------------------------------------
# The scripts, by their command lines


def script(*words, stdin=None):
    """Runs a script in the workplace and returns what it printed."""
    command = [sys.executable, ROOT / words[0], *map(str, words[1:])]
    result = subprocess.run(command, capture_output=True, text=True, input=stdin, cwd=script.folder, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, data and a trained checkpoint."""
    script.folder = folder = tmp_path_factory.mktemp("scripts")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"The number {i} follows the number {i - 1}. " * 40)
    script("prepare_data.py", "text", "texts", "--tokenizer=bytes", "--out", "data/mine")
    script("train.py", *TINY, "--steps=30")
    return folder


TINY = "--data=data/mine --n_layer=2 --d_model=32 --n_head=2 --context=32 --batch_tokens=512 --eval_every=10 --eval_tokens=1024".split()


def test_training_learns_and_shows_how(workplace):
    whole = script("train.py", *TINY, "--steps=30", "--out=whole", "--lr=1e-2")
    losses = [float(x) for x in re.findall(r"val ([0-9.]+)", whole)]
    assert len(losses) == 3 and losses[2] < losses[0] < 5.6
    assert re.search(r"step +30/30  train [0-9.]+ \([0-9.]+ bits/byte\)  val [0-9.]+ \([0-9.]+ bits/byte\) +[0-9,]+ tokens/s  0m00s left", whole)
    assert "▌" in whole and "Next: python sample.py" in whole


one_and_two_patterns = pytest.mark.parametrize("layers", [[], ["--layers=rat+", "--joint_dilation=4"]], ids=["rat", "rat+ jointly"])


@one_and_two_patterns
def test_a_killed_run_resumes_to_the_same_losses_and_weights_bit_for_bit(workplace, layers):
    options = [*TINY, "--data=data/mine", "--steps=100", "--sample_tokens=0", *layers]
    for name in ("unbroken", "killed"):
        shutil.rmtree(workplace / name, ignore_errors=True)
    script("train.py", *options, "--out=unbroken")
    killed = subprocess.Popen([sys.executable, ROOT / "train.py", *options, "--out=killed"], cwd=workplace, stdout=subprocess.DEVNULL)
    while not (workplace / "killed" / "ckpt.pt").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    killed.kill()
    killed.wait()
    assert torch.load(workplace / "killed" / "ckpt.pt", weights_only=True)["step"] < 100
    script("train.py", "--resume", "--out=killed")
    logs = [(workplace / name / "log.jsonl").read_text().splitlines() for name in ("unbroken", "killed")]
    losses = [[[value for name, value in json.loads(line).items() if "loss" in name] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 10 and len(losses[0][0]) == (4 if layers else 2)
    a, b = (RAT.load(workplace / name / "ckpt.pt").state_dict() for name in ("unbroken", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "steps 100 to 110" in script("train.py", "--resume", "--out=killed", "--steps=110")


def test_gradient_accumulation_changes_nothing_but_memory(workplace):
    """Many short documents: the micro-batches have different numbers of targets."""
    prepare_data.prepare(["ab" * (i % 40) + "c" for i in range(2000)], workplace / "data" / "short", "short", "bytes")
    options = [*TINY, "--data=data/short", "--steps=10", "--dtype=float32"]
    script("train.py", *options, "--out=full")
    script("train.py", *options, "--out=parts", "--micro_batch=4")
    assert_same_run(workplace / "full", workplace / "parts")


def test_joint_training_updates_sparse_then_dense_on_each_batch_at_one_learning_rate(workplace):
    """The recipe of RAT+ by hand: two whole updates on a batch, one step of the schedule."""
    steps, lr = 4, 1e-2
    options = ["--layers=rat+", "--joint_dilation=4", f"--steps={steps}", f"--lr={lr}", "--dtype=float32", "--sample_tokens=0", "--eval_every=4"]
    script("train.py", *TINY, *options, "--out=jointly")
    line = json.loads((workplace / "jointly" / "log.jsonl").read_text())
    trained = RAT.load(workplace / "jointly" / "ckpt.pt")
    assert trained.config.dilation is None

    torch.manual_seed(1)
    model = RAT(Config(vocab_size=257, n_layer=2, d_model=32, n_head=2, context=32, layers="rat+"), "bytes")
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr, (0.9, 0.95))  # fmt: skip
    data, losses = Data(workplace / "data" / "mine", "train", 32, 1), {4: [], None: []}
    for step in range(steps):
        warm = [lr, *(1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * n / (steps - 2))) / 2 for n in range(steps - 1))]
        for group in optimizer.param_groups:
            group["lr"] = warm[step]
        x, y = (torch.from_numpy(part) for part in data.batch(step, 16))
        for dilation in (4, None):
            model.use(dilation=dilation)
            loss = model(x, y)[1]
            losses[dilation].append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert line["train_loss_sparse"] == pytest.approx(sum(losses[4]) / steps, rel=1e-5)
    assert line["train_loss"] == pytest.approx(sum(losses[None]) / steps, rel=1e-5)
    for name, p in trained.state_dict().items():
        assert relative_error(p, model.state_dict()[name]) < 1e-3


def test_a_model_is_evaluated_and_adapted_with_another_pattern_and_context(workplace):
    options = [*TINY, "--steps=20", "--dtype=float32", "--sample_tokens=0"]
    shutil.rmtree(workplace / "plus", ignore_errors=True)
    script("train.py", *options, "--layers=rat+", "--joint_dilation=4", "--out=plus")
    line = json.loads((workplace / "plus" / "log.jsonl").read_text().splitlines()[-1])
    evaluate = ["train.py", "--data=data/mine", "--eval_only", "--init_from=plus/ckpt.pt", "--eval_tokens=1024", "--dtype=float32"]
    loss = lambda text: float(re.search(r"validation loss ([\d.]+)", text)[1])
    assert loss(script(*evaluate)) == pytest.approx(line["val_loss"], abs=1e-4)
    assert loss(script(*evaluate, "--dilation=4")) == pytest.approx(line["val_loss_sparse"], abs=1e-4)
    text = script(*evaluate, "--dilation=1,none", "--window=9", "--sinks=2", "--context=64", "--by_position", "--batch_tokens=100")
    model = RAT.load(workplace / "plus" / "ckpt.pt", dilation="1,none", window=9, sinks=2)
    x, y = (torch.from_numpy(part) for part in Data(workplace / "data" / "mine", "val", 64, 1).sample(16))
    nats = -model(x)[0].log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0].detach()
    assert loss(text) == pytest.approx(nats[y >= 0].mean().item(), abs=1e-4)
    rows = {int(first): float(loss) for first, loss in re.findall(r"from position +(\d+): ([\d.]+)", text)}
    assert len(rows) == 16
    for first, value in rows.items():
        part = slice(first, first + 4)
        assert value == pytest.approx(nats[:, part][y[:, part] >= 0].mean().item(), abs=1e-4)

    out = script("train.py", *options, "--init_from=plus/ckpt.pt", "--dilation=4", "--window=3", "--lr=1e-4", "--out=plus/adapted")
    adapted = RAT.load(workplace / "plus" / "adapted" / "ckpt.pt")
    assert "and" not in out.split("validation loss")[1].split("\n")[0] and (adapted.config.dilation, adapted.config.window) == ("4", "3")
    x, y = (torch.from_numpy(part) for part in Data(workplace / "data" / "mine", "val", 32, 1).sample(32))
    before, after = (RAT.load(workplace / "plus" / name, dilation=4, window=3)(x, y)[1] for name in ("ckpt.pt", "adapted/ckpt.pt"))
    assert after < before
    assert script("sample.py", "--ckpt=plus/ckpt.pt", "--dilation=8", "--sinks=1", "--prompt=The", "--max_new_tokens=9").startswith("The")


def test_official_checkpoints_are_sampled_and_trained_on(workplace):
    theirs = official(*OFFICIAL["rat+"], vocab_size=320)[1]
    torch.save({"task": theirs}, workplace / "theirs.pt")
    shutil.rmtree(workplace / "theirs", ignore_errors=True)
    convert = ["prepare_data.py", "checkpoint", "theirs.pt", "--layers=rat+", "--n_head=4", "--dilation=4"]
    assert "2 layers of width 16" in script(*convert, "--out=theirs/ckpt.pt")
    ids = script("sample.py", "--ckpt=theirs/ckpt.pt", "--prompt=5 17", "--max_new_tokens=6", "--temperature=0")
    expected = [t.item() for t in prepare_data.load_official(theirs, layers="rat+", n_head=4, dilation=4).generate(torch.tensor([[5, 17]]), 6, 0)]
    assert list(map(int, ids.split())) == [5, 17, *expected]
    script("train.py", *TINY[:1], "--init_from=theirs/ckpt.pt", "--context=32", "--batch_tokens=512", "--steps=5", "--sample_tokens=0", "--out=from")
    script("train.py", "--resume", "--out=from", "--steps=6")
    trained = RAT.load(workplace / "from" / "ckpt.pt")
    assert trained.tokenizer == "bytes" and trained.config.vocab_size == 320  # the model's, of which the data uses 257
    script(*convert, "--tokenizer=bytes", "--out=theirs/bytes.pt")
    assert RAT.load(workplace / "theirs" / "bytes.pt").tokenizer == "bytes"


def test_a_sentencepiece_tokenizer_encodes_prepares_and_decodes(workplace):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(input=str(workplace / "texts" / "1.txt"), model_prefix=str(workplace / "tiny"), vocab_size=290, byte_fallback=True,
                                             hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    tokenizer = prepare_data.get_tokenizer(str(workplace / "tiny.model"))
    text = "The number 7 follows\nthe number 6 ✓"
    stream = prepare_data.TextStream(tokenizer)
    assert "".join(map(stream, tokenizer.encode_ordinary(text))).strip() == text.replace("\n", " ")  # this model's normalizer
    script("prepare_data.py", "text", "texts", "--tokenizer=tiny.model", "--out=data/pieces")
    options = ["--data=data/pieces", "--n_layer=1", "--d_model=32", "--n_head=2", "--context=32", "--batch_tokens=512", "--steps=20"]
    assert "bits/byte" in script("train.py", *options, "--out=pieces")
    assert script("sample.py", "--ckpt=pieces/ckpt.pt", "--prompt=The number", "--max_new_tokens=9", "--seed=1").startswith("The number")


def assert_same_run(a, b, tolerance=1e-5):
    """Equal losses at every evaluation, to the tolerance, and nearly equal weights."""
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for line, other in zip(*logs):
        assert line.keys() == other.keys()
        for name in (name for name in line if "loss" in name):
            assert line[name] == pytest.approx(other[name], rel=tolerance)
    a, b = (RAT.load(folder / "ckpt.pt").state_dict() for folder in (a, b))
    for name in a:
        assert relative_error(b[name], a[name]) < 100 * tolerance


def test_sample_writes_from_a_prompt_a_file_and_standard_input(workplace):
    (workplace / "prompt.txt").write_text("The number")
    options = ("--seed=1", "--max_new_tokens=20")
    direct = script("sample.py", "--prompt=The number", *options)
    assert direct.startswith("The number") and len(direct) > len("The number")
    assert script("sample.py", "--prompt_file=prompt.txt", *options) == direct
    assert script("sample.py", "--prompt_file=-", *options, stdin="The number") == direct
    assert script("sample.py", "--prompt", "The number", "--seed=2", "--max_new_tokens=20") != direct
    assert script("sample.py", "--num_samples=3", "--temperature=0", "--top_k=5", "--top_p=0.9").count("---") == 3


def torchrun(*words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", ROOT / words[0], *words[1:]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=script.folder, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@one_and_two_patterns
def test_processes_share_the_work_and_change_nothing_and_resume_each_others_runs(workplace, layers):
    """One process, two with DDP, two with FSDP: the same losses, to 1e-5, on the same global batches."""
    for name in ("runs", "resumed"):
        shutil.rmtree(workplace / name, ignore_errors=True)
    options = [*layers, *TINY, "--data=data/mine", "--steps=12", "--eval_every=6", "--dtype=float32", "--device=cpu", "--keep=2", "--sample_tokens=0"]
    run = {
        "one": lambda *words: script("train.py", *words),
        "ddp": lambda *words: torchrun("train.py", *words, "--parallel=ddp", "--micro_batch=4"),
        "fsdp": lambda *words: torchrun("train.py", *words, "--parallel=fsdp", "--micro_batch=2"),
    }
    for name in run:
        run[name](*options, f"--out=runs/{name}")
        assert_same_run(workplace / "runs" / "one", workplace / "runs" / name)
        assert sorted(path.name for path in (workplace / "runs" / name).iterdir()) == [
            "ckpt-0000006.pt", "ckpt-0000012.pt", "ckpt.pt", "log.jsonl"]  # fmt: skip
    for writer, reader in () if layers else (("one", "fsdp"), ("ddp", "one"), ("fsdp", "ddp")):
        folder = workplace / "resumed" / f"{writer}-{reader}"
        folder.mkdir(parents=True)
        shutil.copy(workplace / "runs" / writer / "ckpt-0000006.pt", folder / "ckpt.pt")
        shutil.copy(workplace / "runs" / writer / "log.jsonl", folder)
        assert "steps 6 to 12" in run[reader]("--resume", "--out", str(folder))
        assert_same_run(workplace / "runs" / "one", folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(workplace, number):
    folder = f"signal{int(number)}"
    command = [sys.executable, "-u", ROOT / "train.py", *TINY, "--steps=100000", "--log_every=1", f"--out={folder}", "--eval_every=100000"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and error == ""
    step = int(re.search(rf"stopped after step (\d+): python train.py --resume --out={folder} goes on", out)[1])
    assert torch.load(workplace / folder / "ckpt.pt", weights_only=True)["step"] == step
    assert f"steps {step} to {step + 2}" in script("train.py", "--resume", f"--out={folder}", f"--steps={step + 2}")


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(workplace):
    script("train.py", *TINY, "--steps=10", "--out=diverged")
    before = (workplace / "diverged" / "ckpt.pt").read_bytes()
    command = [sys.executable, ROOT / "train.py", "--resume", "--out=diverged", "--steps=30", "--lr=1e30", "--clip=0"]
    result = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    message = r"error: step \d+: loss .*, norm of the gradient .*, at a learning rate of .*e\+.*; last good checkpoint: diverged/ckpt.pt"
    assert re.search(message, result.stderr), result.stderr
    assert (workplace / "diverged" / "ckpt.pt").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept_and_the_log_tells_the_run(workplace):
    script("train.py", *TINY, "--steps=50", "--keep=2", "--out=keep", "--layers=rat,swa", "--window=4")
    assert sorted(path.name for path in (workplace / "keep").glob("ckpt*")) == ["ckpt-0000040.pt", "ckpt-0000050.pt", "ckpt.pt"]
    assert torch.load(workplace / "keep" / "ckpt-0000040.pt", weights_only=True)["step"] == 40
    log = [json.loads(line) for line in (workplace / "keep" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50] and log[4]["tokens"] == 50 * 512
    assert log[4]["val_loss"] < log[0]["val_loss"] and log[4]["lr"] == pytest.approx(1e-6)
    assert "steps 50 to 60" in script("train.py", "--resume", "--out=keep", "--steps=60", "--window=4")


def test_training_with_recompute_and_compile_is_training(workplace):
    options = [*TINY, "--data=data/mine", "--steps=10", "--dtype=float32", "--sample_tokens=0", "--chunk_size=4"]
    for name, more in dict(plain=[], recompute=["--recompute"], compiled=["--compile", "--recompute"]).items():
        script("train.py", *options, f"--out=way/{name}", *more)
        assert_same_run(workplace / "way" / "plain", workplace / "way" / name, 1e-4)


@pytest.mark.parametrize("preset, parameters, gflop", [
    ("rat-1b", "1,336", "8.09"), ("attention-1b", "1,311", "9.07"), ("rat-swa-200m", "204", "1.30"),
    # 24 x (5 + 1 + 8) x 2048^2 + 50304 x 2048 weights; of scores, 2048.5 keys on average dense, and 31.5 with D=64
    ("rat+-1b", "1,512", "19.37"), ("rat+-3b", "2,697", "34.16"), ("rat+-7b", "7,722", "95.94"), ("rat+-200m", "227", "3.04"),
])  # fmt: skip
def test_dry_run_counts_without_building(workplace, preset, parameters, gflop, monkeypatch, capsys):
    """By hand, rat-1b: 24 x (3.25 + 1 + 8) x 2048^2 + 50304 x 2048 = 1336 M, times 6, plus 3 x 24 x 4 x 2048 x 127.5."""
    monkeypatch.chdir(workplace)

    def dry_run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", f"--preset={preset}", "--dry_run", *words])
        train.main()
        return capsys.readouterr().out

    out = dry_run("--out=dry")
    assert re.search(rf"parameters +{parameters}\.\d M", out) and f"{gflop} GFLOP per token" in out, out
    assert re.search(r"memory, estimated per process and uncompiled: [\d.]+ GB", out) and not (workplace / "dry").exists()
    more = dry_run("--steps=7", "--recompute")
    assert "steps         7 of" in more


# ----------------------------------------------------------------------------------------------------------------------
# bench.py: that it measures what it says; how fast is no test


@pytest.fixture
def cpu():
    return bench.Hardware(torch.device("cpu"), torch.float32)


def test_bench_times_every_kind_at_every_length(workplace):
    table = script("bench.py", "layer", "--lengths=64", "--tokens=128", "--d_model=32", "--n_head=2", "--repeats=1", "--decode_batch=3", "--json=a.json")
    cells = json.loads((workplace / "a.json").read_text())["results"]
    names = ["attention", "swa W=1024", "rnn", "rat L=4", "rat L=16", "rat L=64", "rat L=256", "rat+ D=1", "rat+ D=4", "rat+ D=16", "rat+ D=64",
             "rat+ D=64 W=256 S=4"]  # fmt: skip
    assert [(c["mode"], c["T"], c["name"]) for c in cells] == [(m, T, n) for m in ("train", "prefill", "decode") for T in (64,) for n in names]
    assert all(c["ms"] > 0 and c["floor_ms"] > 0 and c["spread"] >= 0 for c in cells)
    assert all(c["ratio"] == 1 for c in cells if c["name"] == "attention") and table.count("T=64") == 3
    bytes = {c["name"]: c["cache_bytes"] for c in cells if (c["mode"], c["T"]) == ("decode", 64)}
    assert bytes["attention"] == 3 * 64 * 2 * 32 * 4 and bytes["rnn"] == 3 * 32 * 4
    assert bytes["rat L=16"] == 3 * (1 + 3) * 2 * 32 * 4 + 3 * 2 * 32 * 4  # its own and three chunk ends; the state


def test_bench_takes_kinds_of_ones_own_and_draws_them(workplace):
    pytest.importorskip("matplotlib")
    script("bench.py", "layer", "--layers=rat+", "--dilation=1,8", "--window=2", "--lengths=16,32", "--tokens=32", "--modes=decode", "--repeats=1",
           "--json=b.json", "--plot=b.png")  # fmt: skip
    cells = json.loads((workplace / "b.json").read_text())["results"]
    assert [c["name"] for c in cells] == ["attention", "rat+ D=1 W=2", "rat+ D=8 W=2"] * 2
    assert (workplace / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_times_models_and_the_scan(workplace):
    small = ["--repeats=1", "--n_layer=2", "--d_model=32", "--n_head=2", "--context=32"]
    text = script("bench.py", "model", *small, "--prompt=10", "--max_new_tokens=5", "--batch=2", "--json=c.json")
    cells = json.loads((workplace / "c.json").read_text())["results"]
    assert [c["name"] for c in cells] == ["attention", "rat", "rnn"] and "x attention" in text
    assert cells[0]["cache_bytes_per_token"] == 2 * 2 * 32 * 4 and all(c["train_tokens_per_second"] > 0 and 0 < c["mfu"] < 1 for c in cells)
    text = script("bench.py", "scan", "--lengths=2", "--tokens=16", "--d_model=8", "--repeats=1", "--json=d.json")
    assert len(json.loads((workplace / "d.json").read_text())["results"]) == 4 and "associative_scan" in text


def test_out_of_memory_costs_a_bench_one_cell(cpu):
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def setup():
        raise MemoryError

    good = bench.Case("good", lambda: lambda: time.sleep(0.002), flops=1.0, bytes=cpu.bandwidth)
    results = bench.measure([bench.Case("step", lambda: step), good, bench.Case("setup", setup)], 3, cpu, "")
    assert [r.get("error") for r in results] == ["out of memory", None, "out of memory"]
    assert results[1]["ms"] >= 2 and results[1]["floor_ms"] == pytest.approx(1000)
    with pytest.raises(MemoryError):
        cpu.expect_memory(1 << 60)


def test_a_table_with_cells_out_of_memory_is_printed_all_the_same(cpu, monkeypatch, capsys):
    def expect_memory(size):
        if size > 100_000:
            raise MemoryError

    monkeypatch.setattr(cpu, "expect_memory", expect_memory)
    settings = bench.Settings(lengths="16,64", tokens=64, decode_batch=8, repeats=1, modes="decode")
    kinds = bench.pick_kinds(dict(d_model=32, n_head=2), [dict(layers="attention"), dict(layers="rat")])
    results = bench.bench_layers(settings, kinds, cpu)
    assert [result.get("error") for result in results] == [None, None, "out of memory", None]
    assert "out of memory" in capsys.readouterr().out
    json.dumps(results, allow_nan=False)


def test_the_largest_batch_is_found_by_trying():
    for most in (0, 1, 2, 7, 100, 1023):
        assert 0.95 * most - 1 <= bench.largest(lambda batch: batch <= most) <= most


def test_peak_memory_is_that_of_the_step(cpu):
    if cpu.memory() is None:
        pytest.skip("this system does not tell")
    (result,) = bench.measure([bench.Case("", lambda: lambda: torch.ones(50_000_000).sum())], 1, cpu, "")
    assert 190e6 < result["memory"] < 260e6


def test_bad_command_lines_are_one_clear_line(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)

    torch.save(official(*OFFICIAL["rat"])[1], "official.pt")

    def says(message, name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as exit:
            prepare_data.run(importlib.import_module(name.removesuffix(".py")).main)
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"{name}: error: ") and message in err

    says("unknown setting --learning_rate", "train.py", "--learning_rate=1")
    says("unknown setting --step; did you mean --steps?", "train.py", "--step=1")
    says("--steps=many: expected a whole number", "train.py", "--steps=many")
    says("--compile=maybe: expected true or false", "train.py", "--compile=maybe")
    says("there is no layer 'rats'", "train.py", "--layers=rats")
    says("ckpt.pt is there already: --resume goes on with it", "train.py", *TINY)
    says("batch_tokens 500 is not a multiple of context 32", "train.py", *TINY, "--batch_tokens=500", "--out=new")
    says("does not divide into 1 processes with micro-batches of 5", "train.py", *TINY, "--micro_batch=5", "--out=new")
    says("data/none holds no train shards", "train.py", "--data=data/none", "--out=new")
    says("there is no checkpoint", "train.py", "--resume", "--out=new")
    says("has made all its 30 steps already: --steps=N with a larger N goes on", "train.py", "--resume")
    says("--d_model=64: the model in out/ckpt.pt has 32, and a resumed run keeps its model", "train.py", "--resume", "--d_model=64")
    says("there is no device 'tpu9' here: it must be auto", "train.py", *TINY, "--device=tpu9", "--out=new")
    says("dtype is 'float8'", "train.py", *TINY, "--dtype=float8", "--out=new")
    says("there is no preset 'rat-2b': choose one of rat-1b, attention-1b", "train.py", "--preset=rat-2b")
    says("parallel is 'pipeline': it must be ddp or fsdp", "train.py", *TINY, "--parallel=pipeline", "--out=new")
    says("steps is 0", "train.py", *TINY, "--steps=0", "--out=new")
    says("unexpected 'layers'", "bench.py", "layers")
    says("lengths is '64,x'", "bench.py", "layer", "--lengths=64,x", "--tokens=64")
    says("tokens 100 is not a multiple of length 64", "bench.py", "layer", "--lengths=64", "--tokens=100")
    says("modes is 'training'", "bench.py", "layer", "--modes=training")
    says("compile is 'perhaps'", "bench.py", "--compile=perhaps")
    says("repeats is 0", "bench.py", "scan", "--repeats=0")
    says("there is no preset 'rat-2b'", "bench.py", "model", "--preset=rat-2b")
    says("joint training is for layers that are all rat+", "train.py", *TINY, "--joint", "--out=new")
    says("--eval_only wants a checkpoint", "train.py", *TINY, "--eval_only", "--out=new")
    says("--by_position goes with --eval_only", "train.py", *TINY, "--by_position", "--out=new")
    says("d_model is 64: this model has 32", "train.py", "--init_from=out/ckpt.pt", "--d_model=64", "--out=new")
    says("dilation is for rat+", "train.py", "--init_from=out/ckpt.pt", "--dilation=4", "--out=new")
    convert = ["prepare_data.py", "checkpoint", "official.pt"]
    says("--out is missing", *convert, "--layers=rat")
    says("--layers is missing", *convert, "--out=official/ckpt.pt")
    says("there is no layer 'rats'", *convert, "--layers=rats", "--n_head=4", "--out=official/ckpt.pt")
    says("the tensor backbone.layers.0.seq_layer.in_proj.weight has the shape", *convert, "--layers=rnn", "--n_head=4", "--out=official/ckpt.pt")
    says("the tokenizer bytes has 257 tokens, the model 30", *convert, "--layers=rat", "--n_head=4", "--tokenizer=bytes", "--out=official/ckpt.pt")
    says("out/ckpt.pt is there already", *convert, "--layers=rat", "--n_head=4", "--out=out/ckpt.pt")
    says("there is no checkpoint theirs.bin", "prepare_data.py", "checkpoint", "theirs.bin", "--layers=rat", "--out=official/ckpt.pt")
    says("checkpoint wants one file", "prepare_data.py", "checkpoint")
    prepare_data.load_official("official.pt", layers="rat", n_head=4).save("ids.pt")
    says("it must be token ids", "sample.py", "--ckpt=ids.pt", "--prompt=The")
    says("there is no tokenizer gpt3.model", "sample.py", "--tokenizer=gpt3.model") if importlib.util.find_spec("sentencepiece") else None
    says("there is no checkpoint none.pt", "sample.py", "--ckpt=none.pt")
    says("both --prompt and --prompt_file", "sample.py", "--prompt=a", "--prompt_file=b")
    says("temperature is -1.0", "sample.py", "--temperature=-1")
    says("there is no file nowhere.txt to read a prompt from", "sample.py", "--prompt_file=nowhere.txt")
    says("there is no file or folder nothing.txt", "prepare_data.py", "text", "nothing.txt")
    says("text wants files or folders", "prepare_data.py", "text")
    says("unexpected 'texts'", "prepare_data.py", "texts")
    says("val_every is 1", "prepare_data.py", "text", "texts", "--val_every=1", "--tokenizer=bytes", "--out=data/new")
    says("data/mine is there already", "prepare_data.py", "text", "texts", "--tokenizer=bytes", "--out=data/mine")
    assert not (workplace / "new").exists() and not (workplace / "data" / "new").exists()


def test_help_lists_every_setting_with_its_default(workplace):
    text = script("train.py", "--help")
    for name in ("--steps INT", "--layers STR", "--chunk_size INT", "[0.004]", "peak learning rate", "keep every N-th token visible"):
        assert name in text
    assert "--vocab_size" not in text


def test_the_lesson_draws_every_kind_on_one_screen(workplace):
    lesson = script("rat.py")
    assert lesson.count("\n") <= 40 and max(map(len, lesson.splitlines())) <= 100
    assert "○ ○ ○ ● ○ ○ ○ ● ○ ○ ● ·" in lesson  # RAT's query 10: two chunk ends and itself


# ----------------------------------------------------------------------------------------------------------------------
# CUDA


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, T", [case for case in CASES if case[1] > case[0].window + 1], ids=str)
def test_flex_and_its_gradients_equal_the_masked_matrix_on_cuda(kind, T, dtype, compiled, monkeypatch):
    q, k, v = (torch.randn(2, heads, T, 64, dtype=dtype, device="cuda", requires_grad=True) for heads in (2, 4, 4))
    rope = rat.rotary_table(torch.arange(T, device="cuda"), 64, 100.0).float()
    monkeypatch.setattr(rat, "FUSED", 0)
    function = lambda *x: rat.attend(*x, rope, kind)
    torch.compiler.reset()
    y = (torch.compile(function, fullgraph=True) if compiled else function)(q, k, v)
    exact = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected, tolerance = masked_matrix(*exact, kind), 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative_error(y.double().cpu(), expected) < tolerance
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((y * weight.to(dtype).cuda()).sum(), [q, k, v])
    for grad, expected_grad in zip(grads, torch.autograd.grad((expected * weight).sum(), exact)):
        assert grad.isfinite().all() and relative_error(grad.double().cpu(), expected_grad) < 2 * tolerance


@needs_cuda
@every_kind
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_on_cuda_equal_layers_on_the_cpu(settings, compiled):
    config = Config(**dict(n_layer=1, n_head=4, d_model=64, context=64) | settings)
    reference, mixer = randomize(Mixer(config)).double(), randomize(Mixer(config)).cuda()
    x = torch.randn(2, 2100, 64)  # long enough for flex_attention, and for the associative scan
    x1, x2 = x.double().requires_grad_(), x.cuda().requires_grad_()
    torch.compiler.reset()
    y1, y2 = reference(x1), (torch.compile(mixer, fullgraph=True) if compiled else mixer)(x2)
    assert relative_error(y2.cpu(), y1) < 1e-2
    grads1 = torch.autograd.grad(y1.square().sum(), [x1, *reference.parameters()])
    grads2 = torch.autograd.grad(y2.square().sum(), [x2, *mixer.parameters()])
    for a, b in zip(grads1, grads2):
        assert relative_error(b.cpu(), a) < 2e-2


@needs_cuda
def test_a_block_mask_for_131072_tokens_is_small():
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rat.block_mask(Kind(dilation=16), 131072, torch.device("cuda"))
    assert torch.cuda.max_memory_allocated() - before < 1 << 28
