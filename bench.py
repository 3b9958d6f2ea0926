"""How fast is RAT on this machine, next to what else, and how far from what the hardware can do?

    python bench.py                             a layer of each kind over growing sequences, in minutes
    python bench.py layer                       the same in full: more kinds, longer sequences, more repeats
    python bench.py layer --layers=rat+ --dilation=1,4,16,64    kinds of your own: each layer of rat.Config is one
    python bench.py model --preset=rat-1b,attention-1b          whole models: generation and training
    python bench.py scan                        the ways to compute the recurrence, over chunk lengths

In a run everything has the same sizes, data type and random inputs, and is measured in turn, round after round: read the
ratios, they hold where the milliseconds depend on what else the machine does. Times are medians.

The floor is the time that the matrix products need at the fastest rate this device was seen to multiply at, or the time
that their operands and results need at the fastest rate it was seen to copy or read at, whichever is longer; both rates
are measured when the run starts. Small operands may be in a processor's cache, and beat a floor made of memory's speed.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Callable, NamedTuple

import torch
from torch._higher_order_ops.associative_scan import associative_scan

import rat
from prepare_data import parse_command_line, progress, run
from rat import RAT, Cache, Config, Mixer, expect
from train import PRESETS, flops_per_token, mixing_flops, peak_flops, pick_device, pick_dtype


@dataclass
class Settings:
    """Settings of bench.py"""

    lengths: str | None = None  # layer: tokens of a sequence, as 1024,4096; scan: chunk lengths
    tokens: int | None = None  # layer, scan: tokens in a batch, whatever the length of its sequences
    decode_batch: int | None = None  # layer: sequences in a decoding step
    modes: str = "train,prefill,decode"  # what to time; model: decode, which is generation, or train
    preset: str | None = None  # model: one of train.py's, or several, as rat-1b,attention-1b
    prompt: int | None = None  # model: tokens of the prompt (CUDA 3072)
    max_new_tokens: int | None = None  # model: tokens to generate (CUDA 1024)
    batch: int | None = None  # model: sequences at a time; 0: the most that fit, found by trying (CUDA 0, else 8)
    repeats: int | None = None  # rounds after the one that warms up
    compile: str = "auto"  # true, false, best: both, and the faster counts; auto: true on CUDA, else false
    seed: int = 1  # of weights and inputs
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str | None = None  # of everything: float32 or bfloat16 (CUDA bfloat16, else float32)
    json: str | None = None  # file for all results
    plot: str | None = None  # layer: file for a picture of time against length; needs matplotlib


# What the device suits: sizes of `python bench.py` without a word, and with `layer`. On CUDA the papers' layer.
SMALL = {"cpu": dict(lengths="1024,2048,4096", tokens=4096, decode_batch=8, repeats=3),
         "cuda": dict(lengths="4096,16384,65536", tokens=65536, decode_batch=128, repeats=5)}  # fmt: skip
FULL = {"cpu": dict(lengths="1024,2048,4096,8192,16384", tokens=16384, decode_batch=8, repeats=5),
        "cuda": dict(lengths="4096,8192,16384,32768,65536,131072", tokens=262144, decode_batch=512, repeats=7)}  # fmt: skip
WIDTH = {"cpu": dict(d_model=512, n_head=8), "cuda": dict(d_model=2048, n_head=16)}
SMALL_KINDS = [dict(layers="attention"), dict(layers="swa", window=256), dict(layers="rnn"), dict(layers="rat"),
               dict(layers="rat+", dilation=16)]  # fmt: skip
FULL_KINDS = [dict(layers="attention"), dict(layers="swa"), dict(layers="rnn"), *(dict(layers="rat", chunk_size=L) for L in (4, 16, 64, 256)),
              *(dict(layers="rat+", dilation=D) for D in (1, 4, 16, 64)), dict(layers="rat+", dilation=64, window=256, sinks=4)]  # fmt: skip


def main():
    words = ("WHAT", "layer, model or scan; without it, layer in small")
    values, model_values, what = parse_command_line(Settings, Config, hidden=("vocab_size",), positional=words)
    expect(len(what) <= 1 and set(what) <= {"layer", "model", "scan"}, f"unexpected {' '.join(what)!r}: it is one of layer, model, scan")
    what = what[0] if what else "small"
    device = pick_device(values.get("device", "auto"))
    like = "cuda" if device.type == "cuda" else "cpu"
    sizes = SMALL[like] if what == "small" else FULL[like]
    if what == "scan":
        sizes = sizes | dict(lengths="4,16,64,256,1024,4096")
    settings = Settings(**sizes | values)
    for name, least in dict(tokens=1, decode_batch=1, repeats=1, prompt=1, max_new_tokens=1, batch=0).items():
        value = getattr(settings, name)
        expect(value is None or value >= least, f"{name} is {value}: it must be {least} or more")
    expect(settings.compile in ("auto", "true", "false", "best"), f"compile is {settings.compile!r}: it must be auto, true, false or best")
    for T in numbers("lengths", settings.lengths) if what != "model" else ():
        expect(settings.tokens % T == 0, f"tokens {settings.tokens} is not a multiple of length {T}: change one of them")
    expect(set(settings.modes.split(",")) <= set(TITLES), f"modes is {settings.modes!r}: it is a list of {', '.join(TITLES)}")
    expect(what != "model" or settings.compile != "best", "compile is 'best': models are large, choose true or false")
    models = list(pick_models(settings, model_values)) if what == "model" else None
    if settings.plot:
        expect(what in ("small", "layer"), "--plot draws the times of layers: python bench.py layer --plot=FILE.png")
        pyplot()
    settings.dtype = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = pick_dtype(settings.dtype, device)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 256  # all kinds of layers are one function: beyond 8 the rest would run uncompiled
    hardware = Hardware(device, dtype)
    print(hardware, flush=True)
    if what == "model":
        results = bench_models(settings, models, hardware)
    elif what == "scan":
        results = bench_scan(settings, (WIDTH[like] | model_values)["d_model"], hardware)
    else:
        kinds = pick_kinds(WIDTH[like] | model_values, SMALL_KINDS if what == "small" else FULL_KINDS)
        results = bench_layers(settings, kinds, hardware)
    if settings.json:
        with open(settings.json, "w") as file:
            json.dump({"settings": asdict(settings), "hardware": vars(hardware) | {"device": str(device), "dtype": settings.dtype},
                       "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "results": results}, file, indent=1)  # fmt: skip
        print(f"all numbers: {settings.json}")
    if settings.plot:
        plot(results, settings.plot)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


class Hardware:
    """A device, and what it can do: operations per second in matrix products, bytes per second to and from memory."""

    def __init__(self, device, dtype):
        self.device, self.dtype, self.peak_known = device, dtype, True
        n = 8192 if device.type == "cuda" else 2048
        a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
        self.flops = 2 * n**3 / min(self.times(lambda: torch.mm(a, b, out=c), 10))
        a = torch.ones((1 << 30) if device.type == "cuda" else (1 << 26), device=device)
        b = torch.empty_like(a)
        self.bandwidth = max(2 * a.nbytes / min(self.times(lambda: b.copy_(a), 10)), a.nbytes / min(self.times(lambda: a.sum(), 10)))

    def times(self, step, count, warm_up=True):
        """Seconds of each of `count` calls, after one that is not counted."""
        if warm_up:
            step(), self.wait()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step(), self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def wait(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def floor(self, flops, bytes):
        return max(flops / self.flops, bytes / self.bandwidth)

    def memory(self):
        """Bytes in use and the most in use since `forget_peak`, of the device or of this process; None if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if not self.peak_known:
            return None
        try:
            with open("/proc/self/status") as file:
                lines = dict(line.split(":", 1) for line in file)
            return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        except (OSError, KeyError):
            return None

    def forget_peak(self):
        """From here on the peak counts anew, and what was freed no longer counts as in use."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # see train.keep_freed_memory
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:  # not Linux, or not allowed
            self.peak_known = False

    def expect_memory(self, size):
        """MemoryError if the CPU has no room for so many bytes. (Linux would first promise them, and then kill.)"""
        if self.device.type == "cpu" and os.path.exists("/proc/meminfo"):
            with open("/proc/meminfo") as file:
                available = int(dict(line.split(":") for line in file)["MemAvailable"].split()[0]) * 1024
            if size > 0.9 * available:
                raise MemoryError

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{self.device}, {torch.get_num_threads()} threads"
        return (f"{name}, torch {torch.__version__}, {str(self.dtype)[6:]}: {self.flops / 1e12:.3g} TFLOP/s in matrix products, "
                f"{self.bandwidth / 1e9:,.0f} GB/s from memory")  # fmt: skip


class Case(NamedTuple):
    """Something to time. setup() makes its inputs and returns the step, a function without arguments."""

    name: str
    setup: Callable
    flops: float = math.nan  # of a step's matrix products
    bytes: float = math.nan  # of their operands and results


def out_of_memory(error):
    """Is it this? Else raises it again."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search("can't allocate memory", str(error)):
        raise error
    return True


