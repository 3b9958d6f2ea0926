"""Trains a language model of rat.py on a folder of shards.

    python train.py                                           a small RAT on the standard library's sources, in minutes
    python train.py --layers=attention --out=out/attention    the same with plain attention
    python train.py --resume                                  goes on with the run in out/ckpt.pt
    python train.py --layers=rat+ --out=out/rat+              RAT+, trained jointly: sparse and dense in turn
    python train.py --init_from=out/rat+/ckpt.pt --dilation=16 --eval_only                the loss with every 16th key
    python train.py --init_from=out/rat+/ckpt.pt --dilation=16 --lr=4e-4 --out=out/d16    adaptation to that pattern
    torchrun --standalone --nproc_per_node=8 train.py --preset=rat-1b --data=data/fineweb-edu --out=out/rat-1b

Each setting below is a flag, --name=value, and so is each field of rat.Config.
"""

import ctypes
import functools
import gc
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from prepare_data import Data, TextStream, get_tokenizer, parse_command_line, prefetch, prepare_stdlib, progress, run
from rat import RAT, Block, Config, expect


@dataclass
class Settings:
    """Settings of train.py"""

    preset: str | None = None  # sizes and recipe of the papers, such as rat-1b or attention-200m; other flags go first
    data: str = "data/stdlib"  # folder of shards; data/stdlib is prepared if it is missing
    out: str = "out"  # folder of the checkpoint, ckpt.pt, and of log.jsonl, a line for each evaluation
    resume: bool = False  # go on from that checkpoint, with its settings unless a flag changes them
    init_from: str | None = None  # a checkpoint to begin with; dilation, window, sinks and context may differ from its own
    joint: bool | None = None  # rat+: update twice per batch, with a sparse pattern, then dense (true if dense and from scratch)
    joint_dilation: int = 64  # the sparse pattern of joint training
    eval_only: bool = False  # print the validation loss of init_from, and stop
    by_position: bool = False  # with eval_only: the loss by position in the context too
    dry_run: bool = False  # print sizes, operations and an estimate of the memory, and stop
    steps: int = 800  # optimizer steps
    batch_tokens: int = 4096  # tokens per step, over all processes
    micro_batch: int | None = None  # windows per process and forward pass, where a whole batch needs too much memory
    parallel: str = "ddp"  # under torchrun, each process has all of the model (ddp) or a part of it (fsdp)
    recompute: bool = False  # less memory for more time: the backward pass computes each block again
    lr: float = 4e-3  # peak learning rate: linear warmup, then a cosine to min_lr
    min_lr: float = 1e-6  # learning rate of the last step
    warmup: float = 0.05  # part of the steps that is warmup
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # of AdamW, for matrices
    clip: float = 1.0  # a gradient of larger norm is scaled down to it; 0: never
    eval_every: int = 200  # steps from one evaluation and checkpoint to the next
    eval_tokens: int = 131072  # tokens to evaluate on, spread evenly over the validation data
    keep: int = 0  # checkpoints to keep beside ckpt.pt, the newest ones, as ckpt-STEP.pt
    log_every: int = 20  # steps from one line of progress to the next
    sample_tokens: int = 160  # length of the text written at the end; 0: none
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 if the hardware multiplies in it
    compile: bool | None = None  # torch.compile: a slow start, then faster steps (true on CUDA, else false)


