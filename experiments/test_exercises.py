"""Answers to the exercises in README.md, as changes to rat.py, each with a test.

    python experiments/test_exercises.py 2                 the answer to exercise 2, as a patch
    python experiments/test_exercises.py 2 | git apply     make the change; `git checkout rat.py` undoes it
    pytest experiments/test_exercises.py
"""

import difflib
import functools
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import rat

SOURCE = Path(rat.__file__)
ANSWERS = {  # lines of rat.py that change, and the lines in their place
    1: [],  # its test is the answer
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
    4: [("""g = g + self.forget_bias""", """g = 0 * g + torch.log(position % kind.restart)[:, None]""")],
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
        assert text.count(old) == 1, f"exercise {n}: rat.py has changed: {old}"
        text = text.replace(old, new)
    return text


@functools.cache
def rat_with_answer(n):
    """rat.py with the answer to exercise n, as a module."""
    module = sys.modules[f"rat_{n}"] = types.ModuleType(f"rat_{n}")
    exec(answer(n), vars(module))
    return module


def layer_and_input(rat, layers, T=23):
    """A Mixer in float64, of module rat, and x (2, T, 32)."""
    torch.manual_seed(0)
    layer = rat.Mixer(rat.Config(d_model=32, n_head=4, qk_groups=4, layers=layers)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer, torch.randn(2, T, 32, dtype=torch.float64)


@torch.no_grad()
def one_by_one(rat, layer, x):
    """The layer's outputs, token by token from a cache."""
    cache = rat.Cache(layer, len(x), x.shape[1], dtype=x.dtype)
    return torch.cat([layer(x_t, cache) for x_t in x.split(1, dim=1)], dim=1)


def test_1_without_memory_rat_with_chunks_of_one_token_is_gated_attention():
    ours, x = layer_and_input(rat, "rat:1")
    gated, _ = layer_and_input(rat, "gated")
    z, v, g, q, k = ours.in_proj.weight.split(ours.sizes)
    g.data.zero_()
    ours.forget_bias.data.fill_(-50.0)
    gated.in_proj.weight.data = torch.cat([z, v, q, k])
    gated.out_proj.weight.data = ours.out_proj.weight
    torch.testing.assert_close(ours(x), gated(x))


def test_2_rat_with_a_window_sees_the_last_states_too():
    layer, x = layer_and_input(rat_with_answer(2), "rat:4:2")
    assert [j for j in range(12) if layer.kind.visible(10, j)] == [3, 7, 8, 9, 10]
    torch.testing.assert_close(one_by_one(rat_with_answer(2), layer, x), layer(x))


def test_3_with_qk_norm_the_scale_of_queries_and_keys_does_not_matter():
    layer, x = layer_and_input(rat_with_answer(3), "rat:4")
    y = layer(x)
    torch.testing.assert_close(one_by_one(rat_with_answer(3), layer, x), y)
    z, v, g, q, k = layer.in_proj.weight.data.split(layer.sizes)
    q.mul_(100)
    k.mul_(0.01)
    torch.testing.assert_close(layer(x), y)


def test_4_without_learned_gates_a_state_is_the_mean_of_its_tokens():
    layer, x = layer_and_input(rat_with_answer(4), "rnn")
    z, v, g = (x @ layer.in_proj.weight.T).split(layer.sizes[:3], dim=-1)
    mean = v.cumsum(1) / torch.arange(1, 24)[:, None]
    y = (torch.sigmoid(z) * mean) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)  # the logarithm is float32
    layer, x = layer_and_input(rat_with_answer(4), "rat:4")
    torch.testing.assert_close(one_by_one(rat_with_answer(4), layer, x), layer(x))


def test_5_griffins_recurrence_and_its_gradient():
    rat = rat_with_answer(5)
    layer, x = layer_and_input(rat, "rat:4", T=9)
    torch.testing.assert_close(one_by_one(rat, layer, x), layer(x))
    x, g = x[..., :3].clone().requires_grad_(), torch.randn(2, 9, 3, dtype=x.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: rat.scan([x], g, 4)[0], (x, g))


def main():
    before, after = SOURCE.read_text(), answer(int(sys.argv[1]))
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    print("".join(difflib.unified_diff(*lines, "a/rat.py", "b/rat.py")), end="")


if __name__ == "__main__":
    main()