def measure(cases, repeats, hardware, title):
    """Times all cases in turn, `repeats` rounds after one that warms up. Returns a dict of figures for each."""
    results = [{"name": case.name, "ms": []} for case in cases]
    for round in range(repeats + 1):
        for case, result in zip(cases, results):
            if "error" in result:
                continue
            waiting(f"{title}: {case.name}, round {round} of {repeats}")
            step = None
            try:
                if round == 0:
                    hardware.forget_peak()
                    before = hardware.memory()
                    step = case.setup()
                    step(), hardware.forget_peak()
                    (seconds,) = hardware.times(step, 1, warm_up=False)
                    after = hardware.memory()
                    result["memory"] = after[1] - before[0] if before and after else None
                    result["count"] = min(100, math.ceil(0.02 / seconds))  # short steps are timed several at a time
                else:
                    step = case.setup()
                    times = hardware.times(step, result["count"], warm_up=result["count"] > 1)
                    result["ms"].append(1000 * statistics.median(times))
            except (MemoryError, RuntimeError) as error:
                result["error"] = "out of memory" if out_of_memory(error) else None
            step = None  # with all that it holds
    waiting()
    for case, result in zip(cases, results):
        times = sorted(result.pop("ms"))
        if "error" not in result:
            result["ms"] = statistics.median(times)
            result["spread"] = (times[-1] - times[0]) / result["ms"]
            result["floor_ms"] = 1000 * hardware.floor(case.flops, case.bytes)
    return results


