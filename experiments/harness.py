"""How does a model do on downstream tasks? Minutes to hours, as EleutherAI's lm-evaluation-harness asks them.

    pip install transformers "lm-eval[ruler,longbench]"
    python experiments/harness.py out/rat-200m --tasks=piqa,hellaswag,lambada_openai --limit=0.1
    python experiments/harness.py out/rat-200m --tasks=ruler --max_length=4096 --json=ruler.json

Each text begins with <|endoftext|>, as in training; one longer than --max_length, by default the training
context, loses its beginning. --limit below 1 is a fraction of a task.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import get_tokenizer, run
from rat import RAT

BATCH = 32768  # tokens in a batch, padding included


class Harness:
    """What lm-evaluation-harness calls an LM. Its requests have `args`, texts and options."""

    rank, world_size = 0, 1

    def __init__(self, model, tokenizer, max_length):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def encode(self, text):
        return [self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(text)]

    def encode_pair(self, context, continuation):
        """All tokens, and the number of the first one that is scored: there always is one."""
        before, tokens = self.encode(context.rstrip()), self.encode(context + continuation)
        if len(tokens) <= len(before):  # where they merge, such as "19" and "84", the second stands alone
            tokens = before + (self.encode(continuation)[1:] or [self.tokenizer.eot_token])
        return tokens, len(before)  # a word's token includes the blank before it, hence rstrip

    def loglikelihood(self, requests):
        """args: (context, continuation). Returns (log-probability, is it the likeliest?) of each."""
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests):
        """args: (text,). Returns the log-probability of each."""
        return [nats for nats, _ in self.score([(self.encode(*request.args), 1) for request in requests])]

    def score(self, texts):
        rows, L = [], self.max_length
        for n, (tokens, first) in enumerate(texts):
            for start in range(first, len(tokens), L):
                end = min(start + L, len(tokens))
                rows.append((n, tokens[max(0, end - 1 - L) : end], end - start))
        rows.sort(key=lambda row: len(row[1]))  # alike, for little padding
        size, sums = max(1, BATCH // L), [(0.0, True)] * len(texts)
        for batch in (rows[start : start + size] for start in range(0, len(rows), size)):
            for n, nats, likeliest in self.score_batch(batch):
                sums[n] = sums[n][0] + nats, sums[n][1] and likeliest
        return sums

    @torch.no_grad()
    def score_batch(self, rows):
        """rows: (number, tokens, how many of the last ones to score)."""
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row[1]) for row in rows], batch_first=True)
        x = self.model.features(padded[:, :-1].to(self.model.embedding.weight.device))
        for (n, tokens, count), features in zip(rows, x):
            last = slice(len(tokens) - 1 - count, len(tokens) - 1)
            logits, targets = self.model.head(features[last]).float().cpu(), torch.tensor(tokens[-count:])
            likeliest = (logits.argmax(-1) == targets).all().item()
            yield n, -F.cross_entropy(logits, targets, reduction="sum").item(), likeliest

    def generate_until(self, requests):
        """args: (context, options). Returns the text that follows each, up to its first stop string."""
        return [self.write(*request.args, seed) for seed, request in enumerate(requests)]

    def write(self, context, options, seed):
        from lm_eval.models.utils import normalize_gen_kwargs

        options = normalize_gen_kwargs(options)
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise ValueError(f"--max_length={self.max_length} leaves no room for a prompt: raise it")
        prompt = torch.tensor([self.encode(context)[-room:]], device=self.model.embedding.weight.device)
        top_k = max(0, options.get("top_k") or 0) or None  # 0 and -1: off, as in Hugging Face's generation
        sampling = options.get("temperature", 0), top_k, options.get("top_p"), seed
        stops, tokens, text = [*filter(None, options["until"])], [], ""
        for token in self.model.generate(prompt, options["max_gen_toks"], *sampling):
            if token == self.tokenizer.eot_token or any(stop in text for stop in stops):
                break
            tokens.append(token.item())
            text = self.tokenizer.decode(tokens, errors="ignore")
        for stop in stops:
            text = text.split(stop)[0]
        return text


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint")
    kinds = dict(tasks=str, layers=str, limit=float, num_fewshot=int, max_length=int, json=str)
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind, required=name == "tasks")
    args = parser.parse_args()
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.utils import make_table

    model = RAT.load(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu", args.layers)
    LM.register(Harness)
    harness = Harness(model, get_tokenizer(model.tokenizer), args.max_length or model.config.context)
    with contextlib.suppress(ImportError):  # RULER fills its texts up to a number of tokens: ours
        from lm_eval.tasks.ruler import common_utils

        common_utils.get_tokenizer = lambda *_: lambda text: SimpleNamespace(input_ids=harness.encode(text))
        common_utils.DEFAULT_SEQ_LENGTHS[:] = [harness.max_length]
    options = dict(limit=args.limit, num_fewshot=args.num_fewshot)
    results = simple_evaluate(harness, tasks=args.tasks.split(","), **options)
    print(make_table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results["results"], indent=1, default=str))


if __name__ == "__main__":
    run(main)
