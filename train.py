"""Trains a language model of rat.py on a folder of shards.

    python train.py                                         a small RAT on the standard library, in minutes
    python train.py --layers=attention --out=out/attention  the same with plain attention
    python train.py --resume                                continue the run in out/
    python train.py --layers=rat+ --out=out/rat+            RAT+: a sparse and a dense update on each batch
    python train.py --init_from=out/rat+ --layers=rat+:16 --eval_only    its loss with every 16th key
    torchrun --standalone --nproc_per_node=8 train.py --preset=rat-1b --out=out/rat-1b

Each setting below is a flag, --name=value, and so is each field of rat.Config.
"""

import argparse
import functools
import inspect
import json
import math
import os
import re
import time
import typing
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU up to 1.6 times the speed

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from prepare_data import Data, get_tokenizer, parse, prefetch, prepare_stdlib, read_meta, run
from rat import RAT, Config


@dataclass
class Settings:
    preset: str | None = None  # sizes and recipe of the papers, such as rat-1b; other flags override it
    data: str = "data/stdlib"  # folder of shards; data/stdlib is prepared if it is missing
    out: str = "out"  # folder of the checkpoint, ckpt.pt, and of log.jsonl
    resume: bool = False  # continue from that checkpoint, with its settings unless a flag changes them
    init_from: str | None = None  # a checkpoint to begin with; the numbers in layers, and context, may vary
    eval_only: bool = False  # print the validation loss of init_from and stop
    joint: str | None = None  # layers of a sparse update before each dense one, or none [rat+: rat+:64]
    steps: int = 800  # optimizer steps; 0: print what the run would need and stop
    batch_tokens: int = 4096  # tokens per step, over all processes
    micro_batch: int | None = None  # windows per process and forward pass; fewer need less memory
    parallel: str = "ddp"  # under torchrun, each process holds the whole model (ddp) or a part of it (fsdp)
    recompute: bool = False  # less memory for more time: the backward pass recomputes each block
    lr: float = 4e-3  # peak learning rate: linear warmup, then a cosine to min_lr
    min_lr: float = 1e-6  # learning rate of the last step
    warmup: float = 0.05  # fraction of steps spent warming up
    weight_decay: float = 0.1  # of AdamW, for matrices
    clip: float = 1.0  # largest norm of the gradient; 0: any
    eval_every: int = 200  # steps between evaluations, each of which writes a checkpoint
    eval_tokens: int = 65536  # tokens to evaluate on, always the same ones
    log_every: int = 40  # steps between lines of progress
    sample_tokens: int = 160  # length of the text written at the end; 0: none
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto: the best there is
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 where it is fast
    compile: bool | None = None  # torch.compile: a slow start, then faster steps (true on CUDA, else false)


# The papers' models and recipes (RAT, experiments; RAT+, section 4 and appendix), and a size for one GPU.
SIZES = {
    "7b": dict(n_layer=32, d_model=4096, n_head=32, steps=31789, lr=6e-4, micro_batch=1, parallel="fsdp"),
    "3b": dict(n_layer=28, d_model=2560, n_head=20, steps=63578, lr=7e-4, micro_batch=2),
    "1b": dict(n_layer=24, d_model=2048, n_head=16, steps=47684, lr=8e-4, micro_batch=4),
    "200m": dict(n_layer=12, d_model=1024, n_head=16, steps=10000, lr=8e-4, micro_batch=8),
}
WINDOWS = {"7b": 768, "3b": 768, "1b": 512, "200m": 128}  # in a batch, of 4096 tokens
RECIPE = dict(data="data/fineweb-edu", context=4096, eval_every=500, eval_tokens=1 << 21, log_every=10)
PRESETS = {
    f"{kind}-{size}": RECIPE | values | dict(layers=kind.replace("-", ","), batch_tokens=WINDOWS[size] * 4096)
    for size, values in SIZES.items()
    for kind in ("rat", "attention", "rnn", "rat-swa", "attention-swa", "rat+")
}
NANOGPT = {"--max_iters": "--steps", "--block_size": "--context", "--learning_rate": "--lr"}  # its flags
NANOGPT |= {"--n_embd": "--d_model", "--eval_interval": "--eval_every", "--start": "--prompt of sample.py"}
NANOGPT |= {"--batch_size": "--batch_tokens and --micro_batch"}
NANOGPT |= {"--warmup_iters": "--warmup, a fraction of the steps"}

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # checkpoints fit any number of processes


