"""Tests of topk.py: its oracle takes one query after the other, in float64."""

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
from test_rat import oracle_rope, relative_error, same_inputs_every_time, script, small_model  # noqa: F401
from test_rat import workplace  # noqa: F401

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

        far = [j for n in sorted(blocks, key=score)[-best:] for j in blocks[n]]
        if rule == "dilation":
            step = dilation * max(1, T // size // (2 * best))
            far = [j for n in blocks for j in blocks[n] if (j + 1) % step == 0]
        weights = torch.softmax(k[own + far] @ q[i] / math.sqrt(q.shape[1]), dim=0)
        outputs.append(weights @ v[own + far])
        counts.append(len(own + far))
    return torch.stack(outputs), counts


@LAYERS
@pytest.mark.parametrize("rule", topk.RULES)
@pytest.mark.parametrize("size, best, T", [(4, 1, 30), (8, 2, 40), (8, 3, 7), (16, 1, 1), (4, 30, 21)])
def test_outputs_and_counts_are_the_oracles(rule, size, best, T, layers):
    kind, q, k, v, rope, turned_q, turned_k = inputs(layers, T)
    reads = []
    y = topk.sparse(rule, size, best, reads)(q, k, v, rope, None, kind)
    heads = zip(*(x.flatten(0, 1) for x in (turned_q, turned_k, v)))
    expected, counts = zip(*(oracle(rule, size, best, *head, kind.dilation) for head in heads))
    assert relative_error(y.flatten(0, 1), torch.stack(expected)) < 1e-12
    keys = np.mean(counts)
    described = {"quest": min(2, size // kind.dilation), "moba": 1}.get(rule, 0)
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
        for size, best, same in (16, 5, True), (8, 100, True), (1, 75, True), (8, 1, False):
            with mock.patch.object(rat, "attend", topk.sparse(rule, size, best, [])):
                error = relative_error(model(tokens)[0], whole)
            assert error < 1e-12 if same else error > 1e-3


def test_the_script_prints_loss_keys_and_bytes_of_every_rule(workplace):  # noqa: F811
    model = rat.RAT.load(workplace / "out")  # rat:16, 2 layers of width 32
    windows = Data(workplace / "data/mine", "val", 32).batch(0, 4)
    with torch.no_grad():
        loss = model(*map(torch.from_numpy, windows))[1].item()
    # A query reads its own key, one in two another chunk's end: that key also describes the block.
    kB = 2 * 2 * 32 * (2 * 1.5 + 0.5) / 1000
    losses, *reads = topk.measure([model, model], windows, "moba", 16, 1)
    assert losses == pytest.approx([loss, loss], rel=1e-5) and reads == pytest.approx([1.5, kB])
    words = ["--data=data/mine", "--blocks", "16", "--k", "1", "9", "--tokens=128", "--json=topk.json"]
    header, _, *rows = script("experiments/topk.py", "out", *words).splitlines()[1:]
    assert header == f"out, 1 runs: loss {loss:.3f} with all 2 keys, 0 kB"
    assert [row.split()[:4] for row in rows] == [[rule, "16", "+0.0000", "2"] for rule in topk.RULES]
    results = json.loads((workplace / "topk.json").read_text())["results"]
    assert len(results) == 8 and results[2]["losses"] == pytest.approx([loss], rel=1e-5)
    with pytest.raises(ValueError, match="there is no ckpt.pt in none"):
        script("experiments/topk.py", "none")
    with pytest.raises(ValueError, match="is in tokens of gpt2"):
        script("experiments/topk.py", "out", "--data=data/gpt2")
    pytest.importorskip("matplotlib")
    script("experiments/pictures.py", "topk.json", "--out=pictures")
    assert "quest, 16" in (workplace / "pictures/topk.svg").read_text()