# The papers' models of 1.3 B parameters and their recipe, 100 B tokens; and a size for one GPU. (RAT, experiments)
SIZES = {
    "7b": dict(n_layer=32, d_model=4096, n_head=32, context=4096, batch_tokens=768 * 4096, micro_batch=1, steps=31789, lr=6e-4, parallel="fsdp"),
    "3b": dict(n_layer=28, d_model=2560, n_head=20, context=4096, batch_tokens=640 * 4096, micro_batch=2, steps=38147, lr=7e-4),
    "1b": dict(n_layer=24, d_model=2048, n_head=16, context=4096, batch_tokens=1 << 21, micro_batch=4, steps=47684, lr=8e-4),
    "200m": dict(n_layer=12, d_model=1024, n_head=16, context=4096, batch_tokens=1 << 19, micro_batch=8, steps=10000, lr=8e-4),
}
KINDS = {"rat": "rat", "attention": "attention", "rnn": "rnn", "rat-swa": "rat,swa", "attention-swa": "attention,swa", "rat+": "rat+"}
COMMON = dict(data="data/fineweb-edu", eval_every=500, eval_tokens=1 << 21, log_every=10)
PRESETS = {f"{kind}-{size}": COMMON | SIZES[size] | {"layers": layers} for size in ("1b", "200m") for kind, layers in KINDS.items()}
PRESETS |= {f"rat+-{size}": COMMON | SIZES[size] | {"layers": "rat+"} for size in ("3b", "7b")}

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16


