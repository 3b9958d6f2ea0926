"""Which layers recall, copy and find what they have read? A minute a model on two cores; needles six.

    python experiments/memory.py recall --layers=rat:4 --out=out/recall/rat:4
    python experiments/memory.py recall --pairs 12 --init_from=out/recall/rat:4 --eval_only
    python experiments/memory.py needle --init_from=out/default/rat --out=out/needle/rat

A window is a document, drawn on the fly; only answers are targets. All flags of train.py work, too.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import train
from prepare_data import Data, run

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NEEDLES = {"single": (1, 1, 1), "multi-key": (4, 1, 1), "multi-value": (1, 4, 1), "multi-query": (4, 1, 4)}
FLAGS = {  # for train.py, where the command line has no others
    "recall": dict(n_layer=2, n_head=2, d_model=64, context=96, batch_tokens=6144, steps=700, data="recall"),
    "copy": dict(n_layer=2, n_head=2, d_model=64, context=25, batch_tokens=1600, steps=1000, data="copy"),
    "needle": dict(context=128, batch_tokens=8192, steps=1000),
}


def recall(draw, args):
    """Facts among dots, a key and its digit each, then questions. (Arora et al. 2023, arXiv 2312.04927)"""
    half = args.context // 2
    facts = [key + draw.choice("01234567") for key in draw.sample(LETTERS, draw.choice(args.pairs))]
    text = facts + ["."] * (half - 2 * len(facts))
    draw.shuffle(text)
    if draw.random() < args.packed:
        before = draw.randrange(0, half - 2 * len(facts) + 1, 16)
        text = ("." * before + "".join(facts)).ljust(half, ".")
    yield "".join(text), False
    for key, digit in draw.choices(facts, k=half // 2):
        yield from [(key, False), (digit, True)]


def copy(draw, args):
    """Random letters, a bar, the same letters again: 12 for a context of 25."""
    text = "".join(draw.choices(LETTERS, k=(args.context - 1) // 2))
    yield from [(text + "|", False), (text, True)]


def needle(draw, args):
    """Lines such as "k: 41." hidden in a text, then questions such as "k:". (RULER, arXiv 2404.06654)"""
    keys, n_values, n_asked = NEEDLES[draw.choice(args.needles)]  # keys, values of each, keys asked for
    facts = [(k, [f"{draw.randrange(100):02}" for _ in range(n_values)]) for k in draw.sample(LETTERS, keys)]
    hidden = [f"\n{key}: {value}.\n" for key, values in facts for value in values]
    asked = draw.sample(facts, n_asked)
    end = [part for key, v in asked for part in ((f"\n{key}:", False), (f" {', '.join(v)}.", True))]
    room = args.context - len("".join(hidden)) - sum(len(text) for text, _ in end)
    first = draw.randrange(len(args.haystack) - room)
    places = sorted(draw.randrange(room + 1) for _ in hidden)
    for start, stop, fact in zip([0, *places], [*places, room], [*hidden, ""]):
        yield args.haystack[first + start : first + stop] + fact, False
    yield from end


class Documents:
    """In place of prepare_data.Data. A task makes a document: (text, is it an answer?), ..."""

    tokenizer, vocab_size = "bytes", 257

    def __init__(self, args, folder, split, context, seed):
        self.draw, self.seed = globals()[args.task], f"{split} {seed}"
        self.args, args.context = args, context
        if args.task == "needle":
            data = Data(folder, "train", context)
            if data.tokenizer != "bytes":
                raise ValueError(f"needles are hidden in bytes: {folder} is in tokens of {data.tokenizer}")
            args.haystack = data.shards[0].astype(np.uint8).tobytes().decode("latin-1")

    def __len__(self):
        return 1 << 31

    def batch(self, step, size):
        """Inputs and targets (size, context); what is no answer has the target -100."""
        tokens = np.full((size, self.args.context + 1), 256)  # <|endoftext|>, to begin with and as padding
        answers = np.zeros(tokens.shape, dtype=bool)
        for row in range(size):
            end = 1
            for text, answer in self.draw(random.Random(f"{self.seed} {step * size + row}"), self.args):
                tokens[row, end : end + len(text)] = list(text.encode("latin-1"))
                answers[row, end : end + len(text)] = answer
                end += len(text)
        return tokens[:, :-1], np.where(answers, tokens, -100)[:, 1:]

    @torch.no_grad()
    def scores(self, model):
        """Shares of answer tokens right, of documents all right, and the latter by a needle's depth."""
        inputs, targets = self.batch(0, 512)
        right = targets < 0
        for x, y, hits in zip(*(np.array_split(part, 32) for part in (inputs, targets, right))):
            features = model.features(torch.from_numpy(x).to(model.embedding.weight.device))[y >= 0]
            hits[y >= 0] = model.head(features).argmax(-1).cpu().numpy() == y[y >= 0]
        whole = right.all(1)
        result = {"accuracy": right[targets >= 0].mean(), "whole": whole.mean()}
        if self.draw is needle:
            pairs = [(bytes(row[1:].tolist()), bytes(y[y >= 0].tolist())) for row, y in zip(inputs, targets)]
            third = np.array([3 * text.find(answer + b"\n") // len(text) for text, answer in pairs])
            for n in set(third) - {-1}:
                result[("first_third", "middle_third", "last_third")[n]] = whole[third == n].mean()
        return result


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("task", choices=FLAGS)
    parser.add_argument("--pairs", type=int, nargs="+", default=[8], help="recall: facts in a document")
    parser.add_argument("--packed", type=float, default=0.0, help="recall: share with facts side by side")
    parser.add_argument("--needles", nargs="+", default=["single"], choices=NEEDLES)
    args, words = parser.parse_known_args()
    flags = dict(joint="none", lr=3e-3, eval_every=100, eval_tokens=32768, sample_tokens=0) | FLAGS[args.task]
    given = [word.partition("=")[0] for word in words]
    if "--init_from" in given:
        given += ["--n_layer", "--n_head", "--d_model"]
    if "--resume" not in given:
        words += [f"--{name}={value}" for name, value in flags.items() if f"--{name}" not in given]
    train.main(words, lambda *place: Documents(args, *place))


if __name__ == "__main__":
    run(main)
