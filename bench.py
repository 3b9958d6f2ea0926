"""How fast is RAT on this machine, next to what else, and how far from what the hardware can do?

    python bench.py                                                a layer of each kind, growing sequences
    python bench.py --layers=rat+,rat+:4,rat+:16,rat+:64           kinds of your own
    python bench.py model --preset=attention-1b,rat-1b             whole models: training and generation

What is compared has the same sizes, dtype and random inputs, and is timed in turn, round after round; medians
count. Read the ratios: milliseconds depend on what else the machine does.

ratio     time over that of the first row with this T
floor     time over that of the matrix products at the fastest rate seen on this device, or of moving their
          operands at its fastest rate, whichever is longer; operands in a processor's cache can beat that
memory    the peak of a step        cache    what decoding keeps

The first half, devices and what a model asks of them, also serves train.py and sample.py.
"""

import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Callable, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on a CPU; read at torch's first tensor

import torch

from prepare_data import BadInput, atomic, expect, numbers, parse_command_line, progress, run
from rat import RAT, Cache, Config, Mixer


# --- Devices, and what a model asks of them --------------------------------------------------------
def pick_device(name, local_rank=None):
    """The torch.device of that name; auto: the best there is; cuda: that of torchrun's process local_rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"there is no device {name!r} here: take auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The torch.dtype of that name; auto: bfloat16 where matrix products in it are fast."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    expect(name in ("auto", *names), f"dtype is {name!r}: it must be auto, {' or '.join(names)}")
    if name != "auto":
        return names[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a CPU with AVX512-BF16: 1.6 times the training throughput; without such instructions less
        cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device, dtype):
    """The data sheet's dense operations per second in bfloat16, of some CUDA devices; None for others."""
    peaks = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
    return next((peak for key, peak in peaks.items() if key in name), None)


