"""Answers to the exercises in README.md, as changes to rat.py, each with a test.

    MINE=1 pytest experiments/test_exercises.py -k test_2      does your rat.py solve exercise 2?
    python experiments/test_exercises.py 2                     our answer, as a patch
    pytest experiments/test_exercises.py                       tests of our answers

`git checkout rat.py` undoes a change. After 3, 4 and 5 test_rat.py fails: its oracle has the old equation.
"""

import argparse
import difflib
import functools
import os
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import rat
from prepare_data import run

SOURCE = Path(rat.__file__)
ANSWERS = {  # lines of rat.py that change, and the lines in their place
    1: [],  # gated: see its test
    2: [
        (
            """"rat": lambda L=16: Kind(G, restart=L, dilation=L, rope_unit=L, timespan=L),""",
            """"rat": lambda L=16, W=0: Kind(G, restart=L, dilation=L, window=W, rope_unit=L, timespan=L),""",
        )
    ],
    3: [
        (
            """y = cache.attend(q, k, v, *tables) if cache""",
            """q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
            y = cache.attend(q, k, v, *tables) if cache""",
        )
    ],
    4: [  # validation loss of train.py's defaults: 1.387 with learned gates, 1.848 with means
        (
            """g = g + self.forget_bias""",
            """g = 0 * (g + self.forget_bias) + torch.log(position % kind.restart)[:, None]""",
        )
    ],
    5: [
        (
            """linear_recurrence(f, torch.addcmul(x, f, x, value=-1), x.dtype) for x in xs]  # (1 - f) * x""",
            """linear_recurrence(f, (1 - f * f).sqrt() * x, x.dtype) for x in xs]""",
        ),
        ("""dxs.append(dh.addcmul_(f, dh, value=-1))""", """dxs.append((1 - f * f).sqrt() * dh)"""),
        (
            """dg = (h.to(f.dtype) - x).mul_(dxs[-1]).add_(dg)""",
            """dg = dg + ((1 - f) * h - ((1 - f) / (1 + f)).sqrt() * x) * dh""",
        ),
        ("""torch.lerp(x.to(f.dtype), h, f) for x""", """f * h + (1 - f * f).sqrt() * x for x"""),
    ],
}


def answer(n):
    """The text of rat.py with the answer to exercise n."""
    text = SOURCE.read_text()
    for old, new in ANSWERS[n]:
        if text.count(old) != 1:
            raise ValueError("rat.py has changed: `git stash` your changes, or test them with MINE=1")
        text = text.replace(old, new)
    return text


@functools.cache
def solved(n):
    """rat.py with the answer to exercise n, ours or the reader's, as a module."""
    module = sys.modules[f"rat_{n}"] = types.ModuleType(f"rat_{n}")
    exec(SOURCE.read_text() if "MINE" in os.environ else answer(n), vars(module))
    return module


def layer_and_input(rat, layers, T=23, G=2):
    """A Mixer in float64 and x (2, T, 32)."""
    torch.manual_seed(0)
    layer = rat.Mixer(rat.Config(d_model=32, n_head=4, qk_groups=G, layers=layers)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer, torch.randn(2, T, 32, dtype=torch.float64)


@torch.no_grad()
def decoded(rat, layer, x):
    """Token by token, a layer computes what it computes at once. Returns the cache."""
    cache = rat.Cache(layer, len(x), x.shape[1], dtype=x.dtype)
    steps = [layer(x_t, cache) for x_t in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x), rtol=1e-4, atol=1e-4)
    return cache


def test_1_without_memory_rat_with_chunks_of_one_token_is_gated_attention():
    ours, x = layer_and_input(rat, "rat:1", G=4)
    gated, _ = layer_and_input(rat, "gated")
    z, v, g, q, k = ours.in_proj.weight.split(ours.sizes)
    g.data.zero_()
    ours.forget_bias.data.fill_(-50.0)
    gated.in_proj.weight.data = torch.cat([z, v, q, k])
    gated.out_proj.weight.data = ours.out_proj.weight
    torch.testing.assert_close(ours(x), gated(x))


def test_2_rat_with_a_window_sees_the_last_states_too():
    layer, x = layer_and_input(solved(2), "rat:4:2")
    seen = {i: [j for j in range(12) if layer.kind.visible(i, j)] for i in (8, 10)}
    assert seen == {8: [3, 6, 7, 8], 10: [3, 7, 8, 9, 10]} and layer.kind.rope_unit == 4
    assert decoded(solved(2), layer, x).ring == 3


def test_3_with_qk_norm_the_scale_of_queries_and_keys_does_not_matter():
    layer, x = layer_and_input(solved(3), "rat:4")
    y, cache = layer(x), decoded(solved(3), layer, x)
    norms = cache.keys[:, :, (cache.position < 23)[:, 0]].norm(dim=-1)  # it is k~ that is normalized
    torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=1e-3, atol=0)
    z, v, g, q, k = layer.in_proj.weight.data.split(layer.sizes)
    q.mul_(100)
    k.mul_(100)
    torch.testing.assert_close(layer(x), y, rtol=0.01, atol=0.01)  # up to the norm's epsilon


def test_4_a_state_is_the_mean_of_its_tokens():
    layer, x = layer_and_input(solved(4), "rnn")
    z, v, g = (x @ layer.in_proj.weight.T).split(layer.sizes[:3], dim=-1)
    mean = v.cumsum(1) / torch.arange(1, 24)[:, None]
    y = (torch.sigmoid(z) * mean) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)  # a logarithm may be in float32
    layer, x = layer_and_input(solved(4), "rat:4")
    z, v, g, q, k = (x @ layer.in_proj.weight.T).split(layer.sizes, dim=-1)
    state = decoded(solved(4), layer, x).state
    torch.testing.assert_close(state[0], v[:, 20:].mean(1), rtol=1e-4, atol=1e-4)


def test_5_griffins_recurrence_and_its_gradient():
    layer, x = layer_and_input(solved(5), "rat:4", T=9)
    decoded(solved(5), layer, x)
    x, g = (torch.randn(2, 9, 3, dtype=x.dtype, requires_grad=True) for _ in range(2))
    f, (h,) = torch.sigmoid(g), solved(5).scan([x], g, 4)
    torch.testing.assert_close(h[:, 4], (1 - f[:, 4] ** 2).sqrt() * x[:, 4])
    torch.testing.assert_close(h[:, 5], f[:, 5] * h[:, 4] + (1 - f[:, 5] ** 2).sqrt() * x[:, 5])
    assert torch.autograd.gradcheck(lambda x, g: solved(5).scan([x], g, 4)[0], (x, g))


def main():
    parser = argparse.ArgumentParser(description="Prints an answer as a patch.")
    parser.add_argument("exercise", type=int, choices=ANSWERS)
    before, after = SOURCE.read_text(), answer(parser.parse_args().exercise)
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    patch = "".join(difflib.unified_diff(*lines, "a/rat.py", "b/rat.py"))
    print(patch or "nothing to change: see its test\n", end="")


if __name__ == "__main__":
    run(main)