def main():
    values, model_values = parse_command_line(Settings, Config, hidden=("vocab_size",))
    if values.get("preset"):
        name = values["preset"]
        expect(name in PRESETS, f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
        values = {k: v for k, v in PRESETS[name].items() if k in Settings.__dataclass_fields__} | values
        model_values = {k: v for k, v in PRESETS[name].items() if k in Config.__dataclass_fields__} | model_values
    settings, saved, initial = Settings(**values), None, None
    path = os.path.join(settings.out, "ckpt.pt")
    if settings.resume:
        config = RAT.load(path).config  # or one clear line about the file
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        expect("optimizer" in saved, f"{path} has weights but no optimizer state: it can be sampled, not resumed")
        settings = replace(Settings(**saved["settings"]), **(values | {"out": settings.out}))
        for name, value in model_values.items():
            now = getattr(config, name)
            expect(value == now, f"--{name}={value}: the model in {path} has {now}, and a resumed run keeps its model")
    elif settings.init_from:
        initial = RAT.load(settings.init_from, **model_values)
        config = initial.config
    else:
        config = Config(**model_values)
    check(settings)
    if settings.joint is None:
        settings.joint = initial is None and saved is None and joint_fits(config)
    expect(not settings.joint or joint_fits(config), "joint training is for layers that are all rat+ with a recurrence, and sets their "
           "pattern itself: leave dilation, window and sinks out, or --joint=false trains one pattern")  # fmt: skip

    # The processes: one, or those that torchrun has started. Sums over them that steer the loop go over the CPU.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else None)
    dtype = pick_dtype(settings.dtype, device)
    if settings.eval_only:
        settings.batch_tokens = world * (settings.micro_batch or 4096 // config.context or 1) * config.context
    windows, rest = divmod(settings.batch_tokens, config.context)
    expect(rest == 0, f"batch_tokens {settings.batch_tokens} is not a multiple of context {config.context}: change one of them")
    micro_batch = settings.micro_batch or max(1, windows // world)
    expect(windows % (world * micro_batch) == 0, f"a batch of {windows} windows does not divide into {world} processes with "
           f"micro-batches of {micro_batch}: change batch_tokens or micro_batch")  # fmt: skip
    if settings.dry_run:
        return dry_run(settings, config, dtype, world, micro_batch)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    stopped_by = train(settings, config, saved, initial, device, dtype, rank, world, micro_batch)
    if world > 1:
        gc.collect()  # models and optimizers hold on to the process group
        dist.destroy_process_group()
    if stopped_by:
        sys.exit(128 + stopped_by)
    if rank == 0 and not settings.eval_only:
        if settings.sample_tokens:
            write_sample(path, device, settings)
        print(f"\nNext: python sample.py --ckpt={path}")
        print(f"      python train.py --data={settings.data} --layers=attention --out={settings.out}/attention   (or rnn, rat,swa, rat+)")
        print(f"      python train.py --resume --out={settings.out} --steps={2 * settings.steps}")


def joint_fits(config):
    """Can the recipe of RAT+ train this model: sparse and dense in turn?"""
    names = {config.of_layer("layers", layer) for layer in range(config.n_layer)}
    return names == {"rat+"} and config.recurrence is not False and config.dilation in (None, 1, "1") and config.window is config.sinks is None


def update_patterns(settings, config):
    """What RAT.use is told for each update on a batch: RAT+'s joint training makes two, with few keys and with all."""
    return [{"dilation": settings.joint_dilation}, {"dilation": config.dilation}] if settings.joint else [{}]


def train(settings, config, saved, initial, device, dtype, rank, world, micro_batch):
    """The run, from data and model to the last checkpoint. Returns 0, or the number of the signal that ended it."""
    path, windows = os.path.join(settings.out, "ckpt.pt"), settings.batch_tokens // config.context

    def total(*numbers):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        if world > 1:
            dist.all_reduce(numbers)
        return numbers.tolist()

    def say(*words, **options):
        if rank == 0:
            print(*words, **options)

    # Data.
    if settings.data == "data/stdlib" and not os.path.exists(settings.data) and rank == 0:
        prepare_stdlib(settings.data)
    total(0)  # the other processes wait for the data
    train_data, val_data = (Data(settings.data, split, config.context, settings.seed) for split in ("train", "val"))
    meta = train_data.meta
    if initial is not None:
        expect(initial.tokenizer in ("", meta["tokenizer"]) and meta["vocab_size"] <= config.vocab_size,
               f"{settings.data} is in tokens of {meta['tokenizer']}, {settings.init_from} in {config.vocab_size} of {initial.tokenizer or 'its own'}")  # fmt: skip
        if not initial.tokenizer and meta["vocab_size"] != config.vocab_size:
            say(f"note: {settings.init_from} knows {config.vocab_size} tokens, {settings.data} is in {meta['vocab_size']} of {meta['tokenizer']}: "
                "a loss says nothing unless they are its own")  # fmt: skip
        initial.tokenizer = meta["tokenizer"]
    val_sample = val_data.sample(max(1, settings.eval_tokens // config.context))
    if saved is not None:
        expect(saved["tokenizer"] == meta["tokenizer"],
               f"{settings.data} is in tokens of {meta['tokenizer']}, the model in {path} in those of {saved['tokenizer']}")  # fmt: skip

    new = saved is not None or settings.eval_only or not os.path.exists(path)
    expect(new, f"{path} is there already: --resume goes on with it, another --out starts beside it")

    # Model and optimizer.
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # all layers are one function: kinds, patterns and batch sizes add up
    if initial is None:
        initial = RAT(replace(config, vocab_size=meta["vocab_size"]) if saved is None else config, meta["tokenizer"])
    model = initial.to(device)
    patterns = update_patterns(settings, config)
    use_compile = device.type == "cuda" if settings.compile is None else settings.compile
    for block in model.blocks:
        if use_compile and settings.recompute:
            block.forward = torch.compile(block.forward)  # inside the checkpoint, which is never compiled
        elif use_compile:
            block.compile()  # all blocks share their compiled code
        if settings.recompute:
            recompute(block)
    trained = model  # what the loop calls
    if world > 1 and settings.parallel == "fsdp":
        # Inputs as they are: a rotary table in bfloat16 would turn by other angles.
        policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy)
    elif world > 1:
        trained = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, (settings.beta1, settings.beta2), fused=device.type != "mps")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # a checkpoint does not know how many processes wrote it
    first_step = 0
    if saved is not None:
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=whole)
        first_step = saved["step"]
        del saved
    expect(first_step < settings.steps, f"{path} has made all its {first_step} steps already: --steps=N with a larger N goes on")

    def save(done):
        weights, state = get_state_dict(model, optimizer, options=whole)
        if rank == 0:
            os.makedirs(settings.out, exist_ok=True)
            model.save(path, model=weights, optimizer=state, step=done, settings=asdict(settings))
            if settings.keep:
                kept = Path(settings.out, f"ckpt-{done:07d}.pt")
                kept.unlink(missing_ok=True)
                try:
                    os.link(path, kept)  # a second name: takes no room until ckpt.pt is replaced
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, kept)
                for old in sorted(Path(settings.out).glob("ckpt-*.pt"))[: -settings.keep]:
                    old.unlink()

    def micro_batches(inputs, targets, all_targets):
        """Pairs on the device, each with its share of all the batch's targets: losses times shares add up to the mean."""
        for rows in range(0, len(inputs), micro_batch):
            x, y = (torch.from_numpy(part[rows : rows + micro_batch]) for part in (inputs, targets))
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True), (y != -100).sum().item() / all_targets

    def loss_of(x, y):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return trained(x, y)[1]

    @torch.no_grad()
    def evaluate(pattern):
        """Validation loss with that pattern."""
        model.use(**pattern)
        # Each process takes its rows, as many as the others: rows without targets fill up the last ones.
        short = -len(val_sample[0]) % world
        inputs, targets = (np.pad(part, ((0, short), (0, 0)), constant_values=fill) for part, fill in zip(val_sample, (0, -100)))
        mine = slice(rank, None, world)
        all_targets = (targets != -100).sum()
        return total(sum(share * loss_of(x, y).item() for x, y, share in micro_batches(inputs[mine], targets[mine], all_targets)))[0]

    @torch.no_grad()
    def evaluate_positions():
        """Mean validation loss of each sixteenth of the context, (first position, loss) each."""
        sums, counts = torch.zeros(2, config.context, dtype=torch.float64)
        for x, y in zip(*(torch.from_numpy(part).to(device) for part in val_sample)):  # a window at a time: logits take room
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(x[None])[0][0]
            sums += torch.nn.functional.cross_entropy(logits.float(), y, reduction="none", ignore_index=-100).cpu()
            counts += (y != -100).cpu()
        bins = [slice(i * config.context // 16, (i + 1) * config.context // 16) for i in range(16)]
        return [(part.start, (sums[part].sum() / counts[part].sum()).item()) for part in bins if counts[part].sum()]

    def sync_gradients(on):
        """Gradients are summed over the processes with a step's last micro-batch only."""
        if trained is not model:
            trained.require_backward_grad_sync = on
        elif world > 1:
            model.set_requires_gradient_sync(on)

    bits = bits_per_byte(meta["tokenizer"], val_sample[1], say)
    flops, peak = sum(flops_per_token(replace(model.config, **pattern)) for pattern in patterns), peak_flops(device, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {config.layers}, {config.n_layer} layers of width {config.d_model}, {parameters / 1e6:.2f} M parameters")
    say(f"data: {settings.data}, {len(train_data) * config.context / 1e6:.1f} M tokens ({meta['tokenizer']}) in windows of {config.context}")
    if settings.eval_only:
        val_loss = evaluate({})
        say(f"validation loss {val_loss:.4f} nats per token{bits(val_loss)}, {(val_sample[1] != -100).sum():,} tokens")
        for first, loss in evaluate_positions() if settings.by_position else ():
            say(f"from position {first:>7,}: {loss:.4f}")
        return 0
    beside = lambda sparse: "".join(f" and {loss:.3f} at D={settings.joint_dilation}" for loss in sparse)
    say(f"run: steps {first_step} to {settings.steps} of {settings.batch_tokens} tokens on {world} x {device.type} in {str(dtype)[6:]}"
        + f", {settings.parallel}" * (world > 1) + ", compiled" * use_compile)  # fmt: skip
    log = Log(settings.out, first_step) if rank == 0 else None

    # The first SIGTERM or Ctrl-C ends the run after the step under way, the second at once.
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (signals.append(number), signal.signal(number, signal.SIG_DFL)))

    losses, norms, validation, last_good = [], [], "", path if first_step else "none"
    started = mark = time.perf_counter()
    rows = slice(rank * windows // world, (rank + 1) * windows // world)
    for step, batch in enumerate(prefetch(train_data.batch(n, windows, rows) for n in range(first_step, settings.steps)), first_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        all_targets, stopping = total((batch[1] != -100).sum(), len(signals))
        parts = list(micro_batches(*batch, all_targets))
        for pattern in patterns:
            model.use(**pattern)
            loss = 0.0
            for x, y, share in parts:
                sync_gradients(x is parts[-1][0])
                part = share * loss_of(x, y)
                (world * part).backward()  # the sum over processes comes divided by their number
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

        done = step + 1
        evaluating = done % settings.eval_every == 0 or done == settings.steps
        if done % settings.log_every == 0 or evaluating or stopping:
            # The one place that waits for the device.
            loss_values = total(*torch.stack(losses).tolist())
            for n, (loss, norm) in enumerate(zip(loss_values, torch.stack(norms).tolist()), done * len(patterns) - len(losses)):
                n //= len(patterns)
                if not math.isfinite(loss + norm):
                    raise FloatingPointError(f"step {n + 1}: loss {loss}, norm of the gradient {norm}, at a learning rate of "
                                             f"{learning_rate(n, settings):.2e}; last good checkpoint: {last_good}")  # fmt: skip
            *sparse, loss = (statistics.mean(loss_values[n :: len(patterns)]) for n in range(len(patterns)))
            rate = len(losses) / len(patterns) * settings.batch_tokens / (time.perf_counter() - mark)
            mfu = rate * flops / (world * peak) if peak else None
            if evaluating:
                *val_sparse, val_loss = (evaluate(pattern) for pattern in patterns)
                validation = f"val {val_loss:.3f}{bits(val_loss)}{beside(val_sparse)}  "
                if log:
                    both = {"train_loss_sparse": sparse[0], "val_loss_sparse": val_sparse[0]} if sparse else {}
                    log.write(**both, step=done, tokens=done * settings.batch_tokens, train_loss=loss, val_loss=val_loss,
                              lr=learning_rate(step, settings), tokens_per_second=rate, mfu=mfu,
                              seconds=time.perf_counter() - started)  # fmt: skip
            if evaluating or stopping:
                save(done)  # after the log: lines beyond the checkpoint are dropped on resuming, missing ones stay missing
                last_good = path
            if rank == 0:
                left = (settings.steps - done) * settings.batch_tokens / rate
                progress(f"step {done:>5}/{settings.steps}  train {loss:.3f}{bits(loss)}{beside(sparse)}  {validation}{rate:>9,.0f} tokens/s  "
                         + (f"{mfu:.1%} MFU  " if mfu else "") + f"{minutes(left)} left", last=evaluating)  # fmt: skip
            losses, norms, mark = [], [], time.perf_counter()
        if stopping and done < settings.steps:
            say(f"\nstopped after step {done}: python train.py --resume --out={settings.out} goes on")
            return (signals or [signal.SIGTERM])[0]
    say(f"\n{minutes(time.perf_counter() - started)} of training, validation loss {val_loss:.3f}{beside(val_sparse)} nats per token, in {path}")
    return 0


class Log:
    """out/log.jsonl: one line of JSON for each evaluation. A resumed run drops the lines after its checkpoint."""

    def __init__(self, folder, first_step):
        self.path = Path(folder, "log.jsonl")
        kept = []
        for line in self.path.read_text().splitlines() if first_step and self.path.exists() else []:
            try:
                kept += [f"{line}\n"] if json.loads(line)["step"] <= first_step else []
            except ValueError:
                pass  # cut off by a kill
        os.makedirs(folder, exist_ok=True)
        partial = Path(folder, "log.jsonl.partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def write(self, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def check(settings):
    least = dict(steps=1, batch_tokens=1, eval_every=1, eval_tokens=1, log_every=1, micro_batch=1, keep=0, lr=0, min_lr=0, clip=0, seed=0)
    for name, value in least.items():
        given = getattr(settings, name)
        expect(given is None or given >= value, f"{name} is {given}: it must be {value} or more")
    expect(0 <= settings.warmup <= 1, f"warmup is {settings.warmup}: it is a part of the steps, 0 to 1")
    expect(settings.seed < 1 << 63, f"seed is {settings.seed}: it must be below 2**63")
    expect(settings.init_from or not settings.eval_only, "--eval_only wants a checkpoint: --init_from=FILE")
    expect(settings.eval_only or not settings.by_position, "--by_position goes with --eval_only")
    expect(not (settings.resume and settings.eval_only), "--eval_only does not go with --resume: name the checkpoint, --init_from=FILE")
    expect(settings.joint_dilation >= 2, f"joint_dilation is {settings.joint_dilation}: it must be 2 or more")
    expect(settings.parallel in ("ddp", "fsdp"), f"parallel is {settings.parallel!r}: it must be ddp or fsdp")


def dry_run(settings, config, dtype, world, micro_batch):
    """What a run would need, without its weights or its data."""
    meta = Data.read_meta(settings.data)
    config = replace(config, vocab_size=meta["vocab_size"])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in RAT(config).parameters())
    patterns = update_patterns(settings, config)
    flops, tokens = sum(flops_per_token(replace(config, **pattern)) for pattern in patterns), settings.steps * settings.batch_tokens
    accumulate = settings.batch_tokens // config.context // world // micro_batch
    print(f"parameters    {parameters / 1e6:,.1f} M")
    print(f"operations    {flops / 1e9:,.2f} GFLOP per token, {flops * tokens / 1e18:,.3g} EFLOP in all")
    print(f"steps         {settings.steps:,} of {settings.batch_tokens:,} tokens: {tokens / 1e9:,.2f} B tokens")
    print(f"a step        {world} processes x {accumulate} micro-batches of {micro_batch} windows of {config.context} tokens")
    share = world if settings.parallel == "fsdp" else 1
    weights = 16 * parameters / share  # float32 weights, gradients and AdamW's two averages
    tokens = micro_batch * config.context
    width = torch.finfo(dtype).bits // 8
    activations = tokens * max(activation_bytes(replace(config, **pattern), dtype, settings.recompute) for pattern in patterns)
    logits = min(tokens, RAT.LOSS_CHUNK) * config.vocab_size * (8 + 2 * width)
    say = lambda size: f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    print(f"memory, estimated per process and uncompiled: {say(weights + activations + logits)} = {say(weights)} of weights, gradients "
          f"and AdamW + {say(activations)} of activations + {say(logits)} of logits")  # fmt: skip


def flops_per_token(config, context=None):
    """Floating-point operations of the matrix products, per token of a window of `context`: forward and backward.

    What the model needs, whatever a program computes twice or masks out. The backward pass counts double.
    """
    T, d = context or config.context, config.d_model
    total = 2 * d * -(-config.vocab_size // 64) * 64
    for layer in range(config.n_layer):
        with torch.device("meta"):
            total += 2 * sum(p.numel() for p in Block(config, layer).parameters() if p.ndim == 2)
        total += mixing_flops(config.kind(layer), d, T)
    return 3 * total


def mixing_flops(kind, d, T):
    """Operations per token of a layer's two products with what is visible, q . k and weights . v: the mean over T tokens."""
    i = torch.arange(T)
    if kind.dilation == 1:
        return 4 * d * (i + 1).double().mean().item()
    far = torch.searchsorted(kind.staying(T), i - kind.window)  # keys that stay, left of the window
    near = i.clamp(max=kind.window) + 1 if kind.window else 0  # the own key alone: no matrix product
    return 4 * d * (near + far).double().mean().item()


def activation_bytes(config, dtype, recompute):
    """Bytes per token that a forward pass keeps for the backward pass, counted in narrow blocks and scaled to their width."""
    if recompute:
        return config.n_layer * config.d_model * 4
    T, width = 509, 16 * config.n_head  # a prime T: what has no factor of it is no activation
    narrow, counted = replace(config, d_model=width), {}
    for layer in range(config.n_layer):
        kind = config.kind(layer)
        if kind not in counted:
            seen = {}
            pack = lambda x: seen.update({x.untyped_storage()._cdata: x}) or x
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                Block(narrow, layer)(torch.zeros(1, T, width, requires_grad=True))
            counted[kind] = sum(x.untyped_storage().nbytes() for x in seen.values() if x.numel() % T == 0) / T
    return sum(counted[config.kind(layer)] for layer in range(config.n_layer)) * config.d_model / width


def peak_flops(device, dtype):
    """Dense matrix operations per second of a known CUDA device in bfloat16; None for others."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def pick_device(name, local_rank=None):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    known = name.split(":")[0] in ("cpu", "cuda", "mps")
    expect(known, f"there is no device {name!r} here: it must be auto, cpu, cuda, cuda:1 (and so on) or mps")
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]}): try --device=auto") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Has glibc keep large freed blocks for the next tensors of that size, where it would give them back to Linux.

    A tensor in new memory costs a page fault for each 4 KB. On 2 CPU cores, keeping it makes a training step of a RAT
    layer (d 512, 16384 tokens) 1.5 to 2 times as fast, of an attention layer 1.0 to 1.1 times.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mmap_threshold, trim_threshold, largest, older_limit = -3, -1, 2**31 - 1, 1 << 25
    if mallopt(mmap_threshold, largest) or mallopt(mmap_threshold, older_limit):
        mallopt(trim_threshold, -1)  # never


def pick_dtype(name, device):
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name != "auto":
        expect(name in names, f"dtype is {name!r}: it must be auto, {' or '.join(names)}")
        return names[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Measured on a CPU with AVX512-BF16: 1.6 times the training throughput. Without such instructions it is slower.
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def recompute(block):
    """From now on its backward pass recomputes the block, instead of keeping what the forward pass computed."""
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def learning_rate(step, settings):
    """Linear warmup to lr, then a cosine that reaches min_lr at the last step: the papers' schedule."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    part = (step - warmup) / max(1, settings.steps - 1 - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * part)) / 2


def bits_per_byte(tokenizer_name, targets, say):
    """A function from nats per token to text such as " (2.03 bits/byte)": by it, tokenizers can be compared.

    Bytes per token are those of the validation targets. Without the tokenizer (no network, say) the text is empty.
    """
    try:
        tokenizer = get_tokenizer(tokenizer_name)
    except ValueError as error:
        say(f"no bits per byte and no sample: {error}")
        return lambda nats: ""
    counts = torch.from_numpy(targets[targets >= 0]).bincount().tolist()
    text = [t for t, n in enumerate(counts) if n and t != tokenizer.eot_token]
    size = sum(counts[t] * len(tokenizer.decode_single_token_bytes(t)) for t in text)
    return lambda nats: f" ({nats / math.log(2) * sum(counts) / size:.3f} bits/byte)"


def write_sample(path, device, settings):
    """Continues a piece of the validation data; the mark ▌ stands where the model takes over."""
    model = RAT.load(path, device)
    val_data = Data(settings.data, "val", model.config.context)
    try:
        text = TextStream(get_tokenizer(model.tokenizer))
    except ValueError:
        return
    prompt = val_data.sample(3)[0][1 if len(val_data) > 2 else 0, :96].tolist()
    print("\nA piece of the validation data, and what the model makes of it from the mark on (temperature 0.8):\n")
    print("".join(map(text, prompt)), end="▌", flush=True)
    stop = val_data.meta["end_of_text"]
    tokens = torch.tensor([prompt], device=device)
    for token in model.generate(tokens, settings.sample_tokens, temperature=0.8, seed=settings.seed, stop=stop):
        if token != stop:
            print(text(token.item()), end="", flush=True)
    print()


def minutes(seconds):
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}h{seconds // 60:02}m" if hours else f"{seconds // 60}m{seconds % 60:02}s"


if __name__ == "__main__":
    run(main)
