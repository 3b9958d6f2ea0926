"""Trains a language model of rat.py on a folder of shards.

    python train.py                                           a small RAT on the standard library's sources, in minutes
    python train.py --layers=attention --out=out/attention    the same with plain attention
    python train.py --resume                                  goes on with the run in out/ckpt.pt

Each setting below is a flag, --name=value, and so is each field of rat.Config.
"""

import math
import os
import time
from dataclasses import asdict, dataclass, replace

import torch

from prepare_data import Data, TextStream, get_tokenizer, parse_command_line, prepare_stdlib, progress, run
from rat import RAT, Config, expect, read_checkpoint


@dataclass
class Settings:
    """Settings of train.py"""

    data: str = "data/stdlib"  # folder of shards; data/stdlib is prepared if it is missing
    out: str = "out"  # folder of the checkpoint, ckpt.pt
    resume: bool = False  # go on from that checkpoint, with its settings unless a flag changes them
    steps: int = 800  # optimizer steps
    batch_tokens: int = 4096  # tokens per step
    micro_batch: int | None = None  # windows per forward and backward pass, where the whole batch needs too much memory
    lr: float = 4e-3  # peak learning rate: linear warmup, then a cosine to min_lr
    min_lr: float = 1e-6  # learning rate of the last step
    warmup: float = 0.05  # part of the steps that is warmup
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.1  # of AdamW, for matrices
    clip: float = 1.0  # a gradient of larger norm is scaled down to it; 0: never
    eval_every: int = 200  # steps from one evaluation and checkpoint to the next
    eval_tokens: int = 131072  # tokens to evaluate on, spread evenly over the validation data
    log_every: int = 20  # steps from one line of progress to the next
    sample_tokens: int = 400  # length of the text written at the end
    seed: int = 1  # of the initial weights and of the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str = "auto"  # of matrix products: bfloat16 or float32; auto: bfloat16 if the hardware multiplies in it
    compile: bool | None = None  # torch.compile: a slow start, then faster steps (true on CUDA, else false)


