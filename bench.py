"""How fast is RAT on this machine, next to attention, and how far from what the hardware can do?

    python bench.py                                          a layer of each kind, growing sequences
    python bench.py --layers=rat+,rat+:4,rat+:16,rat+:64     kinds of your own
    python bench.py model --preset=attention-1b,rat-1b       whole models: training and generation

What is compared has the same sizes, dtype and random inputs, and is timed in turn, round after round; medians
count. Read the ratios: milliseconds depend on what else the machine does.

ratio     time over that of the first row with this T
floor     time over that of the matrix products at the fastest rate seen on this device, or of moving their
          operands at its fastest rate, whichever is longer; operands in a processor's cache can beat that
memory    the peak of a step, on CUDA        cache    bytes that decoding keeps
"""

import argparse
import functools
import gc
import json
import math
import os
import statistics
import time
from typing import Callable, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU up to 1.6 times the speed

import torch

from rat import RAT, Cache, Config, Mixer
from train import PRESETS, flops_per_token, mixing_flops

CPU = dict(lengths="1024,4096,16384", tokens=16384, sequences=8, d_model=512, n_head=8, repeats=3)
CPU |= dict(prompt=192, max_new_tokens=64, batch="8", dtype="float32")
CUDA = dict(lengths="4096,16384,131072", tokens=262144, sequences=512, d_model=2048, n_head=16, repeats=7)
CUDA |= dict(prompt=3072, max_new_tokens=1024, batch="64", dtype="bfloat16")
MODES = {"layer": "train,prefill,decode", "model": "train,generate"}
TITLES = {"train": "Training step", "prefill": "Prefill into a cache"}
TITLES |= {"decode": "Decoding step at position T", "generate": "Writing T texts side by side"}


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
        """Seconds of each of `count` calls."""
        seconds = []
        for _ in range(count):
            self.wait()
            start = time.perf_counter()
            step()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def __str__(self):
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else f"{self.device}, {torch.get_num_threads()} threads"
        rates = f"{self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:,.0f} GB/s"
        return f"{name}, torch {torch.__version__}, {str(self.dtype)[6:]}: {rates}"


def measure(cases, repeats, hardware):
    """Times cases in turn, round after round, and prints a line for each. Returns them as dicts."""
    rows = [dict(mode=case.mode, name=case.name, T=case.T, cache=case.cache) for case in cases]
    times = [[] for _ in cases]
    torch.compiler.reset()
    gc.collect()  # models of the cases before
    for n in range(repeats + 1):
        for case, row, seconds in zip(cases, rows, times):
            if "error" not in row:
                try:
                    time_once(case, row, seconds, hardware)
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
    for case, row, seconds in zip(cases, rows, times):
        text = f"{row['name']:<18}{row['T']:>7}"
        if "error" in row:
            print(f"{text}  {row['error']}", flush=True)
            continue
        del row["calls"]
        row["ms"] = 1000 * statistics.median(seconds)
        row["ratio"] = row["ms"] / rows[0]["ms"] if "ms" in rows[0] else None
        row["floor"] = row["ms"] / 1000 / max(case.flops / hardware.flops, case.bytes / hardware.bandwidth)
        row["tokens_per_second"] = 1000 * case.tokens / row["ms"]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        text += f"{row['ms']:>10,.2f}{ratio:>7}{row['floor']:>7.1f}{row['tokens_per_second']:>12,.0f}"
        print(f"{text}{size(row['memory']):>9}{size(row['cache']):>9}", flush=True)
    return rows


def time_once(case, row, seconds, hardware):
    """One round. A case's first one warms up, and finds its memory and how often to call a short step."""
    cuda = hardware.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    step = case.setup()
    step()
    if "calls" in row:
        seconds.append(statistics.median(hardware.times(step, row["calls"])))
        return
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    (once,) = hardware.times(step, 1)
    row["calls"] = min(100, math.ceil(0.02 / once))
    row["memory"] = torch.cuda.max_memory_allocated() - before if cuda else 0


def size(bytes):
    """Such as "1.23 GB"; "-" for none."""
    power = min(3, int(math.log(max(1, bytes), 1000)))
    return f"{bytes / 1000**power:.3g} {('B', 'KB', 'MB', 'GB')[power]}" if bytes else "-"


def cache_bytes(cache):
    return cache.keys.nbytes + cache.values.nbytes + cache.state.nbytes


# --- Layers ---
def layer_case(name, config, mode, T, args, hardware):
    device, dtype, d = hardware.device, hardware.dtype, config.d_model
    mixer = Mixer(config).to(device, dtype)
    weights = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
    if args.compile:
        mixer.compile(dynamic=False)
    position = torch.arange(T - 1 if mode == "decode" else 0, T, device=device)
    tables = mixer.tables(position, dtype)  # a model's layers share them
    B = args.sequences if mode == "decode" else args.tokens // T

    def train():
        x = torch.randn(B, T, d, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)

        def step():
            mixer(x, None, tables).backward(grad)
            x.grad = None
            mixer.zero_grad()

        return step

    def with_cache():
        x = torch.randn(B, len(position), d, device=device, dtype=dtype)
        cache = Cache(mixer, B, T, device, dtype)
        if mode == "decode":  # after T - 1 tokens, all alike
            token = torch.rand(cache.keys.shape[-1], device=device, dtype=dtype)
            tokens = token.expand(*cache.keys.shape[:2], T - 1, -1)
            cache.fill(tokens, tokens)
        return torch.no_grad()(lambda: mixer(x, cache, tables))

    with torch.device("meta"):
        cache = Cache(Mixer(config), B, T, dtype=dtype)
    kept = cache_bytes(cache)
    if mode == "decode":
        flops = B * (2 * weights + 4 * d * cache.keys.shape[2])
        return Case(mode, name, T, with_cache, B, flops, dtype.itemsize * weights + kept, kept)
    # Each matrix product reads its operands and writes its result once: the input, z v g q k, y, the output.
    flops = B * T * (2 * weights + mixing_flops(mixer.kind, d, T))
    bytes = dtype.itemsize * (weights + B * T * (4 * d + 2 * mixer.in_proj.out_features))
    if mode == "train":  # backward: a product for each operand's gradient
        return Case(mode, name, T, train, B * T, 3 * flops, 3 * bytes)
    return Case(mode, name, T, with_cache, B * T, flops, bytes, kept)


