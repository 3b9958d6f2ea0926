"""Writes text with a model that train.py has trained.

    python sample.py                                          a new document from out/ckpt.pt
    python sample.py --prompt="def " --num_samples=3          three continuations of a prompt
    python sample.py --prompt_file=draft.txt                  of a file; --prompt_file=- reads standard input
    python sample.py --ckpt=out/rat+/ckpt.pt --dilation=16    a rat+ model, with fewer keys than in training
"""

import itertools
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from bench import pick_device, pick_dtype
from prepare_data import TextStream, get_tokenizer, parse_command_line, run
from rat import RAT, BadInput, expect


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
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # of matrix products: float32, bfloat16, or auto
    compile: bool | None = None  # compile decoding: half a minute, then it is faster (on CUDA)


def main():
    values, pattern, _ = parse_command_line(Settings, dict.fromkeys(("dilation", "window", "sinks")))
    settings = Settings(**values)
    number = settings.num_samples
    expect(0 < number <= 1000, f"num_samples is {number}: it must be from 1 to 1000")
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    model = RAT.load(settings.ckpt, device, **pattern).eval()
    if device.type == "cuda" if settings.compile is None else settings.compile:
        model.step = torch.compile(model.step, dynamic=False)
    name = settings.tokenizer or model.tokenizer
    tokenizer = get_tokenizer(name) if name else TokenIds()
    theirs, ours = tokenizer.n_vocab, model.config.vocab_size
    expect(theirs <= ours, f"the tokenizer {name} has {theirs} tokens, the model {ours}: name its own")
    prompt = read_prompt(settings)
    start = [tokenizer.eot_token] if name else []  # as each text begins in training
    tokens = start + tokenizer.encode_ordinary(prompt)
    stop = tokenizer.eot_token if settings.stop else -1
    context, length = model.config.context, settings.max_new_tokens
    if length is None:
        length = context - len(tokens) if context > len(tokens) else 100
    if len(tokens) + length > context:
        print(f"note: {len(tokens) + length} tokens exceed the training context, {context}", file=sys.stderr)
    texts = [[] for _ in range(number)]
    streams = [TextStream(tokenizer) for _ in texts]

    # All texts are made side by side, one row of the batch each.
    if number > 1:
        print("--- 1")
    print(prompt, end="", flush=True)
    rows = torch.tensor([tokens] * number, device=device)
    options = (length, settings.temperature, settings.top_k, settings.top_p, settings.seed, stop)
    marks, count = [time.perf_counter()], 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for drawn in model.generate(rows, *options):
            marks.append(time.perf_counter())
            for row, token in enumerate(drawn.tolist()):
                if token != stop:
                    count += 1
                    texts[row].append(streams[row](token))
                    if row == 0:
                        print(texts[0][-1], end="", flush=True)
    # The median: the first steps take in the prompt, and compile.
    typical = statistics.median(end - start for start, end in itertools.pairwise(marks))
    for row, text in enumerate(texts[1:], start=2):
        print(f"\n--- {row}\n{prompt}{''.join(text)}", end="")
    print(flush=True)
    speed = f"typically {number / typical:,.0f} tokens/s on {device}"
    print(f"\n{count} tokens in {marks[-1] - marks[0]:.2f} s, {speed}", file=sys.stderr)


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


if __name__ == "__main__":
    run(main)