def waiting(line=""):
    """What is going on, for whoever watches; a file gets the results alone."""
    if sys.stdout.isatty():
        progress(line)


def size(bytes):
    if bytes is None:
        return "?"
    for unit in ("B", "KB", "MB", "GB"):
        if bytes < 1000 or unit == "GB":
            return f"{bytes:.3g} {unit}" if bytes < 1000 else f"{bytes:.0f} {unit}"
        bytes /= 1000


def use_compile(settings, device):
    """The compile settings to time: [False], [True] or both."""
    return {"auto": [device.type == "cuda"], "true": [True], "false": [False], "best": [False, True]}[settings.compile]


# ----------------------------------------------------------------------------------------------------------------------
# Layers


def bench_layers(settings, kinds, hardware):
    """Each of the kinds, {name: Config}: a training step, prefill into a cache, a decoding step; over lengths, tokens in a batch fixed."""
    modes, lengths = settings.modes.split(","), numbers("lengths", settings.lengths)
    results = []
    for mode in modes:
        for T in lengths:
            torch.compiler.reset()
            variants = [(name, config, compiled) for name, config in kinds.items() for compiled in use_compile(settings, hardware.device)]
            cases = [layer_case(name, replace(config, context=T), mode, T, compiled, settings, hardware) for name, config, compiled in variants]
            measured = measure(cases, settings.repeats, hardware, f"{mode}, T={T}")
            for (name, config, compiled), result in zip(variants, measured):
                with torch.device("meta"):
                    cache = Cache(Mixer(config), 1, T, hardware.dtype).nbytes()
                result |= {"mode": mode, "T": T, "compiled": compiled and mode != "decode", "cache_bytes": cache * settings.decode_batch}
            best = {}  # the faster of eager and compiled
            for result in measured:
                if result["name"] not in best or result.get("ms", math.inf) < best[result["name"]].get("ms", math.inf):
                    best[result["name"]] = result
            for result in best.values():
                both = "ms" in result and "ms" in best["attention"]
                result["ratio"] = result["ms"] / best["attention"]["ms"] if both else None
            results += best.values()
        print_grid(mode, results, settings, lengths, list(kinds))
    spreads = [result["spread"] for result in results if "spread" in result]
    if spreads:
        print(f"\nSlowest minus fastest round, over the median: {statistics.median(spreads):.0%} in the median of all cells, at most {max(spreads):.0%}.")
    return results


