"""Writes text with a model that train.py has trained.

    python sample.py                                          a new document from out/ckpt.pt
    python sample.py --prompt="def " --num_samples=3          three continuations of a prompt
    python sample.py --prompt_file=draft.txt                  of a file; --prompt_file=- reads standard input
    python sample.py --ckpt=out/rat+/ckpt.pt --dilation=16    a model of rat+ layers, with fewer keys than it was trained with
"""

import sys
import time
from dataclasses import dataclass

import torch

from prepare_data import TextStream, get_tokenizer, parse_command_line, run
from rat import RAT, Config, expect
from train import pick_device, pick_dtype


@dataclass
class Settings:
    """Settings of sample.py"""

    ckpt: str = "out/ckpt.pt"  # the checkpoint
    tokenizer: str | None = None  # bytes, gpt2, ..., or a SentencePiece file, x.model (the checkpoint's; without any: token ids)
    prompt: str = ""  # text to continue; without one, a new document. Token ids, if there is no tokenizer
    prompt_file: str | None = None  # file with the text to continue; - for standard input
    max_new_tokens: int | None = None  # tokens to write (what the prompt leaves of the context trained on, or 100)
    num_samples: int = 1  # how many texts; the first is shown as it is made, the others after it
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model predicts; more: wilder
    top_k: int | None = None  # draw only from the k likeliest tokens
    top_p: float | None = None  # draw only from the likeliest tokens that together have probability p
    seed: int | None = None  # the same seed gives the same text
    stop: bool = True  # end a text where the model ends the document
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # of matrix products: float32, bfloat16, or auto


def main():
    values, model_values = parse_command_line(Settings, Config, hidden=("vocab_size", "n_layer", "d_model", "layers"))
    settings = Settings(**values)
    expect(settings.num_samples >= 1, f"num_samples is {settings.num_samples}: it must be 1 or more")
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    model = RAT.load(settings.ckpt, device, **model_values).eval()
    name = settings.tokenizer or model.tokenizer
    tokenizer = get_tokenizer(name) if name else TokenIds()
    if name:
        fits = tokenizer.n_vocab <= model.config.vocab_size
        expect(fits, f"the tokenizer {name} has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}: name the model's own")
    prompt = read_prompt(settings)
    start = [tokenizer.eot_token] if name else []  # as each text begins in training
    tokens = start + tokenizer.encode_ordinary(prompt)
    stop = tokenizer.eot_token if settings.stop else -1
    context = model.config.context
    length = settings.max_new_tokens
    if length is None:
        length = context - len(tokens) if context > len(tokens) else 100
    if len(tokens) + length > context:
        print(f"note: {len(tokens) + length} tokens are more than the {context} that this model was trained on at a time", file=sys.stderr)
    texts = [[] for _ in range(settings.num_samples)]
    streams = [TextStream(tokenizer) if name else lambda token: f" {token}" for _ in texts]

    # All texts are made side by side, one row of the batch each.
    if settings.num_samples > 1:
        print("--- 1")
    print(prompt, end="", flush=True)
    rows = torch.tensor([tokens] * settings.num_samples, device=device)
    options = (length, settings.temperature, settings.top_k, settings.top_p, settings.seed, stop)
    start, count = time.perf_counter(), 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for drawn in model.generate(rows, *options):
            for row, token in enumerate(drawn.tolist()):
                if token != stop:
                    count += 1
                    text = streams[row](token)
                    texts[row].append(text)
                    if row == 0:
                        print(text, end="", flush=True)
    seconds = time.perf_counter() - start
    for row, text in enumerate(texts[1:], start=2):
        print(f"\n--- {row}\n{prompt}{''.join(text)}", end="")
    print(flush=True)
    print(f"\n{count} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens per second on {device}", file=sys.stderr)


class TokenIds:
    """In place of a tokenizer that is not at hand: ids go in and come out."""

    eot_token = -1

    def encode_ordinary(self, text):
        words = text.split()
        known = all(map(str.isdecimal, words))
        expect(known, f"the prompt is {text[:40]!r}: without the model's tokenizer it must be token ids, as 1 450 4996; or give --tokenizer")
        return list(map(int, words))


def read_prompt(settings):
    if settings.prompt_file is None:
        return settings.prompt
    expect(not settings.prompt, "both --prompt and --prompt_file are given: leave one out")
    try:
        if settings.prompt_file == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open(settings.prompt_file, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {settings.prompt_file} to read a prompt from") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt in {settings.prompt_file} is not UTF-8 text: convert it ({error})") from error


if __name__ == "__main__":
    run(main)
