"""What does a trained model remember, and how does its loss change over a text? Seconds.

    python experiments/inspect_model.py out/rat
    python experiments/inspect_model.py out/rat --context=2048            beyond the length it was trained on
    python experiments/inspect_model.py out/rat+ --layers=rat+:16         with other numbers

Prints the validation loss by position, and of each layer with a recurrence how many tokens a state sums up,
1 / (1 - f): its distribution over tokens and channels.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import Data, run
from rat import RAT


@torch.no_grad()
def loss_by_position(model, windows):
    """The mean loss at each position, a tensor (context,), over windows (inputs, targets)."""
    nats, rows = [], max(1, 4096 // windows[0].shape[1])
    for x, y in zip(*(torch.from_numpy(part).split(rows) for part in windows)):
        logits = model(x)[0].float()
        nats.append(F.cross_entropy(logits.mT, y, reduction="none"))
    return torch.cat(nats).mean(0)


@torch.no_grad()
def memories(model, tokens):
    """For each layer with a recurrence 1 / (1 - f) = 1 + exp(g), (B, T, d); None for the others."""
    x, rows = model.embedding(tokens), []
    for block in model.blocks:
        mixer = block.mixer
        rows.append(None)
        if mixer.kind.restart:
            g = mixer.in_proj(block.mixer_norm(x)).split(mixer.sizes, dim=-1)[2]
            rows[-1] = 1 + torch.exp(g + mixer.forget_bias if mixer.kind.timespan else g)
        x = block(x)
    return rows


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint", help="of train.py, or the folder of a run")
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--layers", help="other numbers for its layers")
    parser.add_argument("--context", type=int, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=131072, help="to evaluate on [131072]")
    args = parser.parse_args()
    model = RAT.load(args.checkpoint, "cpu", args.layers, args.context)
    context = model.config.context
    data = Data(args.data, "val", context)
    if data.tokenizer != model.tokenizer:
        raise ValueError(f"{args.data} is in tokens of {data.tokenizer}, the model of {model.tokenizer}")
    windows = data.batch(0, min(len(data), max(1, args.tokens // context)))
    losses = loss_by_position(model, windows)
    print(f"loss {losses.mean():.4f}")
    for part in torch.arange(context).split(-(-context // 16)):
        print(f"positions {part[0]:>7,} to {part[-1]:>7,}: {losses[part].mean():.4f}")
    print("tokens remembered, from" + "".join(f"{2**n:>7}" for n in range(9)))
    for layer, memory in enumerate(memories(model, torch.from_numpy(windows[0][:16]))):
        if memory is not None:
            octave = (memory.log() / math.log(2)).int().clamp(0, 8)
            shares = octave.flatten().bincount(minlength=9) / octave.numel()
            print(f"layer {layer:<17}" + "".join(f"{share:>7.1%}" for share in shares.tolist()))


if __name__ == "__main__":
    run(main)
