"""Data: text to token shards, and token shards to training windows.

    python prepare_data.py                              the sources of Python's standard library, as bytes
    python prepare_data.py text FILES OR FOLDERS ...    your own: .txt .md .py .jsonl, also gzipped
    python prepare_data.py fineweb-edu --shards=10      a billion tokens of FineWeb-Edu, tokenized (2 GB)

A shard is llm.c's format: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then
that many uint16. Every document begins with <|endoftext|>. A data folder holds shards named *train*.bin and
*val*.bin, and meta.json with the tokenizer's name; without it, that is gpt2, as in published shards.
"""

import argparse
import contextlib
import difflib
import gzip
import http.client
import itertools
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import traceback
import urllib.request
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("bytes", "gpt2", "r50k_base", "p50k_base", "p50k_edit")  # their tokens fit into 16 bits
ENDINGS = (".txt", ".md", ".py", ".jsonl")
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"


# --- Tokenizers ---
def get_tokenizer(name):
    """The tiktoken.Encoding of that name. All but "bytes" need the network once."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        end = {END_OF_TEXT: 256}
        return tiktoken.Encoding(name, pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens=end)
    if name not in TOKENIZERS:
        raise ValueError(f"there is no tokenizer {name}: take one of {', '.join(TOKENIZERS)}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise ValueError(f"tokenizer {name} needs the network once, bytes does not") from error


# --- Shards to windows ---
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """The tokens of a shard, a read-only memory-mapped array of uint16. ValueError if it is not whole."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    whole = (MAGIC, VERSION, os.path.getsize(path)) == (*header[:2], HEADER_BYTES + 2 * header[2].astype(int))
    if not whole or header[2] < 1:
        raise ValueError(f"{path} is not a whole shard of version {VERSION}: prepare or download it again")
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def read_meta(folder):
    """Name and vocabulary size of the tokenizer that made a folder's tokens."""
    path = Path(folder, "meta.json")
    return json.loads(path.read_text()) if path.exists() else {"tokenizer": "gpt2", "vocab_size": 50257}


class Data:
    """One split of a data folder, as windows of `context` tokens and their targets.

    Windows lie end to end in each shard. Each epoch shows every window once, in an order that depends on
    (seed, epoch) alone. train.py takes any object with `batch`, a length, `tokenizer` and `vocab_size`.
    """

    def __init__(self, folder, split, context, seed=0):
        self.folder, self.context, self.seed = folder, context, seed
        paths = sorted(Path(folder).glob(f"*{split}*.bin"))
        if not paths:
            raise ValueError(f"there are no shards {folder}/*{split}*.bin: make some with prepare_data.py")
        self.shards = [read_shard(path) for path in paths]
        self.starts = np.cumsum([0, *((len(shard) - 1) // context for shard in self.shards)])
        if len(self) == 0:
            raise ValueError(f"{folder} holds no {split} window of {context} tokens: lower --context")
        meta = read_meta(folder)
        self.tokenizer, self.vocab_size = meta["tokenizer"], meta["vocab_size"]
        self.orders = {}  # of the windows, by epoch

    def __len__(self):
        return int(self.starts[-1])

    def batch(self, step, size):
        """The windows of training step `step`, from 0: inputs and targets, both (size, context) int64."""
        rows = []
        for place in range(step * size, (step + 1) * size):
            epoch, n = divmod(place, len(self))
            if epoch not in self.orders:
                self.orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self))}
            n = self.orders[epoch][n]
            shard = np.searchsorted(self.starts, n, side="right") - 1
            first = (n - self.starts[shard]) * self.context
            rows.append(self.shards[shard][first : first + self.context + 1])
        tokens = np.stack(rows).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"{self.folder} holds token {tokens.max()}, its vocabulary {self.vocab_size}")
        return tokens[:, :-1], tokens[:, 1:]


