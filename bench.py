"""How fast is RAT on this machine, next to attention, and how far from what the hardware can do?

    python bench.py                                          a layer of each kind, growing sequences
    python bench.py --layers=rat+,rat+:4,rat+:16,rat+:64     kinds of your own
    python bench.py model --preset=attention-1b,rat-1b       whole models: training and generation

What is compared has the same sizes, dtype and random inputs, and is timed in turn, round after round; medians
count. Read the ratios: milliseconds depend on what else the machine does.

T         tokens of a sequence (decode: one token after T - 1); of a model, windows or texts at a time
ratio     time over that of the first row with this T
floor     time over that of the matrix products at the fastest rate seen on this device, or of moving their
          operands at its fastest rate, whichever is longer; operands in a processor's cache can beat that
memory    the peak of a step, on CUDA        cache    what decoding keeps
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import statistics
import time
from dataclasses import asdict, replace
from typing import Callable, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU up to 1.6 times the speed

import torch

from prepare_data import parse, run
from rat import RAT, Cache, Config, Mixer
from train import PRESETS, Settings, Trainer, flops_per_token, mixing_flops

FLAGS = {  # default on a CPU, on CUDA; meaning
    "layers": ("rnn,swa,rat:16,rat+:16", "rnn,rat:16", "kinds to compare with attention"),
    "lengths": ("1024,4096,16384", "4096,16384,131072", "layer: sequence lengths T"),
    "tokens": (16384, 262144, "layer: tokens in a batch, whatever the length"),
    "sequences": (8, 512, "layer: sequences in a decoding step"),
    "d_model": (512, 2048, "layer: width"),
    "n_head": (8, 16, "layer: heads"),
    "batch": ("8", "64", "model: windows or texts at a time, such as 64,128"),
    "prompt": (192, 3072, "model: tokens of the prompt"),
    "max_new_tokens": (64, 1024, "model: tokens to generate"),
    "repeats": (3, 7, "rounds after the one that warms up"),
    "dtype": ("float32", "bfloat16", "of weights and inputs"),
    "compile": ("false", "true", "torch.compile"),
}
MODES = {"layer": "train,prefill,decode", "model": "train,generate"}


class Case(NamedTuple):
    """Something to time. setup() makes its inputs and returns the step, a function without arguments."""

    mode: str
    name: str
    T: int
    setup: Callable
    tokens: int  # that a step works on
    flops: float  # of its matrix products
    bytes: float = 0.0  # of their operands and results
    cache: int = 0  # bytes that decoding keeps


# --- Measuring ---
class Hardware:
    """A device, and what it can do: operations per second in matrix products, bytes per second of memory."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        n, numbers = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 26)
        a, b, c = torch.randn(3, n, n, device=device, dtype=dtype)
        self.flops = 2 * n**3 / min(self.times(lambda: torch.mm(a, b, out=c), 10))
        a, b = torch.ones(2, numbers, device=device)
        copied, read = min(self.times(lambda: b.copy_(a), 10)), min(self.times(a.sum, 10))
        self.bandwidth = a.nbytes * max(2 / copied, 1 / read)

    def times(self, step, count):
        """Seconds of each of `count` calls, the first also of the work queued before."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds


def measure(cases, repeats, hardware):
    """Times cases in turn, round after round, and prints a line for each. Returns them as dicts."""
    torch.compiler.reset()
    gc.collect()  # models of the cases before
    times, memory, rows = [[] for _ in cases], [0] * len(cases), []
    for n in range(repeats + 1):
        for c, case in enumerate(cases):
            with contextlib.suppress(torch.OutOfMemoryError):
                if len(times[c]) == n:  # it never was out of memory
                    seconds, peak = time_once(case, hardware)
                    times[c].append(seconds)
                    memory[c] = memory[c] or peak
    for case, seconds, peak in zip(cases, times, memory):
        rows.append(dict(mode=case.mode, name=case.name, T=case.T, memory=peak, cache=case.cache))
        if len(seconds) <= repeats:
            print(f"{case.name:<18}{case.T:>7}  out of memory", flush=True)
            continue
        median = statistics.median(seconds[1:])
        ratio = median / statistics.median(times[0][1:]) if len(times[0]) > repeats else None
        floor = median / max(case.flops / hardware.flops, case.bytes / hardware.bandwidth)
        rows[-1] |= dict(ms=1000 * median, ratio=ratio, floor=floor, tokens_per_second=case.tokens / median)
        row = f"{case.name:<18}{case.T:>7}{1000 * median:>10,.2f}{ratio or math.nan:>7.2f}{floor:>7.1f}"
        row += f"{case.tokens / median:>12,.0f}{peak / 1e6:>12,.2f}{case.cache / 1e6:>12,.2f}"
        print(row, flush=True)
    return rows


def time_once(case, hardware):
    """Seconds of a step, a median if it is short, and on CUDA the bytes at its peak."""
    cuda = hardware.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    step = case.setup()
    hardware.times(step, 1)  # warms up
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    (once,) = hardware.times(step, 1)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    more = hardware.times(step, min(100, math.ceil(0.02 / once)) - 1)
    return statistics.median([once, *more]), peak


# --- Layers ---
def layer_case(name, mode, T, args, hardware):
    device, dtype, d = hardware.device, hardware.dtype, args.d_model
    config = Config(d_model=d, n_head=args.n_head, layers=name)
    B, new = (args.sequences, 1) if mode == "decode" else (args.tokens // T, T)
    mixer = Mixer(config).to(device, dtype)
    if args.compile:
        mixer.compile(dynamic=False)
    tables = mixer.tables(torch.arange(T - new, T, device=device), dtype)  # a model's layers share them

    def setup():
        x = torch.randn(B, new, d, device=device, dtype=dtype, requires_grad=mode == "train")
        if mode == "train":
            inputs, grad = [x, *mixer.parameters()], torch.randn_like(x)
            return lambda: torch.autograd.grad(mixer(x, None, tables), inputs, grad)
        cache = Cache(mixer, B, T, device, dtype)
        if mode == "decode":  # after T - 1 tokens, all alike
            token = torch.rand(cache.keys.shape[-1], device=device, dtype=dtype)
            tokens = token.expand(*cache.keys.shape[:2], T - 1, -1)
            cache.fill(tokens, tokens)
        return torch.no_grad()(lambda: mixer(x, cache, tables))

    with torch.device("meta"):
        cache = Cache(Mixer(config), B, T, dtype=dtype)
    kept = cache.keys.nbytes + cache.values.nbytes + cache.state.nbytes
    weights = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
    if mode == "decode":
        flops = B * (2 * weights + 4 * d * cache.keys.shape[2])
        return Case(mode, name, T, setup, B, flops, dtype.itemsize * weights + kept, kept)
    # Each matrix product reads its operands and writes its result once: the input, z v g q k, y, the output.
    flops = B * T * (2 * weights + mixing_flops(mixer.kind, d, T))
    bytes = dtype.itemsize * (weights + B * T * (4 * d + 2 * mixer.in_proj.out_features))
    products = 3 if mode == "train" else 1  # backward: one for each operand's gradient
    return Case(mode, name, T, setup, B * T, products * flops, products * bytes, kept)


# --- Models ---
def model_case(name, mode, B, args, hardware):
    """A step of train.py on B windows, or B texts written after a prompt."""
    device, dtype, prompt, new = hardware.device, hardware.dtype, args.prompt, args.max_new_tokens
    preset = PRESETS.get(name, {})
    sizes = {key: value for key, value in preset.items() if key in asdict(Config())}
    config = Config(50257, **sizes) if sizes else Config(layers=name)
    tokens = B * config.context

    @functools.cache
    def train():
        with device:
            model = RAT(config)
        micro_batch = math.gcd(B, preset.get("micro_batch", B))
        s = Settings(batch_tokens=tokens, micro_batch=micro_batch, dtype=args.dtype, compile=args.compile)
        x = torch.arange(tokens).view(B, -1).remainder(config.vocab_size).numpy()
        trainer = Trainer(model, s)
        return lambda: trainer.update((x, x), 1e-4)

    @functools.cache
    def generate():
        with device:
            model = RAT(config).to(dtype)
        if args.compile:
            model.decode = torch.compile(model.decode, dynamic=False)
        prompts = torch.randint(config.vocab_size, (B, prompt), device=device)
        return lambda: list(model.generate(prompts, new, seed=1))

    if mode == "train":
        return Case(mode, name, B, train, tokens, tokens * flops_per_token(config))
    with torch.device("meta"):
        small = RAT(config).to(dtype)
        caches = small.cache(B, prompt + new)
    kept = sum(x.nbytes for cache in caches for x in (cache.keys, cache.values, cache.state))
    weights = dtype.itemsize * sum(p.numel() for p in small.parameters())
    head = 2 * small.embedding.weight.numel()  # of a prompt, only the last token needs it
    each = flops_per_token(replace(config, context=prompt + new)) / 3 - head
    bytes = new * (weights + kept * (prompt + new / 2) / (prompt + new))  # a cache as far as it is full
    return Case(mode, name, B, generate, B * new, B * ((prompt + new) * each + new * head), bytes, kept)


# --- The script ---
def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("what", nargs="?", default="layer", choices=MODES)
    add("--modes", help="what to time, of train,prefill,decode; model: of train,generate [all]")
    add("--preset", help="model: presets of train.py, such as attention-1b,rat-1b")
    for name, (cpu, cuda, meaning) in FLAGS.items():
        choices = (cpu, cuda) if name in ("dtype", "compile") else None
        add(f"--{name}", type=type(cpu), choices=choices, help=f"{meaning} [{cpu}; on CUDA {cuda}]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps [the best there is]")
    add("--json", help="file for all figures")
    args = parse(parser)
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    cuda = device.type == "cuda"
    for name, defaults in FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[cuda])
    args.compile = args.compile == "true"
    if cuda:
        torch.cuda.set_device(device.index or 0)
    what = "model" if args.preset else args.what
    modes = (args.modes or MODES[what]).split(",")
    names = (args.preset or f"attention,{args.layers}").split(",")
    sizes = [int(n) for n in (args.lengths if what == "layer" else args.batch).split(",")]
    if not set(modes) <= set(MODES[what].split(",")):
        raise ValueError(f"--modes={args.modes}: {what} has {MODES[what]}")
    if what == "layer" and any(args.tokens % T for T in sizes):
        raise ValueError(f"--lengths={args.lengths} do not divide --tokens={args.tokens}")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 256  # all kinds of layers are one function
    hardware = Hardware(device, getattr(torch, args.dtype))
    chip = torch.cuda.get_device_name() if cuda else f"{device}, {torch.get_num_threads()} threads"
    rates = f"{hardware.flops / 1e12:.3g} TFLOP/s, {hardware.bandwidth / 1e9:,.0f} GB/s"
    print(f"{chip}, torch {torch.__version__}, {args.dtype}: {rates}", flush=True)
    make, results = layer_case if what == "layer" else model_case, []
    columns = f"{'T':>25}{'ms':>10}{'ratio':>7}{'floor':>7}{'tokens/s':>12}{'memory/MB':>12}{'cache/MB':>12}"
    for mode in modes:
        print(f"\n{mode}\n{columns}")
        for T in sizes:
            cases = [make(name, mode, T, args, hardware) for name in names]
            results += measure(cases, args.repeats, hardware)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump({"results": results}, file, indent=1)


if __name__ == "__main__":
    run(main)