# --- The command line ---
def read_command_line(words):
    """The flags that were given, a dict for Settings and one for Config. A field's comment is its help."""
    parser = argparse.ArgumentParser(
        usage="train.py --name=value ...", description=__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    choices = {"preset": PRESETS, "parallel": ("ddp", "fsdp"), "dtype": ("auto", "float32", "bfloat16")}
    source = inspect.getsource(Settings) + inspect.getsource(Config)
    comments = dict(re.findall(r"(\w+): .*  # (.*)", source))
    for field in (*fields(Settings), *fields(Config)):
        if field.name == "vocab_size":  # the data decides
            continue
        type_ = (typing.get_args(field.type) or [field.type])[0]  # of int | None: int
        options = dict(type=type_, choices=choices.get(field.name), metavar=type_.__name__.upper())
        if type_ is bool:
            options |= dict(type=boolean, nargs="?", const=True)
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **options)
    given = vars(parse(parser, NANOGPT, words))
    if not given.get("resume"):  # a run keeps what it began with
        given = PRESETS.get(given.get("preset"), {}) | given
    sizes = {name: given.pop(name) for name in asdict(Config()) if name in given}
    return given, sizes


def boolean(text):
    return json.loads(text.lower())  # true, false, True, ...


# --- What a run needs ---
def flops_per_token(config):
    """Operations of the matrix products that a model needs per token, forward and backward."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in RAT(config).parameters() if p.ndim > 1)
    kinds = [config.kind(layer) for layer in range(config.n_layer)]
    mixing = sum(mixing_flops(kind, config.d_model, config.context) for kind in kinds)
    return 3 * (2 * weights + mixing)  # backward: a product for each operand's gradient


@functools.cache
def mixing_flops(kind, d, T):
    """Operations per token of q . k and of weights . v over the visible keys, a mean over T tokens."""
    seen = sum(min(i, kind.window) + 1 + kind.count(max(0, i - kind.window)) for i in range(T))
    return 4 * d * seen / T if kind.qk_heads else 0.0


def print_needs(config, updates, s):
    with torch.device("meta"):
        size = sum(p.numel() for p in RAT(config).parameters())
    flops = sum(flops_per_token(replace(config, layers=layers)) for layers in updates)
    tokens = PRESETS.get(s.preset, {}).get("steps", Settings.steps) * s.batch_tokens
    parts = WORLD if s.parallel == "fsdp" else 1
    say(f"{size / 1e6:,.1f} M parameters, {tokens / 1e9:,.3g} B tokens in steps of {s.batch_tokens:,}")
    say(f"{flops / 1e9:,.2f} GFLOP per token, {flops * tokens / 1e18:,.3g} EFLOP in all")
    say(f"{16 * size / parts / 1e9:.3g} GB per process of weights, gradients and AdamW's averages")


# --- What steps are made of ---
def learning_rate(step, s):
    """Linear warmup to lr, then a cosine that reaches min_lr at the last step; steps count from 1."""
    warmup = math.ceil(s.warmup * s.steps)
    if step <= warmup:
        return s.lr * step / warmup
    part = (step - 1 - warmup) / max(1, s.steps - 1 - warmup)
    return s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * part)) / 2


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def sum_over_processes(x):
    x = torch.tensor(float(x), dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(x)
    return x.item()


class Trainer:
    """A model in training: compiled and wrapped as the settings say, with its optimizer."""

    def __init__(self, model, s, optimizer_state=None):
        self.model, self.wrapped, self.s = model, model, s
        self.device = device = model.embedding.weight.device
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cpu":
            fast = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        auto = "bfloat16" if fast else "float32"
        self.dtype = getattr(torch, auto if s.dtype == "auto" else s.dtype)
        context = model.config.context
        self.micro = s.micro_batch or max(1, s.batch_tokens // context // WORLD)  # windows at a time
        if s.batch_tokens % (WORLD * self.micro * context) and not s.eval_only:
            parts = f"{WORLD} processes x micro_batch {self.micro} x context {context}"
            raise ValueError(f"batch_tokens {s.batch_tokens} is not a multiple of {parts}")
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.optimize_ddp = False  # each block is a graph of its own, and small
        torch._dynamo.config.recompile_limit = 64  # all blocks are one function: kinds add up
        compiles = device.type == "cuda" if s.compile is None else s.compile
        if compiles:
            model.nats = torch.compile(model.nats, dynamic=False)  # the head and its cross-entropy
        for block in model.blocks:
            if compiles:
                block.forward = torch.compile(block.forward, dynamic=False)
            if s.recompute:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        self.sharded = WORLD > 1 and s.parallel == "fsdp"
        if self.sharded:
            mesh = dist.init_device_mesh(device.type, (WORLD,))
            for module in (*model.blocks, model):  # gathers float32 and leaves rounding to autocast
                fully_shard(module, mesh=mesh)
        elif WORLD > 1:
            self.wrapped = DistributedDataParallel(model)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [dict(params=matrices, weight_decay=s.weight_decay), dict(params=others, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, s.lr, (0.9, 0.95), fused=device.type != "mps")
        if optimizer_state:
            set_optimizer_state_dict(model, self.optimizer, optimizer_state, options=WHOLE)
            self.optimizer.param_groups[0]["weight_decay"] = s.weight_decay  # a flag may have changed it

    def mine(self, batch):
        """This process's micro-batches of a batch of windows (inputs, targets), on the device."""
        for first in range(RANK * self.micro, len(batch[0]), WORLD * self.micro):
            part = [torch.from_numpy(x[first : first + self.micro]) for x in batch]
            if self.device.type == "cuda":
                part = [x.pin_memory() for x in part]  # for a copy that waits for nothing
            yield [x.to(self.device, non_blocking=True) for x in part]

    def loss(self, x, y):
        """The sum of nats over the targets of a micro-batch."""
        # Autocast's cache would keep copies of all the weights that FSDP gathers block by block.
        half, cached = self.dtype != torch.float32, not self.sharded
        with torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=cached):
            return self.wrapped(x, y)[1] * (y != -100).sum()  # from the mean over a micro-batch to its sum

    def update(self, batch, lr):
        """One step of AdamW. Returns this process's share of the loss, and the whole gradient's norm."""
        targets, share = max(1, (batch[1] != -100).sum().item()), 0.0
        parts = list(self.mine(batch))
        for n, part in enumerate(parts):
            if self.wrapped is not self.model:  # DDP sums gradients over processes once, with the last part
                self.wrapped.require_backward_grad_sync = n == len(parts) - 1
            loss = self.loss(*part) / targets
            (loss * WORLD).backward()  # the sum over processes comes divided by their number
            share += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return share, norm.full_tensor() if self.sharded else norm

    @torch.no_grad()
    def evaluate(self, windows, layers):
        """The mean loss over windows (inputs, targets)."""
        self.model.use(layers)
        short = -len(windows[0]) % (WORLD * self.micro)  # rows without targets fill up the last micro-batches
        x = np.pad(windows[0], ((0, short), (0, 0)))
        y = np.pad(windows[1], ((0, short), (0, 0)), constant_values=-100)
        nats = sum(self.loss(*part) for part in self.mine((x, y)))
        return sum_over_processes(nats) / (y != -100).sum()

    def save(self, step):
        """Writes ckpt.pt, if all of it is finite."""
        weights, state = get_state_dict(self.model, self.optimizer, options=WHOLE)
        if RANK == 0:
            averages = [x for of_one in state["state"].values() for x in of_one.values()]
            if not all(x.isfinite().all() for x in (*weights.values(), *averages)):
                raise ValueError(f"step {step}: the weights are not finite; a lower --lr may help")
            path, log = (os.path.join(self.s.out, name) for name in ("ckpt.pt", "log.jsonl"))
            more = dict(step=step, settings=asdict(self.s), log_bytes=os.path.getsize(log))
            self.model.save(path, weights, optimizer=state, **more)
        sum_over_processes(0)  # nobody goes on before the file is there