def numbers(name, text):
    parts = [part.strip() for part in text.split(",")]
    expect(all(part.isdecimal() and int(part) > 0 for part in parts), f"{name} is {text!r}: it is a list of whole numbers above 0")
    return list(map(int, parts))


def pick_kinds(values, defaults):
    """The layers to compare, {name: Config of one such layer}: attention, and the default kinds or each layer of `values`."""
    chosen = {name for name in values if name not in ("d_model", "n_head", "n_layer", "context")}
    if not chosen:
        configs = [Config(**values | kind | {"n_layer": 1}) for kind in defaults]
    else:
        lists = [str(values.get(name, "")).split(",") for name in ("layers", "dilation", "window", "sinks")]
        whole = Config(**values | {"n_layer": math.lcm(*map(len, lists))})
        configs = [Config(**values | {"layers": "attention", "n_layer": 1} | dict.fromkeys(("dilation", "window", "sinks", "recurrence")))]
        configs += [one_layer(whole, layer) for layer in range(whole.n_layer)]
    return {describe(config): config for config in configs}


def one_layer(config, layer):
    """The Config of a model that is this one layer of another's."""
    name, kind = config.of_layer("layers", layer), config.kind(layer)
    used = {"swa": ["window"], "rat+": ["dilation", "window", "sinks"]}.get(name, [])
    pattern = dict.fromkeys(("dilation", "window", "sinks"))
    for setting in used:
        value = getattr(kind, setting)
        pattern[setting] = "none" if value == rat.NEVER else value
    recurrence = config.recurrence if name == "rat+" else None
    return replace(config, n_layer=1, layers=name, recurrence=recurrence, **pattern)


def describe(config):
    """Such as "rat L=16" or "rat+ D=64 W=256 S=4"."""
    kind = config.kind(0)
    D, W, S = kind.dilation, kind.window, kind.sinks
    more = {"rat": f" L={config.chunk_size}", "swa": f" W={W}", "rat+": f" D={'none' if D == rat.NEVER else D}"}.get(config.layers, "")
    if config.layers == "rat+":
        more += f" W={W}" * (W > 0) + f" S={S}" * (S > 0) + ", no recurrence" * (config.recurrence is False)
    return config.layers + more


TITLES = {
    "train": "Training step, forward and backward, {tokens} tokens: ms, ratio to attention, times the floor, peak memory",
    "prefill": "Prefill into a cache, {tokens} tokens: ms, ratio to attention, times the floor, peak memory",
    "decode": "Decoding step at position T, {decode_batch} sequences: ms, ratio to attention, times the floor, size of the cache",
}


