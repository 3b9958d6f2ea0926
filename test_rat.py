"""The claims of this repository, tested. `pytest` runs everything that the machine can run; CUDA tests skip without CUDA.

The oracle is the equation at the top of rat.py in its plainest form: float64, one token after the other, all T x T
scores, written with no code of rat.py.
"""

import dataclasses
import math
import pickle
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rat
from rat import NEVER, RAT, Cache, Config, IntervalAttention, Mixer, Pattern, attend, attend_intervals, intervals, scan

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
PATTERNS = [Pattern(D, W, S) for D in (1, 2, 3, 5, 16, NEVER) for W in (0, 1, 4, 7) for S in (0, 1, 3, 8)]


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
    return norm(x, p["norm.weight"]) @ p["embedding.weight"].T


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
    logits, loss = model(tokens, targets)
    expected = torch.stack([oracle_logits(row, p, config) for row in tokens])
    log_p = expected.log_softmax(-1)
    kept = [(b, t) for b in range(3) for t in range(22) if targets[b, t] != -100]
    expected_loss = -sum(log_p[b, t, targets[b, t]] for b, t in kept) / len(kept)
    assert relative_error(logits, expected) < 1e-11
    assert abs(loss.item() - expected_loss.item()) < 1e-6  # the loss is taken in float32
    grads = torch.autograd.grad((logits * expected.detach()).sum(), p.values())
    expected_grads = torch.autograd.grad((expected * expected.detach()).sum(), p.values())
    for grad, expected_grad in zip(grads, expected_grads):
        assert relative_error(grad, expected_grad) < 1e-10


@every_kind
def test_bf16_autocast_is_near_fp32(settings):
    config = Config(**dict(n_layer=1, n_head=4, d_model=64, context=64) | settings)
    mixer = Mixer(config)
    x = torch.randn(2, 50, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    (grad16,) = torch.autograd.grad(y.float().square().sum(), x)
    assert relative_error(y.float(), mixer(x)) < 0.02
    assert relative_error(grad16, grad) < 0.04


# ----------------------------------------------------------------------------------------------------------------------
# scan


def oracle_scan(x, gate, state, start, chunk):
    h, out = torch.zeros_like(gate[:, 0]) if state is None else state, []
    for t in range(gate.shape[1]):
        h = (h * 0 if t > 0 and (start + t) % chunk == 0 else h) * gate[:, t] + (1 - gate[:, t]) * x[:, t]
        out.append(h)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("T, start, chunk", [
    (1, 0, NEVER), (64, 0, NEVER), (65, 0, NEVER), (300, 7, NEVER), (1, 3, 4), (3, 0, 4), (4, 0, 4), (50, 0, 4), (50, 3, 4),
    (50, 8, 4), (5, 2, 7), (200, 0, 100), (300, 30, 100), (10, 5, 1), (257, 255, 256),
])  # fmt: skip
def test_scan_and_its_gradients_equal_the_recurrence(T, start, chunk, with_state):
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


def test_scan_survives_gates_at_zero_and_one():
    x, gate = torch.randn(1, 200, 4, requires_grad=True), torch.rand(1, 200, 4).round().requires_grad_()
    h = scan(x, gate)
    assert relative_error(h, oracle_scan(x, gate, None, 0, NEVER)) < 1e-6
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(h.sum(), [x, gate]))


@pytest.mark.parametrize("chunk", [16, NEVER])
def test_compiled_scan_equals_eager_scan(chunk):
    x, gate = torch.randn(2, 130, 8, requires_grad=True), torch.rand(2, 130, 8, requires_grad=True)
    compiled = torch.compile(lambda x, gate: scan(x, gate, chunk=chunk), fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x, gate).square().sum(), [x, gate]) for f in (compiled, lambda *a: scan(*a, chunk=chunk)))):
        assert relative_error(a, b) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# attend


