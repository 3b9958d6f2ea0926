"""Writes text with a model that train.py has trained, or lets lm-evaluation-harness test it.

    python sample.py                                          a new document from out/ckpt.pt
    python sample.py --prompt="def " --num_samples=3          three continuations of a prompt
    python sample.py --prompt_file=draft.txt                  of a file; --prompt_file=- reads standard input
    python sample.py --ckpt=out/rat+/ckpt.pt --layers=rat+:16  a rat+ model, with fewer keys than in training
    python sample.py --tasks=piqa,arc_easy --limit=100        the first 100 questions of each of two tasks
    python sample.py --tasks=ruler --max_length=4096          needles and more, in long texts
"""

import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from difflib import get_close_matches
from types import SimpleNamespace

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on a CPU; read at torch's first tensor

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from bench import pick_device, pick_dtype, to_json
from prepare_data import BadInput, TextStream, damage_reported, expect, get_tokenizer, parse_command_line
from prepare_data import progress, read_checkpoint, run
from rat import RAT


@dataclass
class Settings:
    """Settings of sample.py"""

    ckpt: str = "out/ckpt.pt"  # the checkpoint
    tokenizer: str | None = None  # bytes, gpt2, a SentencePiece .model, ... (the checkpoint's, or token ids)
    prompt: str = ""  # text to continue; without one, a new document
    prompt_file: str | None = None  # file with the text to continue; - for standard input
    max_new_tokens: int | None = None  # tokens to write (what the prompt leaves of the context, or 100)
    num_samples: int = 1  # how many texts; the first is shown as it is made, the others after it
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model predicts; more: wilder
    top_k: int | None = None  # draw only from the k likeliest tokens
    top_p: float | None = None  # draw only from the likeliest tokens that together have probability p
    seed: int | None = None  # the same seed gives the same text
    stop: bool = True  # end a text where the model ends the document
    tasks: str | None = None  # instead of writing: tasks of lm-evaluation-harness, names or YAML files
    limit: int | None = None  # tasks: take only the first N documents of each
    num_fewshot: int | None = None  # tasks: worked examples before each question (the task's own number)
    max_length: int | None = None  # tasks: most tokens of a text, cut from the left (the training context)
    json: str | None = None  # tasks: file for the results
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # of matrix products: float32, bfloat16, or auto
    compile: bool | None = None  # compile decoding: half a minute, then it is faster (on CUDA, without tasks)


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun


def main():
    values, numbers, _ = parse_command_line(Settings, {"layers": None})
    settings = Settings(**values)
    number = settings.num_samples
    expect(0 < number <= 1000, f"num_samples is {number}: it must be from 1 to 1000")
    for name in ("prompt", "prompt_file", "max_new_tokens", "num_samples", "temperature", "top_k", "top_p"):
        unused = settings.tasks and name in values
        expect(not unused, f"--{name} has no effect on --tasks: leave it out")
    for name in ("limit", "num_fewshot", "max_length", "json"):
        value = getattr(settings, name)
        expect(settings.tasks or value is None, f"--{name} goes with --tasks: name some")
        expect(value != 0 or name == "num_fewshot", f"{name} is 0: it must be 1 or more")
    device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else None)
    dtype = pick_dtype(settings.dtype, device)
    read_checkpoint(settings.ckpt)
    with damage_reported(settings.ckpt):
        model = RAT.load(settings.ckpt, device).eval()
    model.use(**numbers)
    compiled = device.type == "cuda" and not settings.tasks if settings.compile is None else settings.compile
    if compiled:
        model.decode = torch.compile(model.decode, dynamic=False)
    name = settings.tokenizer or model.tokenizer
    tokenizer = get_tokenizer(name) if name else TokenIds()
    theirs, ours = tokenizer.n_vocab, model.config.vocab_size
    expect(theirs <= ours, f"the tokenizer {name} has {theirs} tokens, the model {ours}: name its own")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if settings.tasks is None:
            write(settings, model, tokenizer)
        else:
            expect(name, "--tasks are texts, and this checkpoint names no tokenizer: give --tokenizer")
            run_tasks(settings, model, tokenizer)