def layer_case(name, config, mode, T, compiled, settings, hardware):
    device, dtype, d = hardware.device, hardware.dtype, config.d_model
    mixer = Mixer(config).to(device, dtype)
    weights = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
    B = settings.decode_batch if mode == "decode" else settings.tokens // T
    if compiled and mode != "decode":  # decoding is not compiled, see RAT.features
        mixer.compile()
    rope = mixer.rope_table(1 if mode == "decode" else T, T - 1 if mode == "decode" else 0)  # a model's layers share them

    def train():
        x = torch.randn(B, T, d, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)

        def step():
            mixer(x, None, rope).backward(grad)
            x.grad = None
            mixer.zero_grad()

        return step

    def with_cache(mixed, length):
        x, cache = torch.randn(B, mixed, d, device=device, dtype=dtype), Cache(mixer, B, T, dtype)
        hardware.expect_memory(cache.nbytes())
        for tensor in (cache.keys, cache.values, *cache.state.values()):
            tensor.uniform_(-1, 1)

        @torch.no_grad()
        def step():
            cache.length = length
            mixer(x, cache, rope)

        return step

    setup = {"train": train, "prefill": lambda: with_cache(T, 0), "decode": lambda: with_cache(1, T - 1)}[mode]
    # Each matrix product reads its operands and writes its result once: the input, z v g q k, y, the output.
    if mode == "decode":
        slots = Cache(mixer, 1, T).keys.shape[2]
        return Case(name, setup, B * (2 * weights + 4 * d * slots), dtype.itemsize * (weights + B * 2 * d * slots))
    flops = settings.tokens * (2 * weights + mixing_flops(mixer.kind, d, T))
    bytes = dtype.itemsize * (weights + settings.tokens * (4 * d + 2 * mixer.in_proj.out_features))
    passes = 3 if mode == "train" else 1  # backward: a product for the operand's gradient, and one for the weight's
    return Case(name, setup, passes * flops, passes * bytes)