def prefetch(iterator, depth=4):
    """The items of an iterator, which runs ahead by `depth` items in a thread of its own."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(next, iterator, end) for _ in range(depth)]
        while (item := ahead.pop(0).result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item


# --- Text to shards ---
def text_files(names):
    """The files named, and in folders named those with known endings: each once, none in dot-folders."""
    files = {}
    for path in map(Path, names):
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            known = file == path or file.name.lower().removesuffix(".gz").endswith(ENDINGS)
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if known and not hidden and file.is_file():
                files.setdefault(file.resolve(), file)
    return list(files.values())


def documents(files):
    """The documents in files: the "text" of each line of a .jsonl, else what <|endoftext|> separates."""
    skipped = 0
    for path in files:
        is_json = ".jsonl" in path.name.lower()
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            for part in file if is_json else [file.read()]:
                try:
                    text = part.decode("utf-8-sig")
                    texts = [json.loads(text)["text"] + ""] if is_json else text.split(END_OF_TEXT)
                    yield from (text for text in texts if text.strip())
                except (ValueError, KeyError, TypeError):
                    skipped += 1
    print(f"{len(files):,} files, skipped {skipped:,} that are not UTF-8, or lines of JSON without a text")


def prepare(texts, folder, source, tokenizer_name, val_every=20, shard_tokens=100_000_000):
    """Tokenizes documents into training and validation shards in a new folder, a Path, all or nothing.

    Every val_every-th document is for validation; of a single one, its last tenth.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: choose another folder with --out")
    if val_every < 2:
        raise ValueError(f"val_every is {val_every}: it must be 2 or more")
    tokenizer = get_tokenizer(tokenizer_name)
    texts = iter(texts)
    first = list(itertools.islice(texts, 2))
    if not first:
        raise ValueError(f"found no text: expected {', '.join(ENDINGS)} files, also gzipped, in UTF-8")
    if len(first) == 1:
        cut = len(first[0]) * 9 // 10
        first = [first[0][:cut], first[0][cut:]]
    tokens, count = {"train": array("H"), "val": array("H")}, 0
    texts = itertools.chain(first, texts)
    while batch := list(itertools.islice(texts, 1000)):
        for document in tokenizer.encode_ordinary_batch(batch, num_threads=os.cpu_count()):
            split = "val" if count % val_every == 1 else "train"
            tokens[split].extend([tokenizer.eot_token, *document])
            count += 1
        print(f"{count:,} documents", end="\r", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f"{folder.name}.", folder.parent) as temporary:
        partial = Path(temporary, folder.name)
        partial.mkdir()
        for split in tokens:
            for n, start in enumerate(range(0, len(tokens[split]), shard_tokens)):
                part = tokens[split][start : start + shard_tokens]
                write_shard(partial / f"{source}_{split}_{n:06d}.bin", part)
        meta = {"tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab}
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        if not folder.exists():  # else another run has made it meanwhile
            os.rename(partial, folder)
    sizes = f"{len(tokens['train']):,} training and {len(tokens['val']):,} validation tokens"
    print(f"{folder}: {count:,} documents, {sizes} ({tokenizer_name})")


def prepare_stdlib(folder=Path("data/stdlib")):
    """The default data: the standard library's sources, without its tests and what pip installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    prepare(documents(files), folder, "stdlib", "bytes")


# --- Download ---
def download(url, path, tries=5):
    """Fetches a shard unless it is there and whole. It gets its name once its header and length are right."""
    with contextlib.suppress(OSError, ValueError):
        return read_shard(path)
    partial = Path(f"{path}.partial")
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            read_shard(partial)
            return os.replace(partial, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if attempt == tries or getattr(error, "code", None) in (401, 403, 404):
                raise ValueError(f"{url}: {error}; run this again to continue") from error
            time.sleep(2**attempt)


# --- The command line ---
def parse(parser, nanogpt={}, words=None):
    """parser.parse_args(), which names ours for an unknown flag. nanogpt: ours for those of nanoGPT."""
    words = sys.argv[1:] if words is None else words
    args, unknown = parser.parse_known_intermixed_args(words)
    for flag in (word.partition("=")[0] for word in unknown):
        near = difflib.get_close_matches(flag, parser._option_string_actions, n=1) or ["--help"]
        parser.error(f"there is no {flag}: see {nanogpt.get(flag, near[0])}")
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    twice = [flag for flag in flags if flags.count(flag) > 1]
    if twice:
        parser.error(f"{twice[0]} is given {len(twice)} times")
    return args


def run(main):
    """Runs a script: a user's mistake is one line and exit code 2, a bug has its traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].line.startswith("raise")
        if isinstance(error, ValueError) and not raised:  # Python's own, such as too many values to unpack
            raise
        time.sleep(5 if int(os.environ.get("RANK", 0)) else 0)  # of torchrun's processes, one speaks
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("source", nargs="?", default="stdlib", choices=["stdlib", "text", "fineweb-edu"])
    add("files", nargs="*", help="text: files and folders")
    add("--out", help="the folder to make [data/SOURCE]")
    add("--tokenizer", default="gpt2", help=f"text: one of {', '.join(TOKENIZERS)} [gpt2]")
    add("--val_every", type=int, default=20, help="text: every N-th document is for validation [20]")
    add("--shards", type=int, default=10, help="fineweb-edu: training shards, of 1001 [10]")
    add("--base_url", default=FINEWEB_EDU, help="fineweb-edu: where its shards are")
    args = parse(parser)
    folder = Path(args.out or f"data/{args.source}")
    if (args.source == "text") != bool(args.files):
        parser.error("text takes files or folders, the other sources none")
    if args.source == "stdlib":
        prepare_stdlib(folder)
    elif args.source == "text":
        prepare(documents(text_files(args.files)), folder, "text", args.tokenizer, args.val_every)
    else:
        os.makedirs(folder, exist_ok=True)
        names = [f"edu_fineweb_train_{n:06d}.bin" for n in range(1, args.shards + 1)]
        names.insert(0, "edu_fineweb_val_000000.bin")
        with ThreadPoolExecutor(4) as pool:
            jobs = pool.map(lambda name: download(f"{args.base_url}/{name}", Path(folder, name)), names)
            for done, _ in enumerate(jobs, 1):
                print(f"{done} of {len(names)} shards are there", flush=True)
    print(f"next: python train.py --data={folder} --out=out/{args.source}")


if __name__ == "__main__":
    run(main)