# --- Writing --------------------------------------------------------------------------------------
def write(settings, model, tokenizer):
    """Prints the texts, the first as it is made. All are made side by side, one row of the batch each."""
    prompt, number = read_prompt(settings), settings.num_samples
    start = [tokenizer.eot_token] if tokenizer.n_vocab else []  # as each text begins in training
    tokens = start + tokenizer.encode_ordinary(prompt)
    context, length = model.config.context, settings.max_new_tokens
    if length is None:
        length = context - len(tokens) if context > len(tokens) else 100
    if len(tokens) + length > context:
        print(f"note: {len(tokens) + length} tokens exceed the training context, {context}", file=sys.stderr)
    if number > 1:
        print("--- 1")
    print(prompt, end="", flush=True)
    rows = torch.tensor([tokens] * number, device=model.embedding.weight.device)
    options = (length, settings.temperature, settings.top_k, settings.top_p, settings.seed)
    stop = tokenizer.eot_token if settings.stop else -1
    texts, marks, count = [[] for _ in rows], [time.perf_counter()], 0
    for pieces in generate_text(model, tokenizer, rows, *options, stop):
        marks.append(time.perf_counter())
        for text, piece in zip(texts, pieces):
            if piece is not None:
                count += 1
                text.append(piece)
        print(pieces[0] or "", end="", flush=True)
    # The median: the first steps take in the prompt, and compile.
    typical = statistics.median(end - start for start, end in itertools.pairwise(marks))
    for row, text in enumerate(texts[1:], start=2):
        print(f"\n--- {row}\n{prompt}{''.join(text)}", end="")
    print(flush=True)
    speed = f"typically {number / typical:,.0f} tokens/s on {rows.device}"
    print(f"\n{count} tokens in {marks[-1] - marks[0]:.2f} s, {speed}", file=sys.stderr)


def generate_text(model, tokenizer, prompts, *options):
    """`RAT.generate`, in text: yields what each row gains with each token; None once it has stopped."""
    streams, stop = [TextStream(tokenizer) for _ in prompts], options[-1]
    for drawn in model.generate(prompts, *options):
        yield [None if token == stop else stream(token) for stream, token in zip(streams, drawn.tolist())]


class TokenIds:
    """Stands in for a tokenizer that is not at hand: ids go in and come out."""

    eot_token, n_vocab = -1, 0

    def encode_ordinary(self, text):
        words = text.split()
        known = all(map(str.isdecimal, words))
        expect(known, f"the prompt is {text[:40]!r}: without --tokenizer it must be token ids, as 1 450 4996")
        return list(map(int, words))

    def decode_single_token_bytes(self, token):
        return f" {token}".encode()


