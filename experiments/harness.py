"""How does a model do on downstream tasks? Minutes to hours, as EleutherAI's lm-evaluation-harness asks them.

    pip install transformers "lm-eval[ruler,longbench]"
    python experiments/harness.py out/rat-200m --tasks=piqa,hellaswag,lambada_openai --limit=0.1
    python experiments/harness.py out/rat-200m --tasks=ruler --max_length=4096 --json=ruler.json
    torchrun --standalone --nproc_per_node=8 experiments/harness.py out/rat-200m --tasks=longbench

Each text begins with <|endoftext|>, as in training; one longer than --max_length loses its beginning.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import TextStream, get_tokenizer, run
from rat import RAT

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
BATCH = 32768  # tokens in a batch, padding included


class Harness:
    """What lm-evaluation-harness calls an LM. Its requests have `args`, texts and options."""

    rank, world_size = 0, 1  # it sees one process: `in_turns` divides the work among torchrun's

    def __init__(self, model, tokenizer, max_length):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def encode(self, text):
        return [self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(text)]

    def encode_pair(self, context, continuation):
        """All tokens, and the number of the first one that is scored: there always is one."""
        blank = context[len(context.rstrip()) :]  # a word's token includes the blank before it
        context, continuation = context.rstrip(), blank + continuation
        before, tokens = self.encode(context), self.encode(context + continuation)
        if len(tokens) <= len(before):  # where they merge, such as "19" and "84", the second stands alone
            tokens = before + (self.encode(continuation)[1:] or [self.tokenizer.eot_token])
        return tokens, len(before)

    def loglikelihood(self, requests):
        """args: (context, continuation). Returns (log-probability, is it the likeliest?) of each."""
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests):
        """args: (text,). Returns the log-probability of each, of a long one window by window."""
        return [nats for nats, _ in self.score([(self.encode(*request.args), 1) for request in requests])]

    def score(self, texts):
        rows, L = [], self.max_length
        for n, (tokens, first) in enumerate(texts):
            for start in range(first, len(tokens), L):
                end = min(start + L, len(tokens))
                rows.append((n, tokens[max(0, end - 1 - L) : end], end - start))
        sums = [(0.0, True)] * len(texts)
        for n, nats, likeliest in in_turns(batches(rows), self.score_batch):
            sums[n] = sums[n][0] + nats, sums[n][1] and likeliest
        return sums

    @torch.no_grad()
    def score_batch(self, rows):
        """rows: (number, tokens, how many of the last ones to score)."""
        longest = max(len(tokens) for _, tokens, _ in rows)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for _, tokens, _ in rows])
        x = self.model.features(padded[:, :-1].to(self.model.embedding.weight.device))
        for (n, tokens, count), features in zip(rows, x):
            last = slice(len(tokens) - 1 - count, len(tokens) - 1)
            logits, targets = self.model.head(features[last]).float().cpu(), torch.tensor(tokens[-count:])
            likeliest = (logits.argmax(-1) == targets).all().item()
            yield n, -F.cross_entropy(logits, targets, reduction="sum").item(), likeliest

    def generate_until(self, requests):
        """args: (context, options). Returns the text that follows each, up to its first stop string."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups = {}  # prompts of one length go together, if their options are the same
        for n, (context, options) in enumerate(request.args for request in requests):
            options = normalize_gen_kwargs(options)
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(f"--max_length={self.max_length} leaves no room for a prompt: raise it")
            tokens = self.encode(context)[-room:]
            groups.setdefault((len(tokens), json.dumps(options)), []).append((n, tokens, 0))
        jobs = [(options, rows) for (_, options), group in groups.items() for rows in batches(group)]
        answers = dict(in_turns(jobs, lambda job: self.write(json.loads(job[0]), job[1])))
        return [answers[n] for n in range(len(requests))]

    def write(self, options, rows):
        numbers, prompts, _ = zip(*rows)
        streams, texts = [TextStream(self.tokenizer) for _ in rows], [""] * len(rows)
        top_k, end = options.get("top_k"), self.tokenizer.eot_token
        top_k = top_k if top_k and top_k > 0 else None  # 0 and -1: off, as in Hugging Face's generation
        sampling = options.get("temperature", 0), top_k, options.get("top_p"), numbers[0], end
        prompts = torch.tensor(prompts, device=self.model.embedding.weight.device)
        for drawn in self.model.generate(prompts, options["max_gen_toks"], *sampling):
            for n, token in enumerate(drawn.tolist()):
                texts[n] += streams[n](token) if token != end else ""
        for stop in filter(None, options["until"]):
            texts = [text.split(stop)[0] for text in texts]
        return zip(numbers, texts)


def batches(rows):
    """Rows (number, tokens, any) of similar length in batches of at most BATCH tokens."""
    rows = sorted(rows, key=lambda row: len(row[1]), reverse=True)
    while rows:
        size = max(1, BATCH // len(rows[0][1]))
        yield rows[:size]
        rows = rows[size:]


def in_turns(jobs, answer):
    """The answers to all jobs, an iterable from each; torchrun's processes take turns."""
    mine = [list(answer(job)) for job in itertools.islice(jobs, RANK, None, WORLD)]
    parts = [mine] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, mine)
    return itertools.chain.from_iterable(itertools.chain(*parts))


def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--tasks", required=True, help="names, or YAML files")
    parser.add_argument("--layers", help="other numbers for the layers, such as rat+:16:256:4")
    parser.add_argument("--limit", type=float, help="questions of each task; below 1 a fraction")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--max_length", type=int, help="tokens [the training context]")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.utils import make_table

    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    if WORLD > 1:
        dist.init_process_group("gloo")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = RAT.load(args.checkpoint, device, args.layers)
    LM.register(Harness)
    harness = Harness(model, get_tokenizer(model.tokenizer), args.max_length or model.config.context)
    with contextlib.suppress(ImportError):  # RULER fills its texts up to a number of tokens: ours
        from lm_eval.tasks.ruler import common_utils

        common_utils.get_tokenizer = lambda *_: lambda text: SimpleNamespace(input_ids=harness.encode(text))
        common_utils.DEFAULT_SEQ_LENGTHS[:] = [harness.max_length]
    results = simple_evaluate(harness, tasks=args.tasks.split(","), limit=args.limit, num_fewshot=args.num_fewshot)
    if RANK == 0:
        print(make_table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results["results"], indent=1, default=str))


if __name__ == "__main__":
    run(main)