def test_the_two_halves_of_the_visible_past_are_disjoint_intervals():
    T = 40
    for pattern in PATTERNS:
        i, j = torch.arange(T)[:, None], torch.arange(T)
        seen = torch.zeros(T, T, dtype=torch.int64)
        for part, keys in (("window", j), ("stays", pattern.select_stays(j[None])[0])):
            low, high = intervals(pattern, T, part)
            n = torch.arange(len(keys))
            seen[:, keys] += ((low[:, None] <= n) & (n < high[:, None])).long()
            assert (low.diff() >= 0).all() and (high.diff() >= 0).all() and (high <= len(keys)).all()
        assert torch.equal(seen, pattern.visible(i, j).long()), pattern
        stays = [t for t in range(T) if pattern.stays(t)]
        assert pattern.select_stays(j[None])[0].tolist() == stays
        assert [pattern.count_stays(n) for n in range(T)] == [sum(t < n for t in stays) for n in range(T)]
        assert pattern.count_stays(j).tolist() == [pattern.count_stays(n) for n in range(T)]


def dense_intervals(q, k, v, pattern, part):
    """attend_intervals as one masked matrix."""
    low, high = (end.to(q.device) for end in intervals(pattern, q.shape[2], part))
    j = torch.arange(k.shape[2], device=q.device)
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~((low[:, None] <= j) & (j < high[:, None])), -math.inf)
    lse = scores.logsumexp(-1)
    return torch.where(lse > -math.inf, 1, 0)[..., None] * (scores - lse.clamp(min=-1e30)[..., None]).exp() @ v, lse


CASES = [
    (Pattern(16, 0, 0), "stays", 600), (Pattern(3, 5, 2), "stays", 300), (Pattern(1, 3, 0), "stays", 20), (Pattern(300, 0, 0), "stays", 700),
    (Pattern(NEVER, 20, 4), "stays", 300), (Pattern(NEVER, 5, 0), "window", 300), (Pattern(4, 300, 1), "window", 700), (Pattern(4, 0, 1), "window", 9),
]  # fmt: skip


@pytest.mark.parametrize("pattern, part, T", CASES)
def test_attend_intervals_equals_the_masked_matrix(pattern, part, T):
    S = T if part == "window" else pattern.count_stays(T)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    out, lse = IntervalAttention.apply(q, k, v, *intervals(pattern, T, part))
    expected, expected_lse = dense_intervals(q, k, v, pattern, part)
    blind = expected_lse == -math.inf  # queries that see nothing
    assert blind.any() == (part == "stays")
    assert torch.equal(lse == -math.inf, blind) and (out[blind] == 0).all()
    assert relative_error(out, expected) < 1e-13
    assert relative_error(lse[~blind], expected_lse[~blind]) < 1e-13
    a, b = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out * a).sum() + (lse * b)[~blind].sum(), [q, k, v])
    expected_grads = torch.autograd.grad((expected * a)[~blind].sum() + (expected_lse * b)[~blind].sum(), [q, k, v])
    for grad, expected_grad in zip(grads, expected_grads):
        assert grad.isfinite().all()
        assert relative_error(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("pattern, part, T", CASES)
def test_flex_forward_equals_interval_attention(pattern, part, T):
    """The CUDA path's mask and its use of flex_attention, on the CPU, where flex_attention has a forward pass."""
    S = T if part == "window" else pattern.count_stays(T)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (T, S, S))
    with torch.no_grad():
        out, lse = rat._flex(q, k, v, pattern, part)
        expected, expected_lse = attend_intervals(q, k, v, pattern, part)
    blind = expected_lse == -math.inf
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(lse == -math.inf, blind) and relative_error(lse[~blind], expected_lse[~blind]) < 1e-5