def read_prompt(settings):
    if settings.prompt_file is None:
        return settings.prompt
    expect(not settings.prompt, "both --prompt and --prompt_file are given: leave one out")
    try:
        if settings.prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open(settings.prompt_file, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise BadInput(f"{settings.prompt_file} is not UTF-8 text: convert it ({error})") from error


# --- Tasks of lm-evaluation-harness ---------------------------------------------------------------
BATCH = 32768  # tokens in a batch, such as 8 texts of 4096
STEP = 64  # a decoding step takes as long as so many tokens of a prompt: 23 to 80 on a CPU, by kind and width
OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # of generation


class Harness:
    """A model as lm-evaluation-harness asks it: its class LM (Gao et al., github.com/EleutherAI).

    The `args` of a request are texts. Each begins with <|endoftext|>, as in training, and is cut from the
    left where it has more than max_length tokens; `cut` counts those.
    """

    rank, world_size = 0, 1  # the harness sees one process: `in_turns` divides the work among torchrun's

    def __init__(self, model, tokenizer, max_length, seed=None):
        self.model, self.tokenizer, self.max_length, self.seed = model, tokenizer, max_length, seed
        self.cut, self.ignored = 0, set()

    def encode(self, text):
        return np.array([self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(text)], np.uint16)

    def loglikelihood(self, requests):
        """args: (context, continuation). Returns (log-probability, is it the likeliest?) of each."""
        texts = []
        for context, continuation in (request.args for request in requests):
            tokens = self.encode(context + continuation)
            self.cut += len(tokens) - 1 > self.max_length
            # A word's token includes the blank before it, so trailing blanks go to the continuation.
            texts.append((tokens, len(self.encode(context.rstrip()))))
        return self.score(texts)

    def loglikelihood_rolling(self, requests):
        """args: (text,). Returns the log-probability of each, of a long one window by window."""
        return [nats for nats, _ in self.score([(self.encode(*request.args), 1) for request in requests])]

    def score(self, texts):
        """(log-probability of tokens[first:], is each the likeliest?) of each text (tokens, first)."""
        L, contexts, groups = self.max_length, {}, {}
        for n, (tokens, first) in enumerate(texts):
            for start in range(first, len(tokens), L):
                targets = tokens[start : start + L]
                context = tokens[max(0, start + len(targets) - 1 - L) : start]
                contexts.setdefault(context.tobytes(), []).append((n, context, targets))
        for context, rows in contexts.items():
            length, longest = len(rows[0][1]), max(len(targets) for _, _, targets in rows)
            shared = len(rows) > 1 and length > STEP * longest  # read once, then step by step
            groups.setdefault(context if shared else b"", []).extend(rows)
        jobs = [(batch, bool(context)) for context, rows in groups.items() for batch in batches(rows)]
        sums = [(0.0, True)] * len(texts)
        for n, nats, right in in_turns(jobs, self.read):
            sums[n] = sums[n][0] + nats, sums[n][1] and right
        return sums

    def read(self, rows, shared):
        numbers, contexts, targets = zip(*rows)
        scores = log_probabilities(self.model, contexts[:1] if shared else contexts, targets)
        return [(n, nats.sum().item(), right.all().item()) for n, (nats, right) in zip(numbers, scores)]

    def generate_until(self, requests):
        """args: (context, options). Returns the text that follows each, up to its first stop string."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups, jobs = {}, []  # prompts of one length go together, if their options are the same
        for n, (context, options) in enumerate(request.args for request in requests):
            options, tokens = normalize_gen_kwargs(options), self.encode(context)
            room = self.max_length - options["max_gen_toks"]
            wanted = f"a task writes {options['max_gen_toks']} tokens after its prompt"
            expect(room > 0, f"max_length is {self.max_length}, and {wanted}: give more")
            self.cut += len(tokens) > room
            self.ignored |= options.keys() - OPTIONS
            key = min(len(tokens), room), json.dumps(options)
            groups.setdefault(key, (options, []))[1].append((n, tokens[-room:]))
        for options, rows in groups.values():  # a cache has room for 256 tokens or more
            jobs += [(batch, options) for batch in batches(rows, max(256, options["max_gen_toks"]))]
        answers = dict(in_turns(jobs, self.write))
        return [answers[n] for n in range(len(requests))]

    def write(self, rows, options):
        numbers, prompts = zip(*rows)
        stops, texts = list(filter(None, options["until"])), [""] * len(rows)
        prompts = torch.from_numpy(np.stack(prompts).astype(np.int64)).to(self.model.embedding.weight.device)
        sampling = options.get("temperature", 0), options.get("top_k"), options.get("top_p")
        seed = None if self.seed is None else self.seed + numbers[0]
        given = prompts, options["max_gen_toks"], *sampling, seed, self.tokenizer.eot_token
        for pieces in generate_text(self.model, self.tokenizer, *given):
            texts = [text + (piece or "") for text, piece in zip(texts, pieces)]
            if all(piece is None or any(s in text for s in stops) for text, piece in zip(texts, pieces)):
                break
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return zip(numbers, texts)


@torch.no_grad()
def log_probabilities(model, contexts, targets):
    """The log-probability of each target, and whether it is the likeliest token: two tensors for each row.

    contexts, targets: arrays of tokens, which follow each other. If all rows share the one context given, it
    is read once, and the targets go through the cache.
    """
    device, inputs = model.embedding.weight.device, [row[:-1] for row in targets]

    def tensor(tokens):
        return torch.from_numpy(tokens.astype(np.int64)).to(device)

    def pad(rows):
        return pad_sequence(list(map(tensor, rows)), batch_first=True)

    if len(contexts) < len(targets):
        inputs, starts = pad(inputs), [0] * len(targets)
        cache = model.cache(len(targets), len(contexts[0]) + inputs.shape[1])
        x = model.features(pad(contexts), cache)[:, -1:]  # one row of tokens fills all rows of the cache
        x = x.expand(len(targets), -1, -1)
        if inputs.numel():
            x = torch.cat([x, model.features(inputs, cache)], dim=1)
    else:
        x = model.features(pad(map(np.concatenate, zip(contexts, inputs))))
        starts = [len(context) - 1 for context in contexts]
    sizes, nats, right = [len(row) for row in targets], [], []
    x = torch.cat([x[n, start : start + sizes[n]] for n, start in enumerate(starts)])
    y = tensor(np.concatenate(targets))
    for features, wanted in zip(x.split(RAT.LOSS_CHUNK), y.split(RAT.LOSS_CHUNK)):
        logits = model.head(features).float()
        nats.append(-cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return zip(*(torch.cat(parts).cpu().split(sizes) for parts in (nats, right)))


def batches(rows, more=0):
    """Rows (number, tokens, perhaps more tokens) in batches of at most BATCH tokens, padding included."""

    def length(row):
        return sum(map(len, row[1:])) + more

    rows = sorted(rows, key=length, reverse=True)
    while rows:
        size = max(1, BATCH // length(rows[0]))
        yield rows[:size]
        rows = rows[size:]


def in_turns(jobs, answer):
    """The answers to all jobs, a list from each; torchrun's processes take turns. Shows the time left."""
    mine, answers, start = jobs[RANK::WORLD], [], time.perf_counter()
    for done, job in enumerate(mine, 1):
        answers += answer(*job)
        left = timedelta(seconds=round((time.perf_counter() - start) / done * (len(mine) - done)))
        if RANK == 0:
            progress(f"{done} of {len(mine)} batches, {left} left", last=done == len(mine), every=1)
    parts = [answers] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, answers)
    return list(itertools.chain(*parts))


