"""How well does a model learn to answer prompts? A minute for some thousand short prompts on two cores.

    python experiments/finetune.py --data=questions.jsonl --init_from=out --out=out/tuned

Each line of the file has a "prompt" and an "answer". A window is one of them, cut from the left if it is
longer than the context; only the answer and the <|endoftext|> after it are learned. Every 20th line is for
validation. All flags of train.py work, too; the defaults are the papers': lr 1e-5, weight decay 0.01.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
import train
from experiments.memory import Documents
from prepare_data import get_tokenizer, run
from rat import RAT

FLAGS = {"lr": "1e-5", "weight_decay": "0.01", "joint": "none", "sample_tokens": "0"}


class Answers(Documents):
    """Lines of prompts and answers in place of prepare_data.Data."""

    draw = None

    def __init__(self, path, split, context, seed, tokenizer_name):
        tokenizer = get_tokenizer(tokenizer_name)
        self.tokenizer, self.vocab_size, self.end = tokenizer_name, tokenizer.n_vocab, tokenizer.eot_token
        self.context, self.seed, self.rows = context, seed, []
        for n, line in enumerate(open(path, encoding="utf-8")):
            if (n % 20 == 1) == (split == "val"):
                line = json.loads(line)
                prompt, answer = (tokenizer.encode_ordinary(line[name]) for name in ("prompt", "answer"))
                self.rows.append(([self.end, *prompt], [*answer, self.end]))
        if not self.rows:
            raise ValueError(f"{path} has too few lines: none are left for {split}")

    def __len__(self):
        return len(self.rows)

    def batch(self, step, size):
        tokens = np.full((size, self.context + 1), self.end)
        targets = np.full((size, self.context), -100)
        for row in range(size):
            epoch, n = divmod(step * size + row, len(self.rows))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            prompt, answer = self.rows[order[n]]
            text = [*prompt, *answer][-self.context - 1 :]
            tokens[row, : len(text)] = text
            start = max(0, len(text) - len(answer) - 1)
            targets[row, start : len(text) - 1] = text[start + 1 :]
        return tokens[:, :-1], targets


def main():
    words = sys.argv[1:]
    given = dict(word.partition("=")[::2] for word in words)
    if "--data" not in given or not given.keys() & {"--init_from", "--resume"}:
        raise ValueError("give --data=FILE.jsonl and --init_from=CHECKPOINT")
    if "--resume" not in given:
        words += [f"--{name}={value}" for name, value in FLAGS.items() if f"--{name}" not in given]
    source = given.get("--init_from") or given.get("--out", "out")
    name = RAT.load(source).tokenizer
    train.main(words, lambda *place: Answers(*place, name))


if __name__ == "__main__":
    run(main)