@pytest.mark.parametrize("pattern, part, T", CASES + [(Pattern(1, 0, 0), "stays", 512), (Pattern(4, 700, 0), "window", 1500)])
def test_block_masks_skip_what_nobody_sees_and_nothing_else(pattern, part, T):
    rat._build_block_mask((pattern, T, part, torch.device("cpu")))
    mask = rat._block_masks[pattern, T, part, torch.device("cpu")]
    low, high = intervals(pattern, T, part)
    S = T if part == "window" else pattern.count_stays(T)
    seen = (low[:, None] <= torch.arange(S)) & (torch.arange(S) < high[:, None])
    partial, full = (torch.zeros(-(-T // 128), -(-S // 128), dtype=torch.bool) for _ in range(2))
    for grid, counts, index in ((partial, mask.kv_num_blocks, mask.kv_indices), (full, mask.full_kv_num_blocks, mask.full_kv_indices)):
        for row, (n, columns) in enumerate(zip(counts[0, 0].tolist(), index[0, 0].tolist())):
            grid[row, columns[:n]] = True
    for row in range(partial.shape[0]):
        for column in range(partial.shape[1]):
            block = seen[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            whole = block.all() and block.shape[1] == 128
            assert full[row, column] == whole
            assert partial[row, column] == (block.any() and not whole)


def test_rope_keeps_scores_a_function_of_distance():
    rope = rat.Rope(10000.0, 1)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    score = lambda i, j: (rope(q, torch.tensor([i])) * rope(k, torch.tensor([j]))).sum().item()
    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-6) and score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)


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


def test_long_continuation_of_a_cached_prompt_equals_the_forward_pass(monkeypatch):
    monkeypatch.setattr(Cache, "BLOCK", 16)
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
    for pattern in PATTERNS:
        kind = rat.Kind(0, pattern, 1, 1, 0, False)
        cache = Cache(kind, 1, T, (1, 1, 2), rat.Rope(0.0, 1), "cpu", torch.float32)
        pieces = [1] * T if one_by_one else [7, 9, 1, 8, 1, 14]
        for piece in torch.arange(T).split(pieces):
            kv = piece.float().view(1, -1, 1, 1, 1).expand(1, -1, 1, 1, 2)
            cache.append(kv, kv)
            t = cache.length
            held = cache.values[0, 0, : cache.count_slots(t), 0].long()
            assert torch.equal(held, cache.positions()) and torch.equal(held, cache.keys[0, 0, : len(held), 1].long())
            # The last token's own window is still there; of it, the oldest token leaves with the next token.
            expected = [j for j in range(t) if pattern.stays(j) or j >= t - 1 - pattern.window]
            assert sorted(held.tolist()) == expected
            visible_later = {j for j in range(t) for i in range(t, t + 60) if pattern.visible(i, j)}
            assert visible_later <= set(expected)
            assert len(held) <= pattern.window + 1 + pattern.sinks + t // pattern.dilation
        assert cache.keys.shape[2] == cache.count_slots(T)


def test_a_full_cache_says_so():
    mixer = Mixer(Config(n_layer=1, chunk_size=4))
    cache = mixer.cache(1, 4)
    mixer(torch.zeros(1, 4, 128), cache)
    with pytest.raises(ValueError, match="no room for token 5"):
        mixer(torch.zeros(1, 1, 128), cache)


def test_cache_memory_is_constant_for_rnn_and_swa_and_a_chunk_end_each_for_rat():
    numel = lambda tokens, **settings: Mixer(Config(n_layer=1, **settings)).cache(2, tokens).numel()
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
            self.largest = max([self.largest] + [x.numel() for x in (out,) if isinstance(x, torch.Tensor)])
        return out


@pytest.mark.parametrize("settings", [dict(layers="rnn"), dict(layers="swa", window=9), dict(layers="attention"), dict(layers="rat")], ids=str)
def test_a_decoding_step_copies_no_cache_and_its_work_grows_only_where_it_should(settings):
    mixer, taken = Mixer(Config(n_layer=1, d_model=32, **settings)), []
    cache, x = mixer.cache(1, 400), torch.randn(1, 1, 32)
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