def run_tasks(settings, model, tokenizer):
    """Prints the harness's table of results, and with --json writes them to a file."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        remedy = "pip install 'lm-eval>=0.4.13'"
        raise BadInput(f"--tasks needs lm-evaluation-harness: {remedy} ({error})") from error
    context, length = model.config.context, settings.max_length or model.config.context
    if RANK == 0 and length > context:
        print(f"note: max_length {length} exceeds the training context, {context}", file=sys.stderr)
    names, manager = settings.tasks.split(","), TaskManager()
    for name in names:
        if name not in manager.all_tasks and not os.path.isfile(name):
            close = get_close_matches(name, manager.all_tasks, n=1)
            remedy = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists all"
            raise BadInput(f"there is no task {name!r}: {remedy}")
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the processes meet at the end of a task
    LM.register(Harness)
    harness = Harness(model, tokenizer, length, settings.seed)
    with contextlib.suppress(ImportError):  # if the packages for it are installed
        from lm_eval.tasks.ruler import common_utils

        def count(text):  # RULER fills its texts up to a number of tokens: ours, not a Hugging Face model's
            return SimpleNamespace(input_ids=harness.encode(text))

        common_utils.get_tokenizer = lambda *_: count
        common_utils.DEFAULT_SEQ_LENGTHS[:] = [length]
    options = dict(num_fewshot=settings.num_fewshot, limit=settings.limit, log_samples=False)
    options |= dict(task_manager=manager, bootstrap_iters=100_000 if RANK == 0 else 0)
    with to_json(settings.json if RANK == 0 else None) as figures:
        try:
            results = simple_evaluate(harness, tasks=names, **options)
        except ImportError as error:
            raise BadInput(f"{settings.tasks} needs more packages: {error}") from error
        if RANK == 0:
            figures |= {"settings": asdict(settings), "model": asdict(model.config), "texts_cut": harness.cut}
            figures |= {name: results.get(name) for name in ("results", "groups", "versions", "n-shot")}
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if harness.cut:
        print(f"{harness.cut:,} texts were longer than --max_length={length}: cut from the left")
    if harness.ignored:
        print(f"ignored options of tasks: {', '.join(sorted(harness.ignored))}")


if __name__ == "__main__":
    run(main)