# --- The loop ---
def train(trainer, data, windows, updates, bits, saved, scores):
    """Trains from the step after the saved one.

    updates: the layers of each update on a batch; bits: bits per byte of a nat per token; scores: see `main`.
    """
    s, model = trainer.s, trainer.model
    names = ["_sparse", ""] if len(updates) == 2 else [""]
    if RANK == 0:
        os.makedirs(s.out, exist_ok=True)
        log = open(os.path.join(s.out, "log.jsonl"), "a")
        end = log.tell() if saved else 0
        log.truncate(min(end, saved.get("log_bytes", end)))  # what came after the checkpoint is done again
    size = s.batch_tokens // model.config.context
    steps = range(saved.get("step", 0) + 1, s.steps + 1)
    losses, mark = [], time.perf_counter()  # since the last line of progress
    for step, batch in zip(steps, prefetch(data.batch(step - 1, size) for step in steps)):
        lr = learning_rate(step, s)
        for layers in updates:
            model.use(layers)
            loss, norm = trainer.update(batch, lr)
            losses.append(loss)
        evaluating = step % s.eval_every == 0 or step == s.steps
        if step % s.log_every and not evaluating:
            continue

        means = torch.stack(losses).view(-1, len(updates)).mean(dim=0).tolist()  # waits for the device
        rate = len(losses) / len(updates) * s.batch_tokens / (time.perf_counter() - mark)
        results = {f"train_loss{name}": sum_over_processes(mean) for name, mean in zip(names, means)}
        if evaluating:
            for name, layers in zip(names, updates):
                results[f"val_loss{name}"] = trainer.evaluate(windows, layers)
            if bits:
                results["bits_per_byte"] = bits * results["val_loss"]
            results |= scores(model)
        record = dict(step=step, tokens=step * s.batch_tokens, lr=lr, grad_norm=float(norm), **results)
        if not all(map(math.isfinite, record.values())):
            raise ValueError(f"step {step}: not finite: {record}; a lower --lr may help")
        if RANK == 0:
            print(json.dumps(record | {"tokens_per_second": rate}), file=log, flush=True)
        if evaluating:
            trainer.save(step)
        text = "".join(f"  {name.replace('_loss', '')} {value:.3f}" for name, value in results.items())
        left = timedelta(seconds=round((s.steps - step) * s.batch_tokens / rate))
        say(f"step {step}/{s.steps}{text}  {rate:,.0f} tokens/s  {left} left")
        losses, mark = [], time.perf_counter()