def print_grid(mode, results, settings, lengths, names):
    print(f"\n{TITLES[mode].format(**vars(settings))}")
    width = max(map(len, names))
    print(" " * width + "".join(f"{f'T={T}':^34}" for T in lengths))
    for name in names:
        row = f"{name:<{width}}"
        for T in lengths:
            (cell,) = (r for r in results if (r["mode"], r["T"], r["name"]) == (mode, T, name))
            if "error" in cell:
                row += f"{cell['error']:>32}  "
            else:
                memory = size(cell["cache_bytes" if mode == "decode" else "memory"])
                times = f"{cell['ms']:.4g}{'c' if cell['compiled'] else ''}"
                ratio = "-" if cell["ratio"] is None else f"{cell['ratio']:.2f}"
                row += f"{times:>9}{ratio:>7}{cell['ms'] / cell['floor_ms']:>6.1f}x{memory:>10}  "
        print(row.rstrip(), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Models


def bench_models(settings, models, hardware):
    """Whole models: generation of text from a prompt, and training."""
    device, dtype = hardware.device, hardware.dtype
    cuda = device.type == "cuda"
    prompt, new = settings.prompt or (3072 if cuda else 192), settings.max_new_tokens or (1024 if cuda else 64)
    print(f"\nGeneration: {new} tokens after a prompt of {prompt}, weights in {str(dtype)[6:]}. Floor of a step: reading weights and cache once.")
    print("Training: windows of the context, float32 weights, AdamW.")
    results = []
    for name, config, micro_batch in models:
        torch.manual_seed(settings.seed)
        (compiled,) = use_compile(settings, device)
        result = {"name": name, "parameters": 0, "compiled": compiled}
        with torch.device("meta"):
            result["parameters"] = sum(p.numel() for p in RAT(config).parameters())
        if "decode" in settings.modes:
            result |= generation(config, prompt, new, compiled, settings, hardware)
        if "train" in settings.modes:
            result |= training(config, micro_batch, compiled, settings, hardware)
        results.append(result)
        print_model(result, results[0], hardware)
    return results


def pick_models(settings, values):
    """(name, Config, windows per training step) of each model to time."""
    if settings.preset:
        for name in settings.preset.split(","):
            expect(name in PRESETS, f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
            preset = PRESETS[name]
            own = {key: value for key, value in preset.items() if key in Config.__dataclass_fields__}
            yield name, Config(**{"vocab_size": 50257} | own | values), preset["micro_batch"]
    elif {"layers", "dilation", "window", "sinks", "chunk_size"} & set(values):
        yield values.get("layers", "rat"), Config(**values), 16
    else:
        for layers in ("attention", "rat", "rnn"):
            yield layers, Config(**values | {"layers": layers}), 16


def generation(config, prompt, new, compiled, settings, hardware):
    """Figures of generation at one batch size, which is searched for if it is not set."""
    hardware.forget_peak()
    torch.compiler.reset()
    device, dtype = hardware.device, hardware.dtype
    model = RAT(config).to(device, dtype).eval()
    if compiled:
        for block in model.blocks:
            block.compile()
    with torch.device("meta"):  # of a sequence, when it is complete, and half way through the new tokens
        cache_bytes, half_way = (sum(Cache(layer, 1, prompt + n, dtype).nbytes() for layer in mixers(config)) for n in (new, new // 2))

    def run(batch, tokens):
        """Seconds to the first token, and from there to token number `tokens`."""
        hardware.expect_memory(2 * batch * cache_bytes)
        steps = model.generate(torch.randint(config.vocab_size, (batch, prompt), device=device), new, seed=1)
        start = time.perf_counter()
        next(steps), hardware.wait()
        first = time.perf_counter()
        for _ in itertools.islice(steps, tokens - 1):
            pass
        hardware.wait()
        return first - start, time.perf_counter() - first

    def fits(batch):
        waiting(f"generation: does a batch of {batch} fit?")
        try:
            run(batch, min(2, new))
            return True
        except (MemoryError, RuntimeError) as error:
            return not out_of_memory(error)
        finally:
            hardware.forget_peak()

    batch = (0 if device.type == "cuda" else 8) if settings.batch is None else settings.batch
    batch = batch or largest(fits)
    if not batch:
        return {"generation": "out of memory at one sequence"}
    times = []
    try:
        run(batch, min(new, 8))
        for round in range(min(3, settings.repeats)):
            waiting(f"generation: {batch} sequences, round {round}")
            times.append(run(batch, new))
    except (MemoryError, RuntimeError) as error:
        out_of_memory(error)
        return {"generation": f"out of memory at {batch} sequences: try --batch with fewer"}
    waiting()
    prefill, decode = (statistics.median(column) for column in zip(*times))
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    floor = (weights + batch * half_way) / hardware.bandwidth
    return {"batch": batch, "prompt": prompt, "new": new, "cache_bytes_per_token": cache_bytes / (prompt + new), "prefill_s": prefill,
            "decode_s": decode, "tokens_per_second": batch * new / (prefill + decode),
            "decode_tokens_per_second": batch * (new - 1) / decode if new > 1 else math.nan,
            "times_the_floor": decode / max(1, new - 1) / floor}  # fmt: skip


def mixers(config):
    return [Mixer(config, layer) for layer in range(config.n_layer)]


def largest(fits):
    """The largest batch that fits, or within 5 % of it; 0 if one sequence does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def training(config, micro_batch, compiled, settings, hardware):
    """Figures of training steps; where the windows do not fit in memory, with half as many, and so on."""
    device, dtype = hardware.device, hardware.dtype
    while micro_batch:
        try:
            seconds = statistics.median(training_times(config, micro_batch, compiled, settings, hardware))
            break
        except (MemoryError, RuntimeError) as error:
            out_of_memory(error)
        micro_batch //= 2
    else:
        return {"training": "out of memory at one window"}
    rate, peak = micro_batch * config.context / seconds, peak_flops(device, dtype)
    return {"windows": micro_batch, "context": config.context, "train_tokens_per_second": rate,
            "mfu": rate * flops_per_token(config) / (peak or hardware.flops), "mfu_of": "data sheet" if peak else "measured rate"}  # fmt: skip


def training_times(config, windows, compiled, settings, hardware):
    hardware.forget_peak()
    torch.compiler.reset()
    device, dtype = hardware.device, hardware.dtype
    waiting(f"training: steps of {windows} windows of {config.context}")
    with torch.device("meta"):
        weights = sum(p.numel() for p in RAT(config).parameters())
    hardware.expect_memory(16 * weights)
    model = RAT(config).to(device)
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type != "mps")
    tokens = torch.randint(config.vocab_size, (windows, config.context + 1), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    times = hardware.times(step, settings.repeats)
    waiting()
    return times


def print_model(result, first, hardware):
    print(f"\n{result['name']}, {result['parameters'] / 1e6:.1f} M parameters" + ", compiled" * result["compiled"])
    against = lambda key: f" ({result[key] / first[key]:.2f} x {first['name']})" if result is not first and key in first else ""
    if "batch" in result:
        print(f"  generation  {result['tokens_per_second']:>10,.0f} tokens/s{against('tokens_per_second')}, {result['batch']} sequences; "
              f"decoding alone {result['decode_tokens_per_second']:,.0f} tokens/s, {result['times_the_floor']:.2f} x the floor; "
              f"cache {result['cache_bytes_per_token']:,.0f} bytes/token")  # fmt: skip
    if "windows" in result:
        print(f"  training    {result['train_tokens_per_second']:>10,.0f} tokens/s{against('train_tokens_per_second')}, {result['windows']} windows of "
              f"{result['context']}; {result['mfu']:.1%} of the {result['mfu_of']}")  # fmt: skip
    for key in ("generation", "training"):
        if key in result:
            print(f"  {key}  {result[key]}")


# ----------------------------------------------------------------------------------------------------------------------
# The recurrence


def bench_scan(settings, d, hardware):
    """`scan`, forward and backward, over chunk lengths: as it is, as one loop, and torch's associative_scan alone."""
    lengths, block = numbers("lengths", settings.lengths), rat.BLOCK
    # What to call, whether compiled, and the value of rat.BLOCK.
    paths = {
        "scan": (rat.scan, False, block),
        "scan, compiled": (rat.scan, True, block),
        "scan as one loop": (rat.scan, False, 1 << 30),
        "associative_scan, compiled": (associative, True, block),
    }
    if hardware.device.type == "cuda":
        del paths["associative_scan, compiled"]  # the gradients of its pointwise mode are wrong
    print(f"\nThe recurrence over {settings.tokens} tokens of {d} channels in float32, forward and backward: ms")
    print(f"(Up to L={block}, scan is a loop.)")
    print(f"{'':<28}" + "".join(f"{f'L={L}':>10}" for L in lengths))
    results = []
    for L in lengths:
        torch.compiler.reset()
        cases = [scan_case(name, path, settings.tokens, L, d, hardware.device) for name, path in paths.items()]
        try:
            results += [result | {"L": L} for result in measure(cases, settings.repeats, hardware, f"L={L}")]
        finally:
            rat.BLOCK = block
    for name in paths:
        cells = [result for result in results if result["name"] == name]
        print(f"{name:<28}" + "".join(f"{cell.get('error') or format(cell['ms'], '.1f'):>10}" for cell in cells))
    return results


def associative(x, gate):
    return associative_scan(rat.compose, (gate, (1 - gate) * x), dim=1, combine_mode="generic")[1]


def scan_case(name, path, tokens, L, d, device):
    function, compiled, block = path
    function = torch.compile(function) if compiled else function

    def setup():
        x, grad = (torch.randn(tokens // L, L, d, device=device) for _ in range(2))
        gate = torch.rand_like(x)
        x.requires_grad_(), gate.requires_grad_()

        def step():
            rat.BLOCK = block
            function(x, gate).backward(grad)
            x.grad = gate.grad = None

        return step

    return Case(name, setup)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out (--json has the numbers)") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results, path):
    """Time against length, a panel for each mode, a line for each kind."""
    modes, names = (list(dict.fromkeys(result[key] for result in results)) for key in ("mode", "name"))
    figure, panels = pyplot().subplots(1, len(modes), figsize=(5.5 * len(modes), 4.5), squeeze=False)
    for panel, mode in zip(panels[0], modes):
        for name in names:
            points = [(r["T"], r["ms"]) for r in results if (r["mode"], r["name"]) == (mode, name) and "ms" in r]
            panel.plot(*zip(*points), marker="o", label=name) if points else None
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({result["T"] for result in results})
        panel.set_xticks(lengths, [f"{T:,}" for T in lengths])
        panel.set(title={"train": "training step", "prefill": "prefill", "decode": "decoding step"}[mode], xlabel="sequence length", ylabel="ms")
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    run(main)
