"""What does a model lose when each query reads only the k blocks of keys that look best? A minute a model.

    python experiments/topk.py out/rat+ out/attention --json=topk.json
    python experiments/pictures.py topk.json

RAT+ is said to lose less than attention (its section 5.3). Without further training, a query in every layer
sees its own block of keys and, of the earlier blocks, the k that come first by

    quest      the largest q . k possible, given each channel's least and greatest value (arXiv 2406.10774)
    moba       q . mean of the keys (arXiv 2502.13189)
    window     position: the latest
    dilation   instead of k blocks every D-th key, with D such that they are about as many

RAT's keys are its chunks' ends. Prints for each folder, as means over its runs, how much the loss rises, the
keys that a query reads in a layer, and the kB of keys, values and descriptions of the earlier blocks that a
token reads from the cache of all layers, at 2 bytes a number. `measure` patches rat.attend and nothing else.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import rat
from prepare_data import Data, parse, run

RULES = {"quest": 2, "moba": 1, "window": 0, "dilation": 0}  # with the vectors that describe a block


def scores(rule, q, blocks):
    """q (B, H, T, D), blocks (B, H, n, keys, D), after RoPE. Returns (B, H, T, n), the best to read first."""
    if rule == "quest":
        return q.clamp(max=0) @ blocks.amin(3).mT + q.clamp(min=0) @ blocks.amax(3).mT
    if rule == "moba":
        return q @ blocks.mean(3).mT
    return torch.arange(blocks.shape[2], dtype=q.dtype).expand(*q.shape[:3], -1)


def visible(rule, size, best, q, k, kind):
    """Which keys do queries see? q and k (B, H, T, D) after RoPE. Returns (B, H, T, T) or (T, T), bool."""
    T, n = k.shape[2], k.shape[2] // size  # what follows the last whole block is in no query's past
    i = torch.arange(T)
    block = i[:, None] // size
    if rule == "dilation":
        step = max(1, n // (2 * best)) if best else T + 1
        chosen = (i + 1) % (kind.dilation * step) == 0
    else:
        blocks = kind.staying(k[:, :, : n * size]).unflatten(2, (n, size // kind.dilation))
        ranked = scores(rule, q, blocks).masked_fill(torch.arange(n) >= block, -torch.inf)
        chosen = ranked.argsort(dim=-1, descending=True).argsort(dim=-1) < best
        chosen = F.pad(chosen.repeat_interleave(size, dim=-1), (0, T - n * size))
    return kind.visible(i[:, None], i) & (chosen | (block == i // size))


def sparse(rule, size, best, reads):
    """A stand-in for `attend` of rat.py. Appends the keys and bytes of a query in a layer to `reads`."""

    def attend(q, k, v, rope, mask, kind):
        T = k.shape[2]
        q, k = rat.tile(rat.rotate(q, rope), k), rat.rotate(k, rope)
        seen = visible(rule, size, best, q, k, kind)
        keys = seen.count_nonzero().item() * T / seen.numel()
        earlier = statistics.mean(i // size for i in range(T))  # blocks
        described = min(RULES[rule], size // kind.dilation) if best else 0
        reads.append((keys, 2 * (2 * keys + earlier * described) * k.shape[1] * k.shape[3]))
        return F.scaled_dot_product_attention(q, k, v, seen)

    return attend


def measure(models, windows, rule, size, best):
    """The loss of each model over windows (inputs, targets); mean keys in a layer, and kB in all layers."""
    losses, reads = [], []
    with torch.no_grad(), mock.patch.object(rat, "attend", sparse(rule, size, best, reads)):
        for model in models:
            nats = [model(x[None], y[None])[1].item() for x, y in zip(*map(torch.from_numpy, windows))]
            losses.append(statistics.mean(nats))
    keys, read = map(statistics.mean, zip(*reads))
    return losses, keys, read * models[0].config.n_layer / 1000


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="each of one or more runs")
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64], help="sizes, in tokens [16 64]")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="blocks [0 1 2 4 8]")
    parser.add_argument("--tokens", type=int, default=16384, help="to evaluate on [16384]")
    parser.add_argument("--json", help="file for the results")
    args = parse(parser)
    results = []
    for name in args.folders:
        models = [rat.RAT.load(path) for path in sorted(Path(name).rglob("ckpt.pt"))]
        layers = sorted({model.config.layers for model in models})
        if len(layers) != 1:
            raise ValueError(f"{name} must hold runs of one kind: it has {layers or 'no ckpt.pt'}")
        for kind in {block.mixer.kind for block in models[0].blocks}:
            if kind.window or kind.sinks or any(size % kind.dilation for size in args.blocks):
                raise ValueError(f"no top-k for windows or parts of chunks: {name} has layers {layers[0]}")
        context = models[0].config.context
        data = Data(args.data, "val", context)
        if any(model.tokenizer != data.tokenizer for model in models):
            raise ValueError(f"{args.data} is in tokens of {data.tokenizer}, {name} of another tokenizer")
        windows = data.batch(0, min(len(data), max(1, args.tokens // context)))
        dense, keys, kB = measure(models, windows, "window", args.blocks[0], context)
        whole = statistics.mean(dense)
        print(f"\n{name}, {len(models)} runs: loss {whole:.3f} with all {keys:.1f} keys, {kB:,.1f} kB")
        print(" " * 11 + "".join(f"{f'k = {k}: rise keys kB':>21}" for k in args.k))
        for rule, size in itertools.product(RULES, args.blocks):
            print(f"{rule:<8}{size:>3}", end="", flush=True)
            for k in args.k:
                losses, keys, kB = measure(models, windows, rule, size, k)
                row = dict(name=name, rule=rule, size=size, k=k, keys=keys, kB=kB, dense=dense, losses=losses)
                results.append(row | dict(rise=statistics.mean(losses) - whole))
                print(f"{results[-1]['rise']:>+10.4f}{keys:>5.0f}{kB:>6,.0f}", end="", flush=True)
            print()
        if args.json:
            Path(args.json).write_text(json.dumps({"results": results}))


if __name__ == "__main__":
    run(main)