def main(words=None, open_data=Data):
    """words: of the command line. open_data(folder, split, context, seed): a Data, or what can replace it."""
    given, sizes = read_command_line(words)
    s, saved, model = Settings(**given), {}, None
    path = os.path.join(s.out, "ckpt.pt")
    if s.resume:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        s = Settings(**saved["settings"] | dict(resume=True, out=s.out, device=s.device) | given)
        model = RAT.load(path)
    elif s.init_from:
        model = RAT.load(s.init_from, layers=sizes.get("layers"), context=sizes.get("context"))
    elif s.eval_only:
        raise ValueError("--eval_only needs a checkpoint: --init_from=FILE OR FOLDER")
    config = model.config if model else Config(**sizes)
    fixed = asdict(config)
    if s.resume:
        fixed |= {name: saved["settings"][name] for name in ("batch_tokens", "seed")}
    for name, value in (given | sizes).items():
        if str(fixed.get(name, value)) != str(value):
            raise ValueError(f"--{name}={value}: the checkpoint has {fixed[name]}, which cannot change")
    if s.joint is None and set(config.layers.replace(" ", "").split(",")) <= {"rat+", "rat+:1"}:
        s.joint = "rat+:64"
    # The layers of each update on a batch: joint training makes a sparse one first. (RAT+, section 4)
    updates = [config.layers] if s.joint in (None, "none") else [s.joint, config.layers]
    if not 0 <= s.warmup <= 1:
        raise ValueError(f"--warmup={s.warmup} is a fraction of the steps, from 0 to 1")
    if saved and saved["step"] >= s.steps > 0 and not s.eval_only:
        raise ValueError(f"{path} has made {saved['step']} steps already: a larger --steps continues it")
    if os.path.exists(path) and s.steps and not (s.resume or s.eval_only):
        raise ValueError(f"{path} is there already: --resume continues it, another --out starts beside it")

    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(auto if s.device == "auto" else s.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if s.data == "data/stdlib" and not os.path.exists(s.data) and RANK == 0:
        prepare_stdlib()
    sum_over_processes(0)  # the others wait for the data
    if s.steps == 0:
        return print_needs(replace(config, vocab_size=read_meta(s.data)["vocab_size"]), updates, s)
    data = open_data(s.data, "train", config.context, s.seed)
    val_data = open_data(s.data, "val", config.context, 0)
    torch.manual_seed(s.seed)
    model = model or RAT(replace(config, vocab_size=data.vocab_size), data.tokenizer)
    if model.tokenizer not in ("", data.tokenizer) or model.config.vocab_size < data.vocab_size:
        raise ValueError(f"{s.data} is in tokens of {data.tokenizer}, the model of {model.tokenizer}")
    model.tokenizer = data.tokenizer
    trainer = Trainer(model.to(device), s, saved.get("optimizer"))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"model: {config.layers}, {config.n_layer} layers of width {config.d_model}, {size:.2f} M parameters")
    say(f"data: {s.data}, {len(data) * config.context:,} tokens ({data.tokenizer})")
    windows = val_data.batch(0, min(len(val_data), max(1, s.eval_tokens // config.context)))
    scores = getattr(val_data, "scores", lambda model: {})  # an experiment's own, such as accuracy
    if s.eval_only:
        results = {"validation loss": trainer.evaluate(windows, config.layers)} | scores(model)
        return say("  ".join(f"{name} {value:.4f}" for name, value in results.items()))

    tokenizer, bits = None, 0.0
    try:
        tokenizer = get_tokenizer(data.tokenizer)
        targets = windows[1][windows[1] >= 0]
        text = tokenizer.decode_tokens_bytes(targets[targets != tokenizer.eot_token].tolist())
        bits = targets.size / max(1, sum(map(len, text))) / math.log(2)  # per byte, of a nat per token
    except ValueError as error:
        say(f"no bits per byte and no sample: {error}")
    train(trainer, data, windows, updates, bits, saved, scores)
    if WORLD > 1:
        del trainer  # freed after its process group, DDP can deadlock with Gloo's thread
        dist.destroy_process_group()
    if tokenizer and s.sample_tokens and RANK == 0:
        prompt = torch.from_numpy(windows[0][:1, :96])
        drawn = RAT.load(path, device).generate(prompt.to(device), s.sample_tokens, 0.8, seed=s.seed)
        say(f"\n--- A piece of the validation data:\n{tokenizer.decode(prompt[0].tolist())}")
        say(f"--- and how the model continues it:\n{tokenizer.decode([token.item() for token in drawn])}")
    say(f"\nnext: python sample.py --ckpt={path}")


if __name__ == "__main__":
    run(main)
