"""Writes text with a model that train.py has trained.

    python sample.py                                        a new document from out/ckpt.pt
    python sample.py --prompt="def " --num_samples=3        three continuations of a prompt
    python sample.py --prompt_file=draft.txt                of a file; --prompt_file=- reads standard input
    python sample.py --ckpt=out/rat+ --layers=rat+:16       a rat+ model, with fewer keys than in training
"""

import argparse
import codecs
import os
import statistics
import sys
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU up to 1.6 times the speed

import torch

from prepare_data import get_tokenizer, parse, run
from rat import RAT


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.usage = "sample.py --name=value ..."
    add = parser.add_argument
    add("--ckpt", default="out", help="the checkpoint, or the folder of a run [out]")
    add("--layers", help="other numbers for its layers, such as rat+:16:256:4")
    add("--prompt", default="", help="text to continue [none: a new document]")
    add("--prompt_file", help="file with the text to continue; - for standard input")
    add("--num_samples", type=int, default=1, help="how many texts; the first is shown as it is made [1]")
    add("--max_new_tokens", type=int, help="tokens to write [what the prompt leaves of the context, or 100]")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; 1: as predicted [0.8]")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens only; 0: from all [0]")
    add("--top_p", type=float, default=1.0, help="... from the likeliest that together reach p [1]")
    add("--seed", type=int, help="the same seed gives the same text")
    add("--stop", choices=("true", "false"), default="true", help="end where the document does")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps [the best there is]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products [float32]")
    add("--compile", choices=("true", "false"), help="slow start, then faster [true on CUDA]")
    args = parse(parser, {"--start": "--prompt", "--out_dir": "--ckpt"})
    if int(os.environ.get("RANK", 0)) > 0:
        return  # of torchrun's processes, the first one writes
    if args.prompt_file:
        with sys.stdin if args.prompt_file == "-" else open(args.prompt_file, encoding="utf-8") as file:
            args.prompt += file.read()

    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    model = RAT.load(args.ckpt, device, args.layers).eval()
    if not model.tokenizer:
        raise ValueError(f"{args.ckpt} names no tokenizer")
    tokenizer = get_tokenizer(model.tokenizer)
    if args.compile == "true" or (args.compile is None and device.type == "cuda"):
        model.decode = torch.compile(model.decode, dynamic=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        write(model, tokenizer, args)


def write(model, tokenizer, args):
    """Prints the texts. All are made side by side, one row of the batch each."""
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(args.prompt)]  # as texts begin in training
    context, new = model.config.context, args.max_new_tokens
    if new is None:
        new = context - len(tokens) if len(tokens) < context else 100
    if len(tokens) + new > context:
        print(f"note: {len(tokens) + new} tokens exceed the training context, {context}", file=sys.stderr)
    rows = torch.tensor([tokens] * args.num_samples, device=model.embedding.weight.device)
    stop = tokenizer.eot_token if args.stop == "true" else -1
    sampling = args.temperature, args.top_k or None, args.top_p, args.seed, stop
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
    texts, times = [args.prompt] * len(rows), [time.perf_counter()]
    print(args.prompt, end="", flush=True)
    for drawn in model.generate(rows, new, *sampling):
        for n, token in enumerate(drawn.tolist()):
            piece = b"" if token == stop else tokenizer.decode_single_token_bytes(token)
            piece = decoders[n].decode(piece)
            texts[n] += piece
            if n == 0:
                print(piece, end="", flush=True)
        times.append(time.perf_counter())
    for n, text in enumerate(texts[1:], start=2):
        print(f"\n--- {n}\n{text}", end="")
    print()
    if len(times) > 1:  # the median: the first step takes in the prompt, and compiles
        typical = statistics.median(b - a for a, b in zip(times, times[1:]))
        print(f"\n{len(rows) / typical:,.0f} tokens/s on {rows.device}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
