"""Tests of topk.py: its oracle takes one query after the other, in float64."""

import itertools
import json
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import rat
from experiments import topk
from prepare_data import Data
from test_rat import oracle_rope, randomize, relative_error, script, small_model
from test_rat import same_inputs_every_time, workplace  # noqa: F401, fixtures

CASES = (4, 1, 30), (8, 2, 40), (8, 3, 7), (16, 1, 1), (4, 30, 21), (4, 0, 21)  # block, k, tokens
LAYERS = pytest.mark.parametrize("layers", ["attention", "gated", "rat+", "rat+:4", "rat:4"])


def inputs(layers, T, B=2, H=2, D=8):
    """A kind, q, k, v (B, H, T, D) and RoPE's table; then q and k turned, by the oracle's RoPE."""
    kind = rat.Config(layers=layers).kind(0)
    q, k, v = torch.randn(3, B, H, T, D, dtype=torch.float64)
    place = torch.arange(T) // kind.rope_unit
    turned = [oracle_rope(x, place, kind.rope_base) for x in (q, k)]
    return kind, q, k, v, rat.rotary_table(place, D, kind.rope_base), *turned


def oracle(rule, size, best, q, k, v, dilation):
    """q, k after RoPE and v (T, D) of one head. Returns outputs (T, D), and how many keys each query read."""
    T, outputs, counts = len(q), [], []
    for i in range(T):
        ends = [j for j in range(i) if (j + 1) % dilation == 0]
        own = [j for j in ends if j // size == i // size] + [i]
        blocks = {}
        for j in ends:
            if j not in own:
                blocks.setdefault(j // size, []).append(j)

        def score(n):
            if rule == "quest":
                bounds = zip(q[i], k[blocks[n]].amin(0), k[blocks[n]].amax(0))
                return sum(max(a * low, a * high) for a, low, high in bounds)
            return sum(q[i] @ k[j] for j in blocks[n]) / len(blocks[n]) if rule == "moba" else n

        far = [j for n in sorted(blocks, key=score, reverse=True)[:best] for j in blocks[n]]
        if rule == "dilation":
            step = dilation * max(1, T // size // (2 * best)) if best else T + 1
            far = [j for n in blocks for j in blocks[n] if (j + 1) % step == 0]
        weights = torch.softmax(k[own + far] @ q[i] / math.sqrt(q.shape[1]), dim=0)
        outputs.append(weights @ v[own + far])
        counts.append(len(own + far))
    return torch.stack(outputs), counts


@LAYERS
@pytest.mark.parametrize("rule", topk.RULES)
@pytest.mark.parametrize("size, best, T", CASES)
def test_outputs_and_counts_are_the_oracles(rule, size, best, T, layers):
    kind, q, k, v, rope, turned_q, turned_k = inputs(layers, T)
    reads = []
    y = topk.sparse(rule, size, best, reads)(q, k, v, rope, None, kind)
    heads = zip(*(x.flatten(0, 1) for x in (turned_q, turned_k, v)))
    expected, counts = zip(*(oracle(rule, size, best, *head, kind.dilation) for head in heads))
    assert relative_error(y.flatten(0, 1), torch.stack(expected)) < 1e-12
    keys = np.mean(counts)
    described = {"quest": min(2, size // kind.dilation), "moba": 1}.get(rule, 0) * (best > 0)
    vectors = 2 * keys + described * np.mean([i // size for i in range(T)])
    assert reads == [(pytest.approx(keys), pytest.approx(vectors * 2 * 2 * 8))]  # bytes, heads, channels


@pytest.mark.parametrize("rule", ["quest", "moba"])
def test_the_best_of_blocks_of_one_key_is_the_key_that_scores_highest(rule):
    kind, q, k, v, rope, turned_q, turned_k = inputs("rat+", 20)
    y = topk.sparse(rule, 1, 1, [])(q, k, v, rope, None, kind)
    products = (turned_q @ turned_k.mT) / math.sqrt(8)
    for i in range(1, 20):
        pair = torch.stack([products[:, :, i, :i].argmax(-1), torch.full((2, 2), i)], dim=-1)
        weights = products[:, :, i].gather(-1, pair).softmax(-1)
        values = v.gather(2, pair[..., None].expand(-1, -1, -1, 8))
        assert relative_error(y[:, :, i], (weights[..., None] * values).sum(2)) < 1e-12


@LAYERS
@pytest.mark.parametrize("rule", topk.RULES)
def test_with_all_blocks_a_model_is_as_it_was_and_with_fewer_it_is_not(rule, layers):
    model, tokens = small_model(layers).double(), torch.randint(50, (2, 75))
    with torch.no_grad():
        whole = model(tokens)[0]
        for size, best, same in (16, 5, True), (8, 100, True), (4, 75, True), (8, 1, False), (8, 0, False):
            with mock.patch.object(rat, "attend", topk.sparse(rule, size, best, [])):
                error = relative_error(model(tokens)[0], whole)
            assert error < 1e-12 if same else error > 1e-3


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_dilation_reads_about_as_many_keys_as_a_window(k):
    kind, x = rat.Config(layers="gated").kind(0), torch.zeros(1, 1, 1024, 2)
    dilation, window = (topk.visible(rule, 16, k, x, x, kind).sum(-1) for rule in ("dilation", "window"))
    assert dilation.double().mean() == pytest.approx(window.double().mean().item(), rel=0.1)


def test_the_script_prints_and_writes_what_it_measures_for_every_rule(workplace):  # noqa: F811
    models = [small_model("rat:4", "bytes", vocab_size=257, context=32) for _ in range(2)]
    for n, model in enumerate(models):
        randomize(model, seed=n)
        (workplace / f"two/{n}").mkdir(parents=True)
        model.save(workplace / f"two/{n}/ckpt.pt")
    windows = Data(workplace / "data/mine", "val", 32).batch(0, 4)
    with torch.no_grad():
        dense = [model(*map(torch.from_numpy, windows))[1].item() for model in models]
    words = ["two", "--data=data/mine", "--tokens=128", "--json=two.json"]
    out = script("experiments/topk.py", *words, "--blocks", "4", "8", "--k", "0", "1", "8")
    header, _, *lines = out.splitlines()[1:]
    # A query sees its own key and 0 to 7 chunks' ends; there are 2 layers, k and v, 32 channels of 2 bytes.
    assert header == f"two, 2 runs: loss {np.mean(dense):.3f} with all 4.5 keys, 1.2 kB"
    results = iter(json.loads((workplace / "two.json").read_text())["results"])
    for line, (rule, size) in zip(lines, itertools.product(topk.RULES, (4, 8)), strict=True):
        cells = []
        for k in 0, 1, 8:
            losses, keys, kB = topk.measure(models, windows, rule, size, k)
            row, rise = next(results), np.mean(losses) - np.mean(dense)
            numbers = dict(keys=keys, kB=kB, dense=dense, losses=losses, rise=rise)
            numbers = {key: pytest.approx(x, abs=1e-5) for key, x in numbers.items()}
            assert row == dict(name="two", rule=rule, size=size, k=k) | numbers
            cells += [f"{rise:+.4f}", f"{keys:.0f}", f"{kB:.0f}"]
        assert line.split() == [rule, str(size), *cells]
    (workplace / "windows").mkdir()
    small_model("gated:4:3:1", "bytes", vocab_size=257).save(workplace / "windows/ckpt.pt")
    for message, words in [
        ("none must hold runs of one kind: it has no ckpt.pt", ["none"]),
        ("has ..gated:4:3:1., .rat:16., .rat:4.", ["."]),
        ("is in tokens of gpt2", ["two", "--data=data/gpt2", "--blocks", "4"]),
        ("no top-k for windows or parts of chunks: two has layers rat:4", ["two", "--blocks", "6"]),
        ("windows has layers gated:4:3:1", ["windows"]),
    ]:
        with pytest.raises(ValueError, match=message):
            script("experiments/topk.py", *words)


def test_what_was_measured_is_drawn(workplace):  # noqa: F811
    pytest.importorskip("matplotlib")
    rows = []
    for (name, scale), rule, size in itertools.product([("a", 1), ("b", 2)], topk.RULES, (16, 64)):
        for k, rise in (1, 0.1), (2, 0.01), (4, -0.001):
            costs = dict(keys=16 * k * scale, kB=100 * k * scale)
            rows.append(dict(name=name, rule=rule, size=size, k=k, rise=rise) | costs)
    (workplace / "rows.json").write_text(json.dumps({"results": rows}))
    with mock.patch("matplotlib.axes.Axes.plot", autospec=True) as plot:
        script("experiments/pictures.py", "rows.json", "--out=pictures")
    drawn = {}
    for call in plot.call_args_list:
        axes, costs, rises = call.args
        assert rises == [0.1, 0.01, -0.001]
        drawn.setdefault(axes, []).append(costs)
    # Panels with eight lines each: keys and kB of a, keys and kB of b.
    panels = [16, 32, 64], [100, 200, 400], [32, 64, 128], [200, 400, 800]
    assert list(drawn.values()) == [[costs] * 8 for costs in panels]