def main():
    values, model_values = parse_command_line(Settings, Config, hidden=("vocab_size",))
    settings, config = Settings(**values), Config(**model_values)
    path = os.path.join(settings.out, "ckpt.pt")
    saved = None
    if settings.resume:
        saved = read_checkpoint(path)
        expect("optimizer" in saved, f"{path} has weights but no optimizer state: it can be sampled, not resumed")
        settings = replace(Settings(**saved["settings"]), **(values | {"out": settings.out}))
        config = Config(**saved["config"])
        for name, value in model_values.items():
            now = getattr(config, name)
            expect(value == now, f"--{name}={value}: the model in {path} has {now}, and a resumed run keeps its model")
    else:
        expect(not os.path.exists(path), f"{path} is there already: --resume goes on with it, another --out starts beside it")
    check(settings)
    device, dtype = pick_device(settings.device), settings.dtype
    dtype = pick_dtype(settings.dtype, device)

    # Data. A batch of so many windows is worked through in micro-batches, whose gradients add up.
    if settings.data == "data/stdlib" and not os.path.exists(settings.data):
        prepare_stdlib(settings.data)
    train_data, val_data = (Data(settings.data, split, config.context, settings.seed) for split in ("train", "val"))
    meta = train_data.meta
    windows, rest = divmod(settings.batch_tokens, config.context)
    expect(rest == 0, f"batch_tokens {settings.batch_tokens} is not a multiple of context {config.context}: change one of them")
    micro_batch = settings.micro_batch or windows
    expect(windows % micro_batch == 0, f"a batch of {windows} windows is not a multiple of micro_batch {micro_batch}: change one of them")

    # Model and optimizer.
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    if saved is None:
        model = RAT(replace(config, vocab_size=meta["vocab_size"]), meta["tokenizer"]).to(device)
    else:
        expect(saved["tokenizer"] == meta["tokenizer"], f"{settings.data} is in tokens of {meta['tokenizer']}, the model in {path} in those of {saved['tokenizer']}")  # fmt: skip
        model = RAT.load(path, device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, (settings.beta1, settings.beta2), fused=device.type != "mps")
    first_step = 0
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
    expect(first_step < settings.steps, f"{path} has made all its {first_step} steps already: --steps=N with a larger N goes on")
    use_compile = device.type == "cuda" if settings.compile is None else settings.compile
    run_model = torch.compile(model) if use_compile else model

    def micro_batches(inputs, targets):
        """Pairs on the device, each with its share of the batch's targets: their losses times shares add up to the mean."""
        total = (targets != -100).sum()
        for rows in range(0, len(inputs), micro_batch):
            x, y = (torch.from_numpy(part[rows : rows + micro_batch]).to(device) for part in (inputs, targets))
            yield x, y, float((targets[rows : rows + micro_batch] != -100).sum() / total)

    def loss_of(x, y):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return run_model(x, y)[1]

    @torch.no_grad()
    def evaluate():
        return sum(share * loss_of(x, y).item() for x, y, share in micro_batches(*val_sample))

    def save(steps_done):
        os.makedirs(settings.out, exist_ok=True)
        model.save(path, optimizer=optimizer.state_dict(), step=steps_done, settings=asdict(settings))

    val_sample = val_data.sample(max(1, settings.eval_tokens // config.context))
    bits = bits_per_byte(meta["tokenizer"], val_sample[1])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {config.layers}, {config.n_layer} layers of width {config.d_model}, {parameters / 1e6:.2f} M parameters")
    print(f"data: {settings.data}, {len(train_data) * config.context / 1e6:.1f} M tokens ({meta['tokenizer']}) in windows of {config.context}")
    print(f"run: steps {first_step} to {settings.steps} of {settings.batch_tokens} tokens, on {device} in {str(dtype)[6:]}{', compiled' * use_compile}")

    losses, validation, start, mark = [], "", time.perf_counter(), time.perf_counter()
    for step in range(first_step, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch_loss = 0.0
        for x, y, share in micro_batches(*train_data.batch(step, windows)):
            loss = share * loss_of(x, y)
            loss.backward()
            batch_loss += loss.detach()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(batch_loss)

        done, now_eval = step + 1, (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps
        if done % settings.log_every == 0 or now_eval:
            loss = torch.stack(losses).mean().item()  # the one place that waits for the device
            rate = len(losses) * settings.batch_tokens / (time.perf_counter() - mark)
            if now_eval:
                val_loss = evaluate()
                validation = f"val {val_loss:.3f}{bits(val_loss)}  "
                save(done)
            left = (settings.steps - done) * settings.batch_tokens / rate
            progress(f"step {done:>5}/{settings.steps}  train {loss:.3f}{bits(loss)}  {validation}"
                     f"{rate:>9,.0f} tokens/s  {minutes(left)} left", last=now_eval)  # fmt: skip
            losses, mark = [], time.perf_counter()

    print(f"\n{minutes(time.perf_counter() - start)} of training, validation loss {val_loss:.3f} nats per token, in {path}")
    if settings.sample_tokens:
        write_sample(model, meta, val_sample[0][len(val_sample[0]) // 2, :96].tolist(), settings)
    print(f"\nNext: python sample.py --ckpt={path} --prompt='def ' --temperature=0.5")
    print("      python train.py --layers=attention --out=out/attention   (or rnn, rat,swa, rat+: see README.md)")
    print(f"      python train.py --resume --out={settings.out} --steps={2 * settings.steps}")


def check(settings):
    least = dict(steps=1, batch_tokens=1, eval_every=1, eval_tokens=1, log_every=1, micro_batch=1, lr=0, min_lr=0, clip=0, sample_tokens=0)
    for name, value in least.items():
        given = getattr(settings, name)
        expect(given is None or given >= value, f"{name} is {given}: it must be {value} or more")
    expect(0 <= settings.warmup <= 1, f"warmup is {settings.warmup}: it is a part of the steps, 0 to 1")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]}): try --device=auto") from error


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


def learning_rate(step, settings):
    """Linear warmup to lr, then a cosine that reaches min_lr at the last step."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    part = (step - warmup) / max(1, settings.steps - 1 - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * part)) / 2


def bits_per_byte(tokenizer_name, targets):
    """A function from nats per token to text such as " (2.03 bits/byte)": what tokenizers can be compared by.

    Bytes per token are those of the validation targets. Without the tokenizer (no network, say) the text is empty.
    """
    try:
        tokenizer = get_tokenizer(tokenizer_name)
    except ValueError as error:
        print(f"no bits per byte and no sample: {error}")
        return lambda nats: ""
    special = tokenizer.eot_token
    counts = torch.from_numpy(targets[targets >= 0]).bincount().tolist()
    size = sum(n * len(tokenizer.decode_single_token_bytes(t)) for t, n in enumerate(counts) if n and t != special)
    return lambda nats: f" ({nats / math.log(2) * sum(counts) / size:.3f} bits/byte)"


def write_sample(model, meta, prompt, settings):
    """Continues a piece of the validation data; the mark ▌ stands where the model takes over."""
    try:
        text = TextStream(get_tokenizer(meta["tokenizer"]))
    except ValueError:
        return
    print("\nA piece of the validation data, and what the model makes of it from the mark on (temperature 0.8):\n")
    print("".join(map(text, prompt)), end="▌", flush=True)
    tokens = torch.tensor([prompt], device=model.embedding.weight.device)
    for token in model.generate(tokens, settings.sample_tokens, temperature=0.8, seed=settings.seed, stop=meta["end_of_text"]):
        if token != meta["end_of_text"]:
            print(text(token.item()), end="", flush=True)
    print()


def minutes(seconds):
    hours, seconds = divmod(round(seconds), 3600)
    return f"{hours}h{seconds // 60:02}m" if hours else f"{seconds // 60}m{seconds % 60:02}s"


if __name__ == "__main__":
    run(main)