def flops_per_token(config, context=None):
    """Floating-point operations of the matrix products, per token of a window: forward and backward.

    What the model needs, whatever a program computes twice or masks out. The backward pass counts double.
    """
    T, d = context or config.context, config.d_model
    total = 2 * d * -(-config.vocab_size // 64) * 64
    for layer in range(config.n_layer):
        with torch.device("meta"):
            mixer = Mixer(config, layer)
        total += 2 * d * (sum(mixer.sizes) + d + 8 * d) + mixing_flops(mixer.kind, d, T)
    return 3 * total


@functools.cache
def mixing_flops(kind, d, T):
    """Operations per token of q . k and of weights . v over the visible keys: the mean over T tokens."""
    seen = sum(min(i, kind.window) + 1 + kind.count(max(0, i - kind.window)) for i in range(T))
    return 4 * d * seen / T if kind.qk_heads else 0.0


def cache_bytes(cache):
    return cache.keys.nbytes + cache.values.nbytes + cache.state.nbytes


def size(bytes):
    """Such as "1.23 GB"."""
    power = min(3, int(math.log(max(1, bytes), 1000)))
    return f"{bytes / 1000**power:.3g} {('B', 'KB', 'MB', 'GB')[power]}"


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

    def wait(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def times(self, step, count):
        """Seconds of each of `count` calls."""
        seconds = []
        self.wait()  # for what was queued before
        for _ in range(count):
            start = time.perf_counter()
            step()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    def memory(self):
        """Bytes in use, and the most since `forget_peak`, of the device or of this process; 0 if unknown."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if not os.path.exists("/proc/self/clear_refs"):
            return 0, 0
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))

    def forget_peak(self):
        """From here on the peak counts anew, and what was freed no longer counts as in use."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):  # Linux
            if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
                malloc_trim(0)
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def __str__(self):
        name = f"{self.device}, threads: {torch.get_num_threads()}"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        rates = f"{self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e9:,.0f} GB/s"
        return f"{name}, torch {torch.__version__}, {str(self.dtype)[6:]}: {rates}"


# --- Measuring ------------------------------------------------------------------------------------
class Case(NamedTuple):
    """Something to time. setup() makes its inputs and returns the step, a function without arguments."""

    name: str
    setup: Callable
    tokens: int  # that a step works on
    flops: float = 0.0  # of its matrix products
    bytes: float = 0.0  # of their operands and results
    cache: int = 0  # bytes that decoding keeps


def measure(groups, repeats, hardware):
    """Times groups, each (title, T, functions that make its cases). Prints a table, returns its rows."""
    results, started = [], time.perf_counter()
    for number, (title, T, makers) in enumerate(groups):
        if not results or results[-1]["title"] != title:
            print(f"\n{title}")
            print(f"{'T':>27}{'ms':>9}{'ratio':>7}{'floor':>7}{'tokens/s':>11}{'memory':>9}{'cache':>9}")
        torch.compiler.reset()
        cases = [make() for make in makers]
        rows = [dict(title=title, name=case.name, T=T, cache=case.cache, times=[]) for case in cases]
        for n in range((repeats + 1) * len(cases)):
            case, row = cases[n % len(cases)], rows[n % len(cases)]
            done = (number + n / len(cases) / (repeats + 1)) / len(groups)
            if sys.stdout.isatty() and done:
                left = timedelta(seconds=int((time.perf_counter() - started) * (1 / done - 1)))
                progress(f"{case.name}, T={T}: about {left} left")
            if "error" not in row:
                time_once(case, row, hardware)
        results += rows
        first = next(row for row in results if (row["title"], row["T"]) == (title, T))
        for case, row in zip(cases, rows):
            progress(finish(case, row, first, hardware), last=True)
    spreads = [(max(row["times"]) - min(row["times"])) / row["ms"] for row in results if "error" not in row]
    if spreads and repeats > 1:
        typical, most = statistics.median(spreads), max(spreads)
        print(f"\nSpread between rounds: typically {typical:.0%}, at most {most:.0%}")
    return results


def time_once(case, row, hardware):
    """One round. The first of a case warms up, and finds its memory and how often to call a short step."""
    try:
        if "calls" not in row:
            hardware.forget_peak()
            before = hardware.memory()[0]
            step = case.setup()
            step()
            hardware.forget_peak()
            (seconds,) = hardware.times(step, 1)
            row["memory"] = hardware.memory()[1] - before
            row["calls"] = min(100, math.ceil(0.02 / seconds))
        else:
            step = case.setup()
            if row["calls"] > 1:
                step()
            row["times"].append(1000 * statistics.median(hardware.times(step, row["calls"])))
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not memory and "can't allocate memory" not in str(error):
            raise
        row["error"] = "out of memory"


def finish(case, row, first, hardware):
    """Completes a row of figures, and returns it as a line of the table."""
    text = f"{row['name']:<20}{row['T']:>7}"
    if "error" in row:
        return text + f"{row['error']:>16}"
    row["ms"] = statistics.median(row["times"])
    row["ratio"] = row["ms"] / first["ms"] if "ms" in first else None
    row["floor_ms"] = 1000 * max(case.flops / hardware.flops, case.bytes / hardware.bandwidth)
    row["tokens_per_second"] = 1000 * case.tokens / row["ms"]
    text += f"{row['ms']:>9,.0f}" if row["ms"] >= 1000 else f"{row['ms']:>9.3g}"
    text += f"{row['ratio']:>7.2f}" if row["ratio"] else f"{'-':>7}"
    text += f"{row['ms'] / row['floor_ms']:>7.1f}{row['tokens_per_second']:>11,.0f}{size(row['memory']):>9}"
    return text + (f"{size(row['cache']):>9}" if row["cache"] else "")


# --- Layers ---------------------------------------------------------------------------------------
TITLES = {
    "train": "Training step, forward and backward",
    "prefill": "Prefill into a cache",
    "decode": "Decoding step at position T",
}


def layer_groups(settings, flags, hardware):
    """Attention, and the kinds that the flags of rat.Config make: in each mode, at each length."""
    sizes = dict(d_model=settings.d_model, n_head=settings.n_head)
    if not flags:
        flags = dict(layers="swa,rnn,rat:16,rat+,rat+:16")
        if settings.compile:  # which takes up to a minute for each kind, mode and length
            flags = dict(layers="rnn,rat:16")
    names = ["attention", *flags.get("layers", "rat:16").split(",")]
    layers = [Config(**sizes, **flags | dict(layers=name)) for name in names]
    groups = []
    for mode in settings.modes.split(","):
        batch = f"{settings.decode_batch} sequences" if mode == "decode" else f"{settings.tokens} tokens"
        for T in lengths_of(settings):
            cases = [functools.partial(layer_case, config, mode, T, settings, hardware) for config in layers]
            groups.append((f"{TITLES[mode]}, {batch}, d_model {settings.d_model}", T, cases))
    return groups


def layer_case(config, mode, T, settings, hardware):
    name, device, dtype, d = config.layers, hardware.device, hardware.dtype, config.d_model
    mixer = Mixer(config).to(device, dtype)
    weights = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()
    if settings.compile:
        mixer.compile(dynamic=False)
    position = torch.arange(T - 1 if mode == "decode" else 0, T, device=device)
    B = settings.decode_batch if mode == "decode" else settings.tokens // T

    def train():
        x = torch.randn(B, T, d, device=device, dtype=dtype, requires_grad=True)
        grad, tables = torch.randn_like(x), mixer.tables(position)  # a model's layers share them

        def step():
            mixer(x, None, tables).backward(grad)
            x.grad = None
            mixer.zero_grad()

        return step

    def with_cache():
        x = torch.randn(B, len(position), d, device=device, dtype=dtype)
        cache = Cache(mixer, B, T, device, dtype)
        cache.state.uniform_(-1, 1)
        if mode == "decode":  # after T - 1 tokens, all alike
            token = torch.rand(cache.keys.shape[-1], device=device, dtype=dtype)
            tokens = token.expand(*cache.keys.shape[:2], T - 1, -1)
            cache.fill(tokens, tokens)
        tables = mixer.tables(position)

        @torch.no_grad()
        def step():
            mixer(x, cache, tables)

        return step

    with torch.device("meta"):
        cache = Cache(Mixer(config), B, T, dtype=dtype)
    if mode == "decode":
        flops = B * (2 * weights + 4 * d * cache.keys.shape[2])
        kept = cache_bytes(cache)
        return Case(name, with_cache, B, flops, dtype.itemsize * weights + kept, kept)
    # Each matrix product reads its operands and writes its result once: the input, z v g q k, y, the output.
    flops = B * T * (2 * weights + mixing_flops(mixer.kind, d, T))
    bytes = dtype.itemsize * (weights + B * T * (4 * d + 2 * mixer.in_proj.out_features))
    if mode == "train":  # backward: a product for the operand's gradient, and one for the weight's
        return Case(name, train, B * T, 3 * flops, 3 * bytes)
    return Case(name, with_cache, B * T, flops, bytes, cache_bytes(cache))


# --- Models ---------------------------------------------------------------------------------------
def model_groups(settings, flags, hardware):
    """The presets, or small models: training, and generation with each of the batches."""
    from train import PRESET_NAMES, PRESETS  # train.py imports this file

    models = {kind: (Config(layers=kind), 16) for kind in ("attention", "rat", "rnn")}
    if settings.preset:
        models = {}
        for name in settings.preset.split(","):
            expect(name in PRESETS, f"there is no preset {name!r}: {PRESET_NAMES}")
            own = {key: value for key, value in PRESETS[name].items() if key in Config.__dataclass_fields__}
            models[name] = Config(vocab_size=50257, **own), PRESETS[name]["micro_batch"]
    groups, new = [], settings.max_new_tokens
    for mode in settings.modes.split(","):
        title = f"Writing T texts of {new} tokens, after prompts of {settings.prompt}"
        if mode == "train":
            title = "Training step with AdamW, T windows of the context"
        for name, (config, windows) in models.items():
            for B in [windows] if mode == "train" else numbers("batch", settings.batch):
                case = functools.partial(model_case, name, config, mode, B, settings, hardware)
                groups.append((title, B, [case]))
    return groups


def model_case(name, config, mode, B, settings, hardware):
    """A training step with AdamW of B windows of the context, or B texts written after a prompt."""
    device, dtype, prompt, new = hardware.device, hardware.dtype, settings.prompt, settings.max_new_tokens

    @functools.cache
    def model():
        with device:
            model = RAT(config)
        if settings.compile:
            for block in model.blocks:
                block.compile(dynamic=False)
            model.decode = torch.compile(model.decode, dynamic=False)
            model.nats = torch.compile(model.nats, dynamic=False)
        return model if mode == "train" else model.to(dtype).eval()

    @functools.cache
    def optimizer():
        return torch.optim.AdamW(model().parameters(), 1e-4, fused=device.type != "mps")

    def train():
        tokens = torch.randint(config.vocab_size, (B, config.context + 1), device=device)

        def step():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                model()(tokens[:, :-1], tokens[:, 1:])[1].backward()
            optimizer().step()
            optimizer().zero_grad()

        return step

    def generate():
        tokens = torch.randint(config.vocab_size, (B, prompt), device=device)
        return lambda: list(model().generate(tokens, new, seed=1))

    if mode == "train":
        tokens = B * config.context
        return Case(name, train, tokens, tokens * flops_per_token(config))
    with torch.device("meta"):
        small = RAT(config)
        half, whole = (
            sum(cache_bytes(Cache(block.mixer, B, length, dtype=dtype)) for block in small.blocks)
            for length in (prompt + new // 2, prompt + new)
        )
    weights = sum(p.numel() for p in small.parameters()) * dtype.itemsize
    bytes = new * (weights + half)  # each step reads the weights, and the cache as far as it is full
    head = 2 * config.d_model * small.embedding.num_embeddings  # the prompt needs it once
    flops = B * ((prompt + new) * (flops_per_token(config, prompt + new) / 3 - head) + new * head)
    return Case(name, generate, B * new, flops, bytes, whole)


# --- The script -----------------------------------------------------------------------------------
@dataclass
class Settings:
    """Settings of bench.py"""

    lengths: str | None = None  # sequence lengths (1024,4096,16384; CUDA 4096,16384,131072)
    tokens: int | None = None  # layer: tokens in a batch, whatever the length (16384; CUDA 262144)
    decode_batch: int | None = None  # layer: sequences in a decoding step (8; CUDA 512)
    d_model: int | None = None  # layer: width (512; CUDA 2048)
    n_head: int | None = None  # layer: heads (8; CUDA 16)
    modes: str | None = None  # what to time (layer: train,prefill,decode; model: train,generate)
    preset: str | None = None  # model: such as rat-1b,attention-1b (without: attention, rat and rnn, small)
    prompt: int | None = None  # model: tokens of the prompt (192; CUDA 3072)
    max_new_tokens: int | None = None  # model: tokens to generate (64; CUDA 1024)
    batch: str | None = None  # model: texts at a time, or a list such as 64,128,256 (8; CUDA 64)
    repeats: int | None = None  # rounds after the one that warms up (3; CUDA 7)
    compile: bool | None = None  # layer, model: torch.compile (true on CUDA, else false)
    seed: int = 1  # of weights and inputs
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: str | None = None  # layer, model: float32 or bfloat16 (float32; CUDA bfloat16)
    json: str | None = None  # file for all figures
    plot: str | None = None  # file for a picture of time against T; needs matplotlib


CPU = dict(lengths="1024,4096,16384", tokens=16384, decode_batch=8, d_model=512, n_head=8, repeats=3)
CPU |= dict(prompt=192, max_new_tokens=64, batch="8", compile=False, dtype="float32")
CUDA = dict(lengths="4096,16384,131072", tokens=262144, decode_batch=512, repeats=7)
CUDA |= dict(d_model=2048, n_head=16, prompt=3072, max_new_tokens=1024, batch="64")
CUDA |= dict(compile=True, dtype="bfloat16")
MODES = {"layer": "train,prefill,decode", "model": "train,generate"}


def main():
    sizes = ("vocab_size", "n_layer", "n_head", "d_model", "context")
    model_flags = {field.name: field.default for field in fields(Config) if field.name not in sizes}
    usage = "layer (default) or model"
    values, kind, words = parse_command_line(Settings, model_flags, ("WHAT", usage))
    what = " ".join(words) or "layer"
    expect(what in MODES, f"unexpected {what!r}: it is {usage}")
    expect(not kind or what == "layer", f"--{min(kind, default='')} is for layer: leave it out")
    device = pick_device(values.get("device", "auto"))
    defaults = (CUDA if device.type == "cuda" else CPU) | {"modes": MODES[what]}
    settings = Settings(**defaults | values)
    for name in ("tokens", "decode_batch", "d_model", "prompt", "max_new_tokens", "repeats"):
        expect(getattr(settings, name) > 0, f"{name} is 0: it must be 1 or more")
    fits = set(settings.modes.split(",")) <= set(MODES[what].split(","))
    expect(fits, f"modes is {settings.modes!r}: it is a list of {MODES[what]}")
    dtype = pick_dtype(settings.dtype, device)
    if settings.plot:
        pyplot()  # or one clear line, before the work
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 256  # all kinds of layers are one function
    makers = {"layer": layer_groups, "model": model_groups}
    with to_json(settings.json) as figures:
        hardware = Hardware(device, dtype)
        groups = makers[what](settings, kind, hardware)
        print(hardware, flush=True)
        results = measure(groups, settings.repeats, hardware)
        about = {"name": str(hardware), "flops": hardware.flops, "bandwidth": hardware.bandwidth}
        figures |= {"settings": asdict(settings), "hardware": about, "results": results}
    if settings.plot:
        panels = {}
        for row in (row for row in results if "ms" in row):
            line = panels.setdefault(row["title"], {}).setdefault(row["name"], ([], []))
            line[0].append(row["T"])
            line[1].append(row["ms"])
        draw(settings.plot, panels, "T", "ms")


@contextlib.contextmanager
def to_json(path):
    """Yields a dict, written to `path` (None: nowhere) at the end. Fails before the work if it cannot be."""
    contents = {}
    with atomic(path) if path else contextlib.nullcontext() as partial:
        yield contents
        if partial:
            partial.write_text(json.dumps(contents, indent=1, default=str) + "\n")


def lengths_of(settings):
    lengths, tokens = numbers("lengths", settings.lengths), settings.tokens
    for T in lengths:
        expect(tokens % T == 0, f"tokens {tokens} is not a multiple of length {T}: change one of them")
    return lengths


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(path, panels, x, y, yscale="log"):
    """A picture of panels, {title: {label: (xs, ys)}}, over a logarithmic x."""
    path = path if os.path.splitext(path)[1] else f"{path}.png"
    figure, axes = pyplot().subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for panel, (title, lines) in zip(axes[0], panels.items()):
        for label, points in lines.items():
            panel.plot(*points, marker=".", label=label)
        panel.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale=yscale)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.tight_layout()
    try:
        with atomic(path) as partial:
            figure.savefig(partial, dpi=150)
    except ValueError as error:  # matplotlib knows files by their endings
        raise BadInput(f"cannot draw {path}: {error}") from error
    print(f"picture: {path}")


if __name__ == "__main__":
    run(main)
