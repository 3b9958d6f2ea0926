"""Trains a language model of rat.py on a folder of shards.

    python train.py                                         a small RAT on the standard library, in minutes
    python train.py --layers=attention --out=out/attention  the same with plain attention
    python train.py --resume                                resume from out/ckpt.pt
    python train.py --compare="out/**/log.jsonl"            a table of several runs
    python train.py --layers=rat+ --out=out/rat+            RAT+: a sparse and a dense update on each batch
    python train.py --init_from=out/rat+/ckpt.pt --layers=rat+:16 --eval_only   the loss with every 16th key
    torchrun --standalone --nproc_per_node=8 train.py --preset=rat-1b --out=out/rat-1b

Each setting below is a flag, --name=value, and so is each field of rat.Config.
"""

import contextlib
import functools
import gc
import glob
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on a CPU; read at torch's first tensor

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, softplus
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bench import cache_bytes, draw, flops_per_token, peak_flops, pick_device, pick_dtype, size
from prepare_data import BadInput, Data, TextStream, alone, atomic, damage_reported, expect, get_tokenizer
from prepare_data import parse_command_line, prefetch, prepare_stdlib, progress, read_checkpoint, reader, run
from prepare_data import type_of
from rat import RAT, Cache, Config


@dataclass
class Settings:
    """Settings of train.py"""

    preset: str | None = None  # sizes and recipe of the papers, such as rat-1b; other flags override it
    data: str = "data/stdlib"  # folder of shards; data/stdlib is prepared if it is missing
    out: str = "out"  # folder of the checkpoint, ckpt.pt, and of log.jsonl
    resume: bool = False  # continue from that checkpoint, with its settings unless a flag changes them
    init_from: str | None = None  # a checkpoint to begin with; the numbers in layers, and context, may vary
    joint: str | None = None  # layers of a sparse update before each dense one (rat+: rat+:64); none: no such
    eval_only: bool = False  # print the loss of init_from, also by position, answers, what gates remember
    dry_run: bool = False  # print parameters, operations and an estimate of the memory, and stop
    compare: str | None = None  # print a table of runs, such as "out/**/log.jsonl", and stop
    plot: str | None = None  # compare: file for a picture of it; needs matplotlib
    steps: int = 800  # optimizer steps
    batch_tokens: int = 4096  # tokens per step, over all processes
    micro_batch: int | None = None  # windows per process and forward pass; fewer need less memory
    parallel: str = "ddp"  # under torchrun, each process has all of the model (ddp) or a part of it (fsdp)
    recompute: bool = False  # less memory for more time: the backward pass recomputes each block
    lr: float = 4e-3  # peak learning rate: linear warmup, then a cosine to min_lr
    min_lr: float = 1e-6  # learning rate of the last step
    warmup: float = 0.05  # fraction of steps spent warming up
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # of AdamW, for matrices
    clip: float = 1.0  # largest norm of the gradient; 0: any
    eval_every: int = 200  # steps between evaluations, each of which writes a checkpoint
    eval_tokens: int = 131072  # tokens to evaluate on, spread evenly over the validation data
    keep: int = 0  # checkpoints to keep beside ckpt.pt, the newest ones, as ckpt-STEP.pt
    log_every: int = 20  # steps between lines of progress
    sample_tokens: int = 160  # length of the text written at the end; 0: none
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where it is fast
    compile: bool | None = None  # torch.compile: a slow start, then faster steps (true on CUDA, else false)


# The papers' models and recipes (RAT, experiments; RAT+, section 4 and appendix), and a size for one GPU.
SIZES = {
    "7b": dict(n_layer=32, d_model=4096, n_head=32, steps=31789, lr=6e-4, micro_batch=1, parallel="fsdp"),
    "3b": dict(n_layer=28, d_model=2560, n_head=20, steps=63578, lr=7e-4, micro_batch=2),
    "1b": dict(n_layer=24, d_model=2048, n_head=16, steps=47684, lr=8e-4, micro_batch=4),
    "200m": dict(n_layer=12, d_model=1024, n_head=16, steps=10000, lr=8e-4, micro_batch=8),
}
BATCHES = {"7b": 768, "3b": 768, "1b": 512, "200m": 128}  # windows of 4096 tokens
KINDS = ("rat", "attention", "rnn", "rat-swa", "attention-swa", "rat+")
RECIPE = dict(data="data/fineweb-edu", context=4096, eval_every=500, eval_tokens=1 << 21, log_every=10)
PRESETS = {
    f"{kind}-{size}": RECIPE | values | dict(layers=kind.replace("-", ","), batch_tokens=BATCHES[size] * 4096)
    for size, values in SIZES.items()
    for kind in KINDS
}
PRESET_NAMES = f"it is KIND-SIZE, KIND one of {', '.join(KINDS)} and SIZE one of {', '.join(SIZES)}"

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # checkpoints fit any number of processes