# --- Models ---
def model_case(name, config, mode, B, args, hardware):
    """A training step with AdamW of B windows (a preset's micro_batch), or B texts written after a prompt."""
    if mode == "train":
        B = PRESETS.get(name, {}).get("micro_batch", B)
    device, dtype, prompt, new = hardware.device, hardware.dtype, args.prompt, args.max_new_tokens

    def make():
        with device:
            model = RAT(config)
        if args.compile:
            for block in model.blocks:
                block.compile(dynamic=False)
            model.decode = torch.compile(model.decode, dynamic=False)
            model.nats = torch.compile(model.nats, dynamic=False)
        return model

    @functools.cache
    def train():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type != "mps")
        tokens = torch.randint(config.vocab_size, (B, config.context + 1), device=device)

        def step():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                model(tokens[:, :-1], tokens[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    @functools.cache
    def generate():
        model = make().to(dtype)
        tokens = torch.randint(config.vocab_size, (B, prompt), device=device)
        return lambda: list(model.generate(tokens, new, seed=1))

    if mode == "train":
        tokens = B * config.context
        return Case(mode, name, B, train, tokens, tokens * flops_per_token(config))
    with torch.device("meta"):
        small = RAT(config)
        kept = sum(cache_bytes(Cache(block.mixer, B, prompt + new, dtype=dtype)) for block in small.blocks)
    weights = dtype.itemsize * sum(p.numel() for p in small.parameters())
    head = 2 * config.d_model * small.embedding.num_embeddings  # of a prompt, only the last token needs it
    flops = B * ((prompt + new) * (flops_per_token(config, prompt + new) / 3 - head) + new * head)
    bytes = new * (weights + kept * (prompt + new / 2) / (prompt + new))  # a cache as far as it is full
    return Case(mode, name, B, generate, B * new, flops, bytes, kept)


# --- The script ---
def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("what", nargs="?", default="layer", choices=MODES)
    add("--modes", help="what to time, of train,prefill,decode; model: of train,generate [all]")
    add("--layers", help="kinds to compare with attention; model: kinds of small models")
    add("--lengths", help="layer: sequence lengths T")
    add("--tokens", type=int, help="layer: tokens in a batch, whatever the length")
    add("--sequences", type=int, help="layer: sequences in a decoding step")
    add("--d_model", type=int, help="layer: width")
    add("--n_head", type=int, help="layer: heads")
    add("--preset", help="model: presets of train.py, such as attention-1b,rat-1b")
    add("--batch", help="model: windows or texts at a time, such as 64,128")
    add("--prompt", type=int, help="model: tokens of the prompt")
    add("--max_new_tokens", type=int, help="model: tokens to generate")
    add("--repeats", type=int, help="rounds after the one that warms up")
    add("--compile", choices=("true", "false"), help="torch.compile [true on CUDA]")
    add("--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on CUDA, else float32]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps [the best there is]")
    add("--json", help="file for all figures")
    args = parser.parse_args()
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    for name, value in (CUDA if device.type == "cuda" else CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.compile = device.type == "cuda" if args.compile is None else args.compile == "true"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if args.preset:
        args.what = "model"
    several = args.what == "layer" and device.type != "cuda"  # where nothing is compiled
    layers = args.layers or ("rnn,swa,rat:16,rat+:16" if several else "rnn,rat:16")
    modes = (args.modes or MODES[args.what]).split(",")
    names = (args.preset or f"attention,{layers}").split(",")
    sizes = [int(n) for n in (args.lengths if args.what == "layer" else args.batch).split(",")]
    if not set(modes) <= set(MODES[args.what].split(",")):
        parser.error(f"--modes={args.modes}: {args.what} has {MODES[args.what]}")
    if args.what == "layer" and any(args.tokens % T for T in sizes):
        parser.error(f"--lengths={args.lengths} do not divide --tokens={args.tokens}")
    try:
        configs = {name: config_of(name, args) for name in names}
    except ValueError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 256  # all kinds of layers are one function
    hardware = Hardware(device, getattr(torch, args.dtype))
    print(hardware, flush=True)
    make, results = layer_case if args.what == "layer" else model_case, []
    columns = f"{'T':>25}{'ms':>10}{'ratio':>7}{'floor':>7}{'tokens/s':>12}{'memory':>9}{'cache':>9}"
    for mode in modes:
        print(f"\n{TITLES[mode]}\n{columns}")
        for T in sizes if mode != "train" or args.what == "layer" else sizes[:1]:
            cases = [make(name, configs[name], mode, T, args, hardware) for name in names]
            results += measure(cases, args.repeats, hardware)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump({"results": results}, file, indent=1)


def config_of(name, args):
    if args.what == "layer":
        return Config(d_model=args.d_model, n_head=args.n_head, layers=name)
    sizes = {key: value for key, value in PRESETS.get(name, {}).items() if key in Config.__dataclass_fields__}
    return Config(50257, **sizes) if sizes else Config(layers=name)


if __name__ == "__main__":
    main()