def main():
    with contextlib.ExitStack() as held:
        start(held)


def start(held):
    """Does what the command line asks for. held: an ExitStack that keeps the lock of the --out folder."""
    settings, given, config, model, saved = read_command_line(held)
    if settings.compare is not None:
        return compare_runs(settings.compare, settings.plot) if RANK == 0 else None
    expect(not settings.plot, "--plot goes with --compare: name the runs to draw")
    micro_batch = check(settings, config)
    if settings.dry_run:
        return dry_run(settings, config, micro_batch)
    device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else None)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    path, free = os.path.join(settings.out, "ckpt.pt"), saved or settings.eval_only
    taken = f"{path} is there already: --resume continues it, another --out starts beside it"
    if not free and os.path.exists(path):
        lock(held, settings.out)  # or it is another run's that is still there
        raise BadInput(taken)

    if settings.data == "data/stdlib" and not os.path.exists(settings.data) and RANK == 0:
        prepare_stdlib(settings.data)
    step = saved.get("step", 0)
    alike = total(step) == [WORLD * step]  # the other processes wait for the data
    expect(alike, f"{path} was written while it was read: run this again")
    train_data = Data(settings.data, "train", config.context, settings.seed)
    val_data = Data(settings.data, "val", config.context)
    sample, answers = val_data.sample(max(1, settings.eval_tokens // config.context)), bool(val_data.masks)
    expect((sample[1] != -100).any(), "no target is among the --eval_tokens: raise them, or prepare more")
    name, vocab_size = train_data.meta["tokenizer"], train_data.meta["vocab_size"]
    torch.manual_seed(settings.seed)
    model = model or RAT(replace(config, vocab_size=vocab_size), name)
    known = f"{model.config.vocab_size} tokens of {model.tokenizer or 'a tokenizer without a name'}"
    fits = model.tokenizer in ("", name) and vocab_size <= model.config.vocab_size
    expect(fits, f"{settings.data} is in {vocab_size} tokens of {name}, the model knows {known}: use its own")
    if not model.tokenizer:
        say(f"note: the model knows {known}; its loss on {name} means little unless that is its own")
    model.tokenizer = name
    data = [] if settings.eval_only else [train_data.checksum(), val_data.checksum()]
    if saved.get("data", data) != data:
        changed = f"{settings.data} has changed since the run in {path} was trained on it"
        expect("data" in given, f"{changed}: restore it, or accept the change with --data={settings.data}")
        say(f"note: {changed}")
    run = Run(model.to(device), settings, micro_batch, saved.get("optimizer"))
    if not free:
        lock(held, settings.out)
        expect(not os.path.exists(path), taken)  # written since
    parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    say(f"model: {config.layers}, {config.n_layer} layers of width {config.d_model}, {parameters}")
    say(f"data: {settings.data}, {len(train_data) * config.context:,} tokens ({name})")

    if settings.eval_only:
        return run.print_evaluation(sample, answers, val_data.meta["end_of_text"])
    try:
        with signals_noted() as signals:
            stopped_by = train(run, train_data, sample, answers, saved | {"data": data}, signals)
    except BadInput as error:
        good = path if os.path.exists(path) else "none"
        raise BadInput(f"{error}; last good checkpoint: {good}") from error
    if WORLD > 1:
        del run, model
        gc.collect()  # models and optimizers hold on to the process group
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)
    if RANK == 0:
        if settings.sample_tokens:
            write_sample(path, sample if answers else val_data.sample(3), answers, settings, device)
        print(f"\nNext: python sample.py --ckpt={path}")
        print(f"      python train.py --resume --out={settings.out} --steps={2 * settings.steps}")
        if not settings.init_from:
            print(f"      python train.py {fair_comparison(settings, config)}")


def lock(held, folder):
    if RANK == 0:
        held.enter_context(alone(folder))


@contextlib.contextmanager
def signals_noted():
    """Yields a list that collects SIGTERM and the first Ctrl-C. A second Ctrl-C ends the process at once.

    A second SIGTERM does not: schedulers also send it to torchrun, which passes it on.
    """
    numbers, usual = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        numbers.append(number)
        with contextlib.suppress(OSError):  # Ctrl-C ends `| tee`, too
            if RANK == 0:  # not print, which may be what was interrupted
                os.write(1, b"\nstopping with a checkpoint; Ctrl-C again stops at once, without one\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    try:
        for number in usual:
            signal.signal(number, note)
        yield numbers
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def fair_comparison(settings, config):
    """The flags that train another kind of layer with the same sizes and the same recipe."""
    other = "rat" if config.layers == "attention" else "attention"
    flags = {name: value for name, value in asdict(settings).items() if value != getattr(Settings, name)}
    for name in ("n_layer", "n_head", "d_model", "context"):
        if getattr(config, name) != getattr(Config, name):
            flags[name] = getattr(config, name)
    flags |= {"layers": other, "out": os.path.join(settings.out, other)}
    own = ("resume", "preset", "joint")
    return shlex.join(f"--{name}={value}" for name, value in flags.items() if name not in own)


def read_command_line(held):
    """Settings, the names of those given, Config, the model to continue or None, the checkpoint or {}.

    A folder to resume in is locked, in `held`, before its checkpoint is read.
    """
    model_flags = {field.name: field.default for field in fields(Config) if field.name != "vocab_size"}
    values, model_values, _ = parse_command_line(Settings, model_flags)
    given, model, saved = set(values), None, {}
    if "preset" in values:
        name = values["preset"]
        expect(name in PRESETS, f"there is no preset {name!r}: {PRESET_NAMES}")
        preset = PRESETS[name]
        values = {name: preset[name] for name in preset.keys() - model_flags.keys()} | values
        model_values = {name: preset[name] for name in preset.keys() & model_flags.keys()} | model_values
    settings = Settings(**values)
    if settings.resume:
        both = "--resume continues the run in --out, --init_from begins one: leave one of them out"
        expect("init_from" not in given, both)
        expect(not settings.eval_only, "--eval_only goes with --init_from, not --resume")
        path = os.path.join(settings.out, "ckpt.pt")
        if os.path.exists(path) and not settings.dry_run:
            lock(held, settings.out)
        saved = read_checkpoint(path)
        with damage_reported(path):
            model = RAT.load(path)
        expect("optimizer" in saved, f"{path} has no optimizer state: train it with --init_from")
        settings = Settings(**settings_of(path, saved, model) | values | {"out": settings.out})
        for name, value in model_values.items():
            now = getattr(model.config, name)
            expect(value == now, f"--{name}={value}: the model in {path} has {now}, and resuming keeps it")
        done = f"{path} has made {saved['step']} steps, --steps is {settings.steps}"
        expect(saved["step"] < settings.steps, f"{done}: a larger --steps continues it")
    elif settings.init_from is not None:
        read_checkpoint(settings.init_from)
        with damage_reported(settings.init_from):
            model = RAT.load(settings.init_from)
        for name in model_values.keys() - {"layers", "context"}:
            now = getattr(model.config, name)
            fits = str(model_values[name]) == str(now)
            expect(fits, f"--{name}={model_values[name]}: the model has {now}, and its weights depend on it")
        model.use(model_values.get("layers"), model_values.get("context"))
    config = model.config if model else Config(**model_values)
    if settings.joint is None and not model and set(config.layers.split(",")) <= {"rat+", "rat+:1"}:
        settings.joint = "rat+:64"  # a new, dense RAT+ model
    settings.data = os.path.normpath(settings.data)
    return settings, given, config, model, saved


def settings_of(path, saved, model):
    """The settings in a checkpoint. BadInput if anything that a run continues with is missing or wrong."""
    with damage_reported(path):
        names, averages = dict(model.named_parameters()), saved["optimizer"]["state"]
        for name, p in names.items():
            shapes = [averages[name][which].shape for which in ("exp_avg", "exp_avg_sq")]
            expect(shapes == [p.shape] * 2, f"AdamW's averages of {name} have shapes {shapes}")
            averages[name]["step"].item()
        grouped = [name for group in saved["optimizer"]["param_groups"] for name in group["params"]]
        expect(sorted(grouped) == sorted(names), "AdamW's groups are not of these parameters")
        for name, kind in dict(step=int, log_bytes=int, seconds=float).items():
            value = saved[name]
            expect(type(value) is kind and value >= 0, f"{name} is {value!r}")
        for loss, targets in saved.get("history", []):
            expect(math.isfinite(loss + targets), "the losses since the last line of the log")
        known = [(field, saved["settings"].get(field.name)) for field in fields(Settings)]
        return {f.name: reader(type_of(f))(str(value)) for f, value in known if value is not None}


def check(settings, config):
    """Raises BadInput for settings that cannot be. Returns the number of windows in a micro-batch."""
    for name in ("steps", "batch_tokens", "micro_batch", "eval_every", "eval_tokens", "log_every"):
        value = getattr(settings, name)
        expect(value is None or 0 < value < 1 << 40, f"{name} is {value}: it must be from 1 to {1 << 40}")
    for name in ("warmup", "beta1", "beta2"):
        value = getattr(settings, name)
        expect(value < 1, f"{name} is {value}: it must be 0 or more, and below 1")
    expect(settings.min_lr <= settings.lr, f"min_lr is {settings.min_lr}: it must be at most lr")
    expect(settings.parallel in ("ddp", "fsdp"), f"parallel is {settings.parallel!r}: it must be ddp or fsdp")
    expect(settings.init_from or not settings.eval_only, "--eval_only needs a checkpoint: --init_from=FILE")
    expect(WORLD == 1 or not settings.eval_only, "--eval_only is for one process: run it without torchrun")
    sparse = replace(config, layers=update_layers(settings, config)[0])
    for layer in range(config.n_layer):
        fits = sparse.kind(layer).weights() == config.kind(layer).weights()
        expect(fits, f"--joint={sparse.layers} has other weights than --layers={config.layers}: change it")
    if settings.eval_only:
        return settings.micro_batch or max(1, RAT.LOSS_CHUNK // config.context)
    windows, rest = divmod(settings.batch_tokens, config.context)
    sizes = f"batch_tokens {settings.batch_tokens} is not a multiple of context {config.context}"
    expect(rest == 0, f"{sizes}: change one of them")
    micro_batch = settings.micro_batch or max(1, windows // WORLD)
    parts = f"{WORLD} processes with micro-batches of {micro_batch}: change batch_tokens or micro_batch"
    expect(windows % (WORLD * micro_batch) == 0, f"a batch of {windows} windows does not divide into {parts}")
    return micro_batch


def dry_run(settings, config, micro_batch):
    """Prints what the run would need."""
    config = replace(config, vocab_size=Data.read_meta(settings.data)["vocab_size"])
    with torch.device("meta"):
        model = RAT(config)
        cache = sum(cache_bytes(Cache(block.mixer, 1, config.context)) for block in model.blocks)
    parameters = sum(p.numel() for p in model.parameters())
    flops = sum(flops_per_token(replace(config, layers=layers)) for layers in update_layers(settings, config))
    tokens, windows = settings.steps * settings.batch_tokens, settings.batch_tokens // config.context
    say(f"parameters    {parameters / 1e6:,.1f} M")
    say(f"operations    {flops / 1e9:,.2f} GFLOP per token, {flops * tokens / 1e18:,.3g} EFLOP in all")
    say(f"steps         {settings.steps:,} of {settings.batch_tokens:,} tokens, {tokens / 1e9:,.2f} B")
    say(f"cache         {cache / config.context:,.0f} bytes per token in float32, if texts fill the context")
    accumulate = windows // WORLD // micro_batch
    say(f"a step        {micro_batch} windows x {accumulate} micro-batches x {WORLD} processes")


def compiles(settings, device):
    return device.type == "cuda" if settings.compile is None else settings.compile


def update_layers(settings, config):
    """What RAT.use is told before each update on a batch. Joint training makes two. (RAT+, section 4)"""
    return [config.layers] if settings.joint in (None, "none") else [settings.joint, config.layers]


def total(*numbers):
    """Each number, summed over the processes."""
    numbers = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: steering the loop waits for no GPU
    if WORLD > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


def say(*words, sep=" "):
    if RANK == 0:
        print(*words, sep=sep, flush=True)


class Run:
    """A model in training: compiled or wrapped as the settings say, with its optimizer."""

    def __init__(self, model, settings, micro_batch, optimizer_state=None):
        self.model, self.wrapped, self.settings, self.micro_batch = model, model, settings, micro_batch
        self.device = next(model.parameters()).device
        self.dtype = pick_dtype(settings.dtype, self.device)
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.optimize_ddp = False  # each block is a graph of its own, and small
        torch._dynamo.config.recompile_limit = 64  # all layers are one function: kinds and patterns add up
        self.compiled = compiles(settings, self.device)
        if self.compiled:
            model.nats = torch.compile(model.nats, dynamic=False)
        for block in model.blocks:
            if settings.recompute:  # compiled inside of the checkpoint, which never is
                forward = torch.compile(block.forward, dynamic=False) if self.compiled else block.forward
                block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
            elif self.compiled:
                block.compile(dynamic=False)  # all blocks share their compiled code
        if WORLD > 1 and settings.parallel == "fsdp":
            # Gather float32 and let autocast round, as in one process: gathering bfloat16 would halve the
            # traffic, but round the residual stream, norms and forget biases as well.
            for module in (*model.blocks, model):
                fully_shard(module)
        elif WORLD > 1:
            self.wrapped = DistributedDataParallel(model)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas, fused = (settings.beta1, settings.beta2), self.device.type != "mps"
        self.optimizer = torch.optim.AdamW(groups, settings.lr, betas, fused=fused)
        if optimizer_state:
            set_optimizer_state_dict(model, self.optimizer, optimizer_state, options=WHOLE)
            for group, decay in zip(self.optimizer.param_groups, (settings.weight_decay, 0.0)):
                group |= {"weight_decay": decay, "betas": betas}  # a flag may change them

    def autocast(self):
        enabled, sharded = self.dtype != torch.float32, WORLD > 1 and self.settings.parallel == "fsdp"
        # Autocast's cache would keep copies of all the weights that FSDP gathers block by block.
        return torch.autocast(self.device.type, self.dtype, enabled, cache_enabled=not sharded)

    def micro_batches(self, inputs, targets, all_targets):
        """(inputs, targets, share of all targets) of each: losses times shares add up to the batch's mean."""
        for rows in range(0, len(inputs), self.micro_batch):
            x, y = (torch.from_numpy(part[rows : rows + self.micro_batch]) for part in (inputs, targets))
            if self.device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            share = (y != -100).sum().item() / max(1, all_targets)
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True), share

    def loss(self, x, y):
        with self.autocast():
            return self.wrapped(x, y)[1]

    def update(self, parts, lr):
        """One step of AdamW. Returns this process's share of the loss and the gradient's norm, as tensors."""
        loss = 0.0
        for x, y, share in parts:
            # DDP sums gradients over the processes once, with the last part. FSDP does so with every part:
            # it never holds whole gradients.
            if self.wrapped is not self.model:
                self.wrapped.require_backward_grad_sync = x is parts[-1][0]
            part = share * self.loss(x, y)
            (WORLD * part).backward()  # the sum over processes comes divided by their number
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def evaluate(self, sample):
        """Of this process's share of windows (inputs, targets), target by target: nats, hits, targets.

        All three are (windows, context). A hit: the target is the likeliest token. No target: 0 nats, no hit.
        """
        # Micro-batches of one size, so that nothing compiles again: rows without targets fill up the last.
        rows = ((0, -len(sample[0]) % (WORLD * self.micro_batch)), (0, 0))
        inputs, targets = (np.pad(x, rows, constant_values=fill) for x, fill in zip(sample, (0, -100)))
        inputs, targets, noted = inputs[RANK::WORLD], targets[RANK::WORLD], []

        def note(x, y):  # what RAT.nats computes, before it is summed
            logits = self.model.head(x).float()
            noted.append((cross_entropy(logits, y, reduction="none"), logits.argmax(-1) == y))
            return noted[-1][0].sum()

        usual, self.model.nats = self.model.nats, note
        try:
            for x, y, _ in self.micro_batches(inputs, targets, 1):
                self.loss(x, y)
        finally:
            self.model.nats = usual
        nats, hits = (torch.cat(column).view(targets.shape).cpu() for column in zip(*noted))
        return nats.double(), hits, torch.from_numpy(targets)

    def validate(self, sample, layers):
        """The validation loss of windows (inputs, targets) with layers, and the share of targets hit."""
        self.model.use(layers)
        nats, hits, targets = self.evaluate(sample)
        nats, hits, targets = total(nats.sum(), hits.sum(), (targets != -100).sum())
        return nats / targets, hits / targets

    def print_evaluation(self, sample, answers, end_of_text):
        """Prints the validation loss, that of each sixteenth of the context, and what the gates remember."""
        context = self.model.config.context
        nats, hits, targets = self.evaluate(sample)
        wanted = targets != -100
        loss = (nats.sum() / wanted.sum()).item()
        bits = bits_per_nat(self.model.tokenizer, sample[1])
        say(f"validation loss {loss:.4f} nats per token{bits(loss)}, {int(wanted.sum()):,} tokens")
        if answers:
            asked, wrong = wanted.any(1), (wanted & ~hits).any(1)
            share, whole = (hits.sum() / wanted.sum()).item(), 1 - (wrong.sum() / asked.sum()).item()
            right = f"{share:.1%} of their tokens, all of them in {whole:.1%} of {asked.sum():,} windows"
            say(f"answers right: {right}")
            found = np.array(list(depths(*sample, hits.numpy(), end_of_text))).reshape(-1, 2)
            for tenth in range(10):
                right = found[(found[:, 0] * 10).astype(int) == tenth, 1]
                if len(right):
                    depth = f"{tenth * 10:>2} to {tenth * 10 + 10:>3}%"
                    say(f"answers found at {depth} of the window: {right.mean():.1%} of {len(right):,} right")
        for first in range(0, context, -(-context // 16)):
            part = slice(first, min(context, first + -(-context // 16)))
            if wanted[:, part].any():
                loss = (nats[:, part].sum() / wanted[:, part].sum()).item()
                say(f"positions {first:>7,} to {part.stop - 1:>7,}: {loss:.4f}")
        some = sample[0][:: -(-len(sample[0]) // self.micro_batch)]  # a micro-batch, from all over
        self.print_memories(torch.from_numpy(some).to(self.device))

    @torch.no_grad()
    def print_memories(self, tokens):
        """Prints 1 / (1 - g), how many tokens a state sums up: its distribution over tokens and channels."""
        x, rows = self.model.embedding(tokens), []
        for layer, block in enumerate(self.model.blocks):
            mixer = block.mixer
            with self.autocast():
                if mixer.kind.restart:
                    g = mixer.in_proj(block.mixer_norm(x)).split(mixer.sizes, dim=-1)[2].float()
                    g = g + (mixer.forget_bias if mixer.kind.timespan else 0)
                    octave = (softplus(g) / math.log(2)).int().clamp(0, 8)  # of 1 + exp(g)
                    shares = octave.flatten().bincount(minlength=9) / octave.numel()
                    rows.append(f"layer {layer:<17}" + "".join(f"{share:>7.1%}" for share in shares.tolist()))
                x = block(x)
        if rows:
            say("tokens remembered, from" + "".join(f"{2**n:>7}" for n in range(9)), *rows, sep="\n")

    def save(self, step, **more):
        """Writes ckpt.pt, and with --keep a copy of it, ckpt-STEP.pt, if all that is in it is finite."""
        weights, state = get_state_dict(self.model, self.optimizer, options=WHOLE)
        if RANK == 0:
            folder, more = Path(self.settings.out), more | {"step": step, "settings": asdict(self.settings)}
            averages = [tensor for each in state["state"].values() for tensor in each.values()]
            finite = all(torch.isfinite(tensor).all() for tensor in (*weights.values(), *averages))
            expect(finite, f"step {step}: weights are no longer finite; a lower --lr may help")
            self.model.save(folder / "ckpt.pt", weights, optimizer=state, **more)
            if self.settings.keep:
                with atomic(folder / f"ckpt-{step:07d}.pt") as partial:
                    shutil.copyfile(folder / "ckpt.pt", partial)
                names = (re.fullmatch(r"ckpt-(\d{7}|[1-9]\d{7,})\.pt", name) for name in os.listdir(folder))
                steps = sorted(int(name[1]) for name in names if name and int(name[1]) <= step)
                for old in steps[: -self.settings.keep]:
                    os.remove(folder / f"ckpt-{old:07d}.pt")
        total(0)  # wait for the writer: torchrun kills all processes once one exits


def depths(inputs, targets, hits, end_of_text):
    """For each answer that occurs once earlier in its window: where, from 0 to 1, and whether it is right."""
    for tokens, wanted, hit in zip(inputs, targets, hits):
        asked = (wanted != -100) & (wanted != end_of_text)
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            answer, before = wanted[start:end], tokens[: start + 1]
            places = np.flatnonzero(before == answer[0])
            places = [n for n in places if np.array_equal(before[n : n + len(answer)], answer)]
            if len(places) == 1:
                yield places[0] / len(tokens), hit[start:end].all()


def train(run, train_data, sample, answers, saved, signals):
    """The training loop, from where `saved` ended. Returns 0, or the number of the signal that ended it.

    sample: windows to evaluate on; answers: whether their targets are answers alone; signals: a list that
    grows when the run is to end after the step under way
    """
    settings, config, first_step = run.settings, run.model.config, saved.get("step", 0)
    patterns = update_layers(settings, config)
    names = ["_sparse", ""][-len(patterns) :]
    windows, path = settings.batch_tokens // config.context, os.path.join(settings.out, "ckpt.pt")
    bits = bits_per_nat(run.model.tokenizer, sample[1])
    flops = sum(flops_per_token(replace(config, layers=layers)) for layers in patterns)
    peak = peak_flops(run.device, run.dtype)
    where = f"{WORLD} x {run.device.type} in {str(run.dtype)[6:]}"
    where += f", {settings.parallel}" * (WORLD > 1) + ", compiled" * run.compiled
    say(f"run: steps {first_step} to {settings.steps} of {settings.batch_tokens} tokens on {where}")

    if RANK == 0:
        for old in Path(settings.out).glob("ckpt*.pt.????????.partial"):  # of a run that was killed
            shutil.rmtree(old, ignore_errors=True)
        log = open(os.path.join(settings.out, "log.jsonl"), "a")
        log.seek(log.truncate(min(log.tell(), saved.get("log_bytes", 0))))  # later than the checkpoint
    # Of each update since the log's last line: loss and targets of all processes, as the checkpoint has them;
    # and of those after it loss, norm of the gradient, targets, on this one's device.
    alike = saved.get("settings", {}).get("joint") == settings.joint
    history, updates = saved.get("history", []) if alike else [], []
    mark = time.perf_counter()
    started = mark - saved.get("seconds", 0.0)
    mine = slice(RANK * windows // WORLD, (RANK + 1) * windows // WORLD)
    batches = prefetch(train_data.batch(n, windows, mine) for n in range(first_step, settings.steps))
    for step, batch in enumerate(batches, first_step + 1):
        lr = learning_rate(step, settings)
        targets, stopping = total((batch[1] != -100).sum(), len(signals))
        parts = list(run.micro_batches(*batch, targets))
        for layers in patterns:
            run.model.use(layers)
            updates.append((*run.update(parts, lr), targets))
        evaluating = step % settings.eval_every == 0 or step == settings.steps
        logging = step % settings.log_every == 0 or evaluating
        if not logging and not stopping:
            continue
        losses, norms, counts = zip(*updates)
        losses, norms = torch.stack(losses).tolist(), torch.stack(norms).tolist()  # waits for the device
        losses = total(*losses)
        for n, (loss, norm) in enumerate(zip(losses, norms), 1):
            bad = step - (len(losses) - n) // len(patterns)
            what = f"loss {loss}, norm of the gradient {norm}, lr {learning_rate(bad, settings):.2e}"
            expect(math.isfinite(loss + norm), f"step {bad}: {what}; a lower --lr may help")
        history += zip(losses, counts)
        now = time.perf_counter()
        rate, seconds = len(updates) / len(patterns) * settings.batch_tokens / (now - mark), now - started
        if logging:
            record = dict(step=step, tokens=step * settings.batch_tokens)
            for n, name in enumerate(names):
                losses, counts = zip(*history[n :: len(names)])
                nats = sum(loss * count for loss, count in zip(losses, counts))
                record[f"train_loss{name}"] = nats / max(1, sum(counts))
            record |= dict(lr=lr, grad_norm=norms[-1], tokens_per_second=rate, seconds=seconds)
            if peak:
                record["mfu"] = rate * flops / (WORLD * peak)
            if evaluating:
                for name, layers in zip(names, patterns):
                    loss, accuracy = run.validate(sample, layers)
                    expect(math.isfinite(loss), f"step {step}: validation loss {loss}; a lower --lr may help")
                    record[f"val_loss{name}"] = loss
                    if answers:
                        record[f"val_accuracy{name}"] = accuracy
            if RANK == 0:
                print(json.dumps(record, allow_nan=False), file=log, flush=True)
            history = []
        if evaluating or stopping:
            kept = dict(seconds=seconds, history=history, data=saved["data"])
            run.save(step=step, log_bytes=log.tell() if RANK == 0 else 0, **kept)
        if logging and RANK == 0:
            progress(progress_line(record, settings, bits), last=evaluating)
        if stopping and step < settings.steps:
            say(f"\nstopped after step {step}: python train.py --resume --out={settings.out} continues")
            return (signals or [signal.SIGTERM])[0]
        updates, mark = [], time.perf_counter()
    spent = timedelta(seconds=round(time.perf_counter() - started))
    say(f"\n{spent} of training, validation loss {record['val_loss']:.3f} nats per token, in {path}")
    return signals[0] if signals else 0


def progress_line(record, settings, bits):
    """What a person wants to see of a record of log.jsonl: the time left, or the validation loss."""
    text = f"step {record['step']}/{settings.steps}"
    for name in ("train", "val"):
        if f"{name}_loss" in record:
            text += f"  {name} {record[f'{name}_loss']:.3f}"
        if f"{name}_loss_sparse" in record:
            text += f" (sparse {record[f'{name}_loss_sparse']:.3f})"
    text += bits(record["val_loss"]) if "val_loss" in record else ""
    text += f"  {record['val_accuracy']:.1%} of answer tokens right" if "val_accuracy" in record else ""
    text += f"  {record['tokens_per_second']:,.0f} tokens/s"
    text += f"  {record['mfu']:.0%} MFU" if "mfu" in record else ""
    left = (settings.steps - record["step"]) * settings.batch_tokens / record["tokens_per_second"]
    return text if "val_loss" in record else f"{text}  {timedelta(seconds=round(left))} left"


def learning_rate(step, settings):
    """Linear warmup to lr, then a cosine that reaches min_lr at the last step; steps count from 1."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step <= warmup:
        return settings.lr * step / warmup
    part = (step - 1 - warmup) / max(1, settings.steps - 1 - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * part)) / 2


def bits_per_nat(tokenizer_name, targets):
    """A function from nats per token to text such as " (2.03 bits/byte)", which compares tokenizers fairly.

    Bytes per token are those of the validation targets. Without the tokenizer the text is empty.
    """
    try:
        tokenizer = get_tokenizer(tokenizer_name)
    except BadInput as error:
        say(f"no bits per byte and no sample: {error}")
        return lambda nats: ""
    tokens = targets[targets >= 0].tolist()
    size, largest = tokenizer.n_vocab, max(tokens)
    wrong = f"the data contains token {largest}, {tokenizer_name} has {size}: prepare it again"
    expect(largest < size, wrong)
    text = b"".join(tokenizer.decode_single_token_bytes(t) for t in tokens if t != tokenizer.eot_token)
    return lambda nats: f" ({nats / math.log(2) * len(tokens) / max(1, len(text)):.3f} bits/byte)"


def write_sample(path, windows, answers, settings, device):
    """Continues a piece of the validation data; if it has answers, gives the first of them."""
    model = RAT.load(path, device)
    try:
        text = TextStream(get_tokenizer(model.tokenizer))
    except BadInput:
        return
    inputs, asked = windows[0], windows[1] != -100
    row, length, new = (1 if len(inputs) > 2 else 0), 96, settings.sample_tokens
    if answers:
        row = asked.any(axis=1).argmax()
        length = asked[row].argmax() + 1
        new = min(new, (~np.append(asked[row, length - 1 :], False)).argmax())
    prompt = inputs[row, :length].tolist()
    print("\n--- A piece of the validation data:\n" + "".join(map(text, prompt)))
    tokens = torch.tensor([prompt], device=device)
    stop = text.tokenizer.eot_token
    drawn = model.generate(tokens, int(new), temperature=0.8, seed=settings.seed, stop=stop)
    continued = "".join(text(token.item()) for token in drawn if token != stop)
    print(f"--- and how the model continues it (temperature 0.8):\n{continued}")


def compare_runs(pattern, picture):
    """Prints the validation results, over the steps, of all runs whose log.jsonl matches the pattern.

    Runs in folders NAME/1, NAME/2 and so on make one line: the mean, at the end with the standard deviation.
    """
    runs, needed = {}, {"tokens", "tokens_per_second"}
    titles = {"val_loss": "validation loss, nats per token", "val_accuracy": "answers right"}
    for path in sorted(map(Path, glob.glob(pattern, recursive=True))):
        name = str(path.parent.parent if path.parent.name.isdecimal() else path.parent)
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()]
            records = {int(record["step"]): record for record in records if "val_loss" in record}
            for step, record in records.items():
                keys = needed | titles.keys() & record.keys()
                records[step] = {key: float(record[key]) for key in keys}
        except Exception as error:  # a line of somebody else's can raise anything
            raise BadInput(f"{path} is not a log.jsonl of train.py") from error
        if records:
            runs.setdefault(name, []).append(records)
    expect(runs, f"no run matches {pattern!r}: name the log.jsonl of some that have been evaluated")
    steps = sorted({step for seeds in runs.values() for records in seeds for step in records})
    stride, panels = math.ceil(len(steps) / 8), {}
    columns = steps[stride - 1 : -1 : stride]  # at most 7, and the last
    width = max(map(len, ("after step", *runs)))
    for key, title in titles.items():
        rows, lines = [], {}
        for name, seeds in runs.items():
            shared = [step for step in steps if all(key in records.get(step, {}) for records in seeds)]
            if shared:
                means = {step: statistics.mean(records[step][key] for records in seeds) for step in shared}
                cells = (f"{means[step]:.3f}" if step in means else "" for step in columns)
                ends = [records[shared[-1]] for records in seeds]
                spread = f" ± {statistics.stdev(end[key] for end in ends):.3f}" if len(ends) > 1 else ""
                row = f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in cells)
                rate = statistics.mean(end["tokens_per_second"] for end in ends)
                rows.append(f"{row}{means[shared[-1]]:>10.3f}{spread:<8}{rate:>10,.0f}{len(ends):>6}")
                lines[name] = [seeds[0][step]["tokens"] for step in shared], list(means.values())
        if rows:
            header = f"{'after step':<{width}}" + "".join(f"{step:>8,}" for step in columns)
            print(f"{title}\n{header}{'the last':>10}{'tokens/s':>18}{'runs':>6}", *rows, "", sep="\n")
            panels[title] = lines
    if picture:
        draw(picture, panels, "tokens", "", yscale="linear")


if __name__ == "__main__":
    run(main)
