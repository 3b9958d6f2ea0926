"""Data: text to token shards, and token shards to training windows.

    python prepare_data.py                              the sources of Python's standard library, as bytes: no download
    python prepare_data.py text FILES OR FOLDERS ...    your own text
    python prepare_data.py fineweb-edu --shards=10      a billion tokens of FineWeb-Edu, tokenized already (2 GB)
    python prepare_data.py checkpoint theirs.pt --layers=rat --out=out/theirs/ckpt.pt     a checkpoint of the papers' code

A shard is llm.c's format: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then that many
uint16. Every document begins with <|endoftext|>. A data folder holds shards named *_train_*.bin and *_val_*.bin, and
meta.json with the tokenizer's name; without meta.json the tokenizer is gpt2, as in published shards of this format.

The last part, the command line that all scripts share, is here because every script imports this file.
"""

import argparse
import codecs
import dataclasses
import difflib
import gzip
import http.client
import inspect
import itertools
import json
import os
import queue
import random
import re
import shutil
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, OrderedDict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding of that name. "bytes" is 256 bytes and <|endoftext|>, and needs no download; "gpt2" does, once.

    A name that ends in .model is the path of a SentencePiece model, such as LLaMA-2's, which the papers' models use.
    """
    if name.endswith(".model"):
        return SentencePiece(name)
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"there is no tokenizer {name!r}: take bytes, gpt2 or another encoding of tiktoken")
    try:
        tokenizer = tiktoken.get_encoding(name)
    except Exception as error:  # whatever its HTTP library raises
        reason = type(error).__name__
        raise ValueError(
            f"the tokenizer {name} has to be downloaded once, and that failed ({reason}): connect to the network, set "
            f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use the tokenizer bytes"
        ) from error
    if END_OF_TEXT not in tokenizer.special_tokens_set or tokenizer.n_vocab > 1 << 16:
        raise ValueError(f"the tokenizer {name} does not fit shards of uint16 with {END_OF_TEXT}: take gpt2 or bytes")
    return tokenizer


class SentencePiece:
    """A SentencePiece model with what is used here of tiktoken.Encoding. Documents begin with its <s>, if it has one."""

    def __init__(self, path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ValueError(f"{path} needs sentencepiece: pip install sentencepiece") from error
        if not os.path.isfile(path):
            raise ValueError(f"there is no tokenizer {path}")
        try:
            self.model = SentencePieceProcessor(model_file=path)
        except Exception as error:
            raise ValueError(f"{path} is no SentencePiece model") from error
        start, end = self.model.bos_id(), self.model.eos_id()
        self.n_vocab, self.eot_token = self.model.vocab_size(), start if start >= 0 else end
        if self.n_vocab > 1 << 16 or self.eot_token < 0:
            raise ValueError(f"the tokenizer {path} does not fit shards of uint16 with an end of text: take gpt2 or bytes")

    def encode_ordinary(self, text):
        return self.model.encode(text)

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.model.encode(text), dtype=np.uint32)

    def decode_single_token_bytes(self, token):
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return b"" if self.model.is_control(token) else piece.replace("\u2581", " ").encode()


class TextStream:
    """Tokens to text, one at a time: a character appears with the last of its bytes, which may lie in several tokens."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token):
        return self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))


# ----------------------------------------------------------------------------------------------------------------------
# Shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def shard_header(tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_shard(path):
    """The tokens of a shard: a read-only memory-mapped array of uint16. ValueError if the file is no whole shard."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, tokens = (int(n) for n in header[:3])
    remedy = "prepare or download it again"
    if magic != MAGIC:
        raise ValueError(f"{path} is not a shard: it begins with {magic}, not {MAGIC}; {remedy}")
    if version != VERSION:
        raise ValueError(f"{path} is a shard of version {version}, not {VERSION}; {remedy}")
    if size != HEADER_BYTES + 2 * tokens:
        raise ValueError(f"{path} has {size} bytes, not the {HEADER_BYTES + 2 * tokens} of its {tokens} tokens; {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,)) if tokens else np.empty(0, "<u2")


class ShardWriter:
    """Writes tokens to folder/{name}_{split}_000000.bin, 000001, ..., a new shard when `shard_tokens` are in the last."""

    def __init__(self, folder, name, split, shard_tokens):
        self.prefix, self.shard_tokens = Path(folder) / f"{name}_{split}", shard_tokens
        self.file, self.shards, self.in_shard, self.tokens = None, 0, 0, 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(f"{self.prefix}_{self.shards:06d}.bin", "wb")
                self.file.write(shard_header(0))
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_shard])
            self.file.write(part.astype("<u2").tobytes())
            self.in_shard, self.tokens = self.in_shard + len(part), self.tokens + len(part)
            if self.in_shard == self.shard_tokens:
                self.close()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.in_shard))
            self.file.close()
            self.file, self.shards, self.in_shard = None, self.shards + 1, 0


# What a folder without meta.json holds: published shards. And what data/stdlib will hold before it is made.
GPT2_META = {"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": 50256}
BYTES_META = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256}


class Data:
    """One split of a data folder, as windows of `context` tokens and their targets.

    Windows lie end to end in each shard and never cross into the next. Each epoch shows each window once, in an order
    that depends on (seed, epoch) alone: what a step sees does not depend on how the run came there.
    """

    def __init__(self, folder, split, context, seed=0):
        self.folder, self.split, self.context, self.seed, self.orders = Path(folder), split, context, seed, {}
        self.paths = sorted(self.folder.glob(f"*_{split}_*.bin"))
        if not self.paths:
            raise ValueError(f"{folder} holds no {split} shards (*_{split}_*.bin): make some with prepare_data.py")
        self.shards = [np.asarray(read_shard(path)) for path in self.paths]  # asarray: slices of a memmap are slow objects
        self.ends = np.cumsum([max(0, len(shard) - 1) // context for shard in self.shards])
        if len(self) == 0:
            raise ValueError(f"the {split} shards of {folder} are shorter than one window of {context} tokens: lower --context")
        self.meta = self.read_meta(folder)

    @staticmethod
    def read_meta(folder):
        """Name, vocabulary size and <|endoftext|> of the tokenizer that made the folder's tokens."""
        path = Path(folder, "meta.json")
        if not path.exists():
            return BYTES_META if folder == "data/stdlib" else GPT2_META
        try:
            meta = json.loads(path.read_text())
            return {name: kind(meta[name]) for name, kind in (("tokenizer", str), ("vocab_size", int), ("end_of_text", int))}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, expected something like {json.dumps(GPT2_META)}") from error

    def __len__(self):
        """Number of windows."""
        return int(self.ends[-1])

    def windows(self, index):
        """Windows number index (n,): inputs and targets, both (n, context) int64.

        The target after an <|endoftext|> is -100, no target: nothing foretells how an unrelated document begins.
        """
        shard = np.searchsorted(self.ends, index, side="right")
        first = (index - np.concatenate([[0], self.ends])[shard]) * self.context
        tokens = np.empty((len(index), self.context + 1), dtype=np.int64)
        for row, (s, a) in enumerate(zip(shard.tolist(), first.tolist())):
            tokens[row] = self.shards[s][a : a + self.context + 1]
        if tokens.max() >= self.meta["vocab_size"]:
            path = self.paths[shard[tokens.max(axis=1).argmax()]]
            raise ValueError(
                f"{path} holds the token {tokens.max()}, but the tokenizer {self.meta['tokenizer']} has only "
                f"{self.meta['vocab_size']}: prepare the folder again, with one tokenizer"
            )
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        targets[inputs == self.meta["end_of_text"]] = -100
        return inputs, targets

    def batch(self, step, size, rows=slice(None)):
        """Of the `size` windows of training step `step`, counted from 0, those in `rows`. See `windows`."""
        epoch, place = np.divmod(np.arange(step * size, (step + 1) * size)[rows], len(self))
        shuffled = lambda e: np.random.default_rng([self.seed, e]).permutation(np.arange(len(self), dtype=np.uint32))
        self.orders = {e: self.orders[e] if e in self.orders else shuffled(e) for e in set(epoch.tolist())}
        return self.windows(np.array([self.orders[e][p] for e, p in zip(epoch.tolist(), place.tolist())], dtype=np.int64))

    def sample(self, size):
        """About `size` windows, evenly spaced and always the same. See `windows`."""
        return self.windows(np.unique(np.linspace(0, len(self) - 1, min(size, len(self))).astype(np.int64)))


def prefetch(iterator, depth=4):
    """The items of an iterator, which runs ahead by `depth` items in a thread of its own."""
    items, end = queue.Queue(depth), object()

    def work():
        try:
            for item in iterator:
                items.put((item, None))
            items.put((end, None))
        except BaseException as error:
            items.put((end, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = items.get()
        if error is not None:
            raise error
        if item is end:
            return
        yield item


# ----------------------------------------------------------------------------------------------------------------------
# Sources: each yields documents, as strings, and counts what it skips

TEXT_ENDINGS = (".txt", ".md", ".py", ".jsonl", ".parquet")


def stdlib_files():
    """The Python sources of the standard library that runs this, without its tests and what pip has installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]


def text_files(names, skipped):
    """The files named, and those in the folders named whose ending is known."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                if file.name.removesuffix(".gz").endswith(TEXT_ENDINGS):
                    yield file
                else:
                    skipped["files with other endings"] += 1
        else:
            yield path


def documents(files, skipped):
    """The texts in the files: each file is one, or in .jsonl each line's "text". skipped: a Counter of reasons."""
    for path in files:
        if path.name.endswith(".parquet"):
            yield from parquet_texts(path)
            continue
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
                for part in file if lines else [file.read()]:
                    try:
                        text = part.decode("utf-8-sig")
                        text = json.loads(text)["text"] + "" if lines else text
                        text.encode()  # JSON can name half a character
                    except UnicodeError:
                        skipped["texts that are not UTF-8"] += 1
                    except (ValueError, KeyError, TypeError):
                        skipped["lines that are no JSON object with a text"] += 1
                    else:
                        if text.strip() and "\0" not in text:
                            yield text
                        else:
                            skipped["binary files" if text.strip() else "empty texts"] += 1
        except (OSError, EOFError, zlib.error):
            skipped["files that cannot be read"] += 1


def parquet_texts(path):
    """The column "text" of a .parquet file, the form in which FineWeb-Edu is published before tokenization."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
            yield from filter(None, batch["text"].to_pylist())
    except (KeyError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{path} is no .parquet file with a column text: {str(error).splitlines()[0]}") from error


def prepare(texts, folder, source, tokenizer_name, val_every=20, shard_tokens=100_000_000, workers=1):
    """Tokenizes texts into train and validation shards in `folder`, which appears whole or not at all.

    Every val_every-th document is for validation; of a single document, its last tenth.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        raise ValueError(f"{folder} is there already: remove it first, or choose another folder with --out")
    for name, value, least, most in (("val_every", val_every, 2, 1 << 30), ("shard_tokens", shard_tokens, 1, 1 << 30), ("workers", workers, 1, 1024)):
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}: it must be from {least} to {most}")
    tokenizer = get_tokenizer(tokenizer_name)
    texts = iter(texts)
    first = list(itertools.islice(texts, 2))
    if not first:
        raise ValueError("no text was found: expected .txt, .md, .py or .jsonl files (or the same gzipped) in UTF-8")
    if len(first) == 1:
        progress("one document: its last tenth is for validation", last=True)
        cut = len(first[0]) * 9 // 10
        first = [first[0][:cut], first[0][cut:]]
    texts = itertools.chain(first, texts)

    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.mkdir(parents=True)
    try:
        writers = {split: ShardWriter(partial, source, split, shard_tokens) for split in ("train", "val")}
        encode = lambda text: tokenizer.encode_to_numpy(text, disallowed_special=())  # text may speak of <|endoftext|>
        start, done, count, said = time.perf_counter(), 0, 0, 0.0
        with ThreadPoolExecutor(workers) as pool:  # tiktoken lets go of the interpreter while it encodes
            while batch := list(itertools.islice(texts, 64 * workers)):
                for text, tokens in zip(batch, pool.map(encode, batch)):
                    writer = writers["val" if count % val_every == 1 else "train"]
                    writer.write(np.concatenate([[tokenizer.eot_token], tokens]))
                    done, count = done + len(text), count + 1
                if time.perf_counter() - said > 2:
                    said = time.perf_counter()
                    progress(f"{count:,} documents, {done / 1e6:.1f} M characters, {done / 1e6 / (said - start):.1f} M/s")
        for writer in writers.values():
            writer.close()
        meta = {"tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab, "end_of_text": tokenizer.eot_token}
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    train, val = (writers[split].tokens for split in ("train", "val"))
    progress(f"{folder}: {count:,} documents, {train:,} training and {val:,} validation tokens ({tokenizer_name})", last=True)


# ----------------------------------------------------------------------------------------------------------------------
# Download

FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"
USUAL_SHARD_BYTES = HEADER_BYTES + 2 * 100_000_000


class Download:
    """Shards from base_url into folder, several at a time. What is there already stays; what was begun goes on.

    A file is written as NAME.partial, and gets its name when its length and header are right. tries: how often in
    succession a file may fail without a byte of progress; pause: seconds before the second try, doubled for each next.
    """

    def __init__(self, base_url, folder, names, connections=4, tries=6, pause=1.0, timeout=30.0):
        self.base_url, self.folder, self.names = base_url.rstrip("/"), Path(folder), names
        self.connections, self.tries, self.pause, self.timeout = connections, tries, pause, timeout
        self.stop, self.sizes = threading.Event(), {}

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [name for name in self.names if not is_shard(self.folder / name)]
        progress(f"{self.folder}: {len(self.names) - len(missing)} of {len(self.names)} shards are there", last=True)
        if not missing:
            return
        with ThreadPoolExecutor(self.connections) as pool:
            try:
                self.sizes = dict(zip(missing, pool.map(self.size, missing)))
                size, begun, free = sum(self.sizes.values()), self.have(missing), shutil.disk_usage(self.folder).free
                needed = size - begun
                if needed > free:
                    raise ValueError(
                        f"{self.folder} has {free / 1e9:,.1f} GB free, the download needs {needed / 1e9:,.1f} GB: make room, "
                        f"choose another folder with --out, or take fewer --shards"
                    )
                start, waiting = time.perf_counter(), {pool.submit(self.fetch, name) for name in missing}
                while waiting:
                    done, waiting = wait(waiting, timeout=0.5 if sys.stdout.isatty() else 5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    have = self.have(missing)
                    rate = (have - begun) / (time.perf_counter() - start)
                    left = f"{(size - have) / rate / 60:,.0f} minutes left" if rate > 0 else "waiting"
                    progress(f"{len(missing) - len(waiting)} of {len(missing)} shards, {have / 1e6:,.0f} of {size / 1e6:,.0f} MB, "
                             f"{rate / 1e6:,.1f} MB/s, {left}", last=not waiting)  # fmt: skip
            except BaseException:
                self.stop.set()  # the other threads end with the block that is under way
                pool.shutdown(cancel_futures=True)
                raise

    def have(self, names):
        """Bytes that are on disk of these files."""
        return sum(max(file_size(self.folder / name), file_size(self.folder / f"{name}.partial")) for name in names)

    def open(self, name, **options):
        return urllib.request.urlopen(urllib.request.Request(f"{self.base_url}/{name}", **options), timeout=self.timeout)

    def size(self, name):
        """Bytes of a file, to plan with. A server that does not say: those of a published shard."""
        try:
            with self.open(name, method="HEAD") as response:
                return int(response.headers["Content-Length"])
        except (OSError, http.client.HTTPException, TypeError, ValueError):
            return USUAL_SHARD_BYTES

    def fetch(self, name):
        failures = 0
        while not self.stop.is_set():
            before = file_size(self.folder / f"{name}.partial")
            try:
                return self.fetch_once(name)
            except urllib.error.HTTPError as error:
                if error.code in (401, 403, 404, 410):
                    raise ValueError(f"{self.base_url}/{name}: {error.code} {error.reason}: is --base_url right, and --shards?") from error
                reason = f"{error.code} {error.reason}"
            except (OSError, http.client.HTTPException, BadShard) as error:
                reason = str(error) or type(error).__name__
            failures = 1 if file_size(self.folder / f"{name}.partial") > before else failures + 1
            if failures >= self.tries:
                raise OSError(f"{self.base_url}/{name}: {reason}, {failures} times in succession; run the command again to go on")
            self.stop.wait(min(60, self.pause * 2 ** (failures - 1)) * random.uniform(0.5, 1))

    def fetch_once(self, name):
        path, partial = self.folder / name, self.folder / f"{name}.partial"
        have = file_size(partial)
        try:
            response = self.open(name, headers={"Range": f"bytes={have}-"} if have else {})
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the range begins at the file's end or beyond
                raise
        else:
            with response, open(partial, "ab") as file:
                if response.status != 206:  # the whole file, whatever range was asked for
                    file.truncate(0)
                elif not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
                    raise BadShard("the server sent another range than the one asked for")
                while not self.stop.is_set() and (block := response.read1(1 << 18)):
                    file.write(block)
                expected = response.headers["Content-Length"]
                if self.stop.is_set() or expected and response.length:
                    raise BadShard("the connection broke")
                file.flush()
                os.fsync(file.fileno())
        try:
            read_shard(partial)
        except ValueError as error:
            partial.unlink()
            raise BadShard(f"what was sent is no shard ({error})") from error
        os.replace(partial, path)


class BadShard(Exception):
    """A transfer that ended without a whole shard."""


def is_shard(path):
    try:
        read_shard(path)
        return True
    except (OSError, ValueError):
        return False


def file_size(path):
    return path.stat().st_size if path.exists() else 0


def prepare_stdlib(folder="data/stdlib"):
    """The default data: real text that every machine with Python has."""
    prepare(documents(stdlib_files(), Counter()), folder, "stdlib", "bytes")


def progress(line, last=False):
    """Shows a line that the next one replaces, unless it is the last; in a log file, lines follow one another."""
    tty = sys.stdout.isatty()
    print(f"\r\033[K{line}" if tty else line, end="" if tty and not last else "\n", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command line, for every script: settings are dataclass fields, and the comment beside a field is its help


def parse_value(text, annotation):
    """The text of a flag as one of the types in the annotation, such as "int | None"."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "str" in kinds:
        return text
    if "bool" in kinds:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if "int" in kinds:
        number = float(text) if "e" in text.lower() else int(text)  # 1e9 and 1_000 are whole numbers too
        if int(number) != number:
            raise ValueError
        return int(number)
    return float(text)


def parse_command_line(*classes, hidden=(), positional=None, argv=None):
    """Reads --name=value and --name value for the fields of the dataclasses: a dict of values for each class.

    positional: (name, help) of the words that are not flags, whose list is then returned last. Mistakes end the program
    with one line and exit code 2.
    """
    script = sys.modules["__main__"]
    parser = argparse.ArgumentParser(
        description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=True
    )
    parser.error = lambda message: fail(message + " (--help lists all settings)")
    if positional:
        parser.add_argument("words", nargs="*", metavar=positional[0], help=positional[1])
    types = {}
    for cls in classes:
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
        group = parser.add_argument_group(cls.__doc__.split(".")[0])
        for field in dataclasses.fields(cls):
            if field.name in hidden:
                continue
            types[field.name] = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            switch = {"nargs": "?", "const": "true"} if "bool" in types[field.name] else {}
            default = "" if field.default is None else f" [{field.default}]"
            text = (comments.get(field.name, "") + default).replace("%", "%%")
            group.add_argument(f"--{field.name}", metavar=types[field.name].split(" |")[0].upper(), help=text, **switch)
    parsed, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.split("=")[0]
        close = difflib.get_close_matches(flag, [f"--{name}" for name in types], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        fail(f"unknown setting {flag}{hint} (--help lists all settings)" if flag.startswith("-") else f"unexpected word {word!r}")
    results = []
    for cls in classes:
        values = {}
        for field in dataclasses.fields(cls):
            text = getattr(parsed, field.name, None)
            if text is not None:
                try:
                    values[field.name] = parse_value(text, types[field.name])
                except (ValueError, KeyError, OverflowError):
                    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
                    fail(f"--{field.name}={text}: expected {words[types[field.name].split(' |')[0]]}")
        results.append(values)
    return (*results, parsed.words) if positional else tuple(results)


def fail(message):
    message = str(message).splitlines()[0]
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """Runs a script's main. A mistake of its user's is one line, not a traceback; `python -X dev` shows the traceback."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        memory = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory|Storage size calculation overflowed", str(error))
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not memory:
            raise
        fail(f"out of memory: smaller sizes, batches, prompts or samples need less ({error})" if memory else error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# The papers' own checkpoints


def load_official(source, **settings):
    """The RAT in a checkpoint of the papers' own code (Hugging Face barpitf/RAT and barpitf/ratplus).

    source    a path, or the dict of tensors
    settings  layers, and whatever else of rat.Config does not show in the tensors; if not given, as in the papers: heads
              of width 128, context 4096, chunks of 16, 2 groups, window 1024, dense. vocab_size, d_model, n_layer do
              show. Their vocabulary is LLaMA-2's; the model's tokenizer has no name.
    ValueError names the first tensor that is missing, too many, or of another shape than the settings make it.
    """
    import torch

    from rat import RAT, Config, expect

    tensors, weights = official_tensors(source), {}
    embedding = tensors.get("embedding.wte.weight")
    expect(embedding is not None, "not a checkpoint of the papers' code: it lacks the tensor embedding.wte.weight")
    vocab_size, d = embedding.shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
    shown = dict(vocab_size=vocab_size, d_model=d, n_layer=len(layers))
    for name in shown.keys() & settings.keys():
        expect(settings[name] == shown[name], f"{name} is {settings[name]}: the checkpoint has {shown[name]}")
    config = Config(**dict(context=4096, n_head=max(1, d // 128)) | settings | shown)
    with torch.device("meta"):
        model = RAT(config)
    what = f"a model of layers {config.layers!r}, n_head {config.n_head}, qk_groups {config.qk_groups}"
    for name, parameter in model.state_dict().items():
        theirs, shape = official_name(name), tuple(parameter.shape)
        expect(theirs in tensors, f"the checkpoint lacks the tensor {theirs}, which {what} has")
        given = tensors.pop(theirs).float()
        if name == "embedding.weight":
            given = torch.nn.functional.pad(given, [0, 0, 0, shape[0] - vocab_size])
        expect(given.shape == shape, f"the tensor {theirs} has the shape {tuple(given.shape)}, in {what} it has {shape}")
        if "in_proj" in name and config.of_layer("layers", layer := int(name.split(".")[1])) == "rat+":
            z, v, g, q, k = model.blocks[layer].mixer.sizes
            z, q, k, v, g = given.split([z, q, k, v, g])  # their order of rows; for other kinds it is ours
            given = torch.cat([z, v, g, q, k])
        weights[name] = given
    output = tensors.pop("head.lm_head.weight", embedding)
    expect(torch.equal(output, embedding), "head.lm_head.weight is not embedding.wte.weight: here the two are one")
    expect(not tensors, f"the checkpoint has the tensor {min(tensors, default='')}, which {what} has not")
    model.load_state_dict(weights, assign=True)
    return model


def official_name(name):
    """The name that one of our parameters has in the papers' checkpoints."""
    parts = {"blocks": "backbone.layers", "mixer_norm": "seq_layer.input_norm", "mixer": "seq_layer", "forget_bias": "gate_bias",
             "mlp_norm": "hidden_layer.ln", "mlp.0": "hidden_layer.fc1", "mlp.2": "hidden_layer.fc2"}  # fmt: skip
    whole = {"embedding.weight": "embedding.wte.weight", "norm.weight": "backbone.ln.weight"}
    return whole.get(name) or re.sub(r"mlp\.\d|\w+", lambda part: parts.get(part[0], part[0]), name)


def official_tensors(source):
    """{name: tensor} of a file of the papers' code, or of such a dict. Runs no code: of classes in a file only EasyDict is known."""
    import torch

    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise ValueError(f"there is no checkpoint {source}")
        try:
            with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):  # it holds plain values, as they are
                source = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds a {reason[1]}, which is code" if reason else "it is damaged, or not a checkpoint"
            raise ValueError(f"cannot read {source}: {reason}; where you trust it, keep its tensors alone: "
                             f"torch.save(torch.load(path, weights_only=False)['task'], new_path)") from error  # fmt: skip
    source = source.get("task", source) if isinstance(source, dict) else None
    if not isinstance(source, dict) or not all(isinstance(x, torch.Tensor) for x in source.values()):
        raise ValueError("not a checkpoint of the papers' code: neither a dict of tensors nor one that holds them as 'task'")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in source.items()}


def convert_checkpoint(path, out, tokenizer, settings):
    """Writes the papers' checkpoint at `path` as one of train.py, which sample.py and train.py read like any other."""
    if not out:
        raise ValueError("--out is missing: name the checkpoint to write, such as --out=out/theirs/ckpt.pt")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: choose another --out")
    if "layers" not in settings:
        raise ValueError("--layers is missing: rat, rat+, attention, rnn, rat,swa or attention,swa")
    model = load_official(path, **settings)
    if tokenizer:
        size = get_tokenizer(tokenizer).n_vocab
        if size > model.config.vocab_size:
            raise ValueError(f"the tokenizer {tokenizer} has {size} tokens, the model {model.config.vocab_size}: name its own")
        model.tokenizer = tokenizer
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    model.save(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {model.config.layers}, {model.config.n_layer} layers of width {model.config.d_model}, {parameters / 1e6:.1f} M parameters")
    print(f"next: python sample.py --ckpt={out}")


# ----------------------------------------------------------------------------------------------------------------------
# The script


@dataclasses.dataclass
class Settings:
    """Settings of prepare_data.py"""

    out: str | None = None  # the folder to make (data/stdlib or data/text); checkpoint: the file
    tokenizer: str | None = None  # bytes, gpt2, another of tiktoken's or a SentencePiece file (stdlib: bytes, text: gpt2)
    val_every: int = 20  # every so many documents, one goes to validation
    shard_tokens: int = 100_000_000  # tokens per shard
    workers: int = os.cpu_count() or 1  # threads that tokenize
    shards: int = 10  # fineweb-edu: how many of its 1001 training shards, 0.2 GB and 100 M tokens each
    base_url: str = FINEWEB_EDU  # fineweb-edu: where its shards are


def main():
    usage = "stdlib (default), text FILES OR FOLDERS ..., fineweb-edu, or checkpoint FILE"
    classes = [Settings]
    if "checkpoint" in sys.argv[1:]:
        from rat import Config  # its settings are flags too; the other sources do without torch

        classes.append(Config)
    values, *model_values, words = parse_command_line(*classes, hidden=("vocab_size",), positional=("SOURCE", usage))
    settings, source, names = Settings(**values), words[0] if words else "stdlib", words[1:]
    if source == "checkpoint":
        if len(names) != 1:
            raise ValueError("checkpoint wants one file: python prepare_data.py checkpoint FILE --layers=rat --out=FILE")
        return convert_checkpoint(names[0], settings.out, settings.tokenizer, *model_values)
    if source == "text" and not names:
        raise ValueError("text wants files or folders: python prepare_data.py text FILES OR FOLDERS ...")
    if source not in ("stdlib", "text", "fineweb-edu") or names and source != "text":
        raise ValueError(f"unexpected {' '.join(words)!r}: the sources are {usage}")
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"there is no file or folder {name}")
    folder = settings.out or f"data/{source}"
    if source == "fineweb-edu":
        if not 1 <= settings.shards <= 1001:
            raise ValueError(f"shards is {settings.shards}: FineWeb-Edu has 1 to 1001 training shards")
        shards = [f"edu_fineweb_train_{n:06d}.bin" for n in range(1, settings.shards + 1)]
        Download(settings.base_url, folder, ["edu_fineweb_val_000000.bin", *shards]).run()
    else:
        skipped = Counter()
        texts = documents(stdlib_files() if source == "stdlib" else text_files(names, skipped), skipped)
        tokenizer = settings.tokenizer or {"stdlib": "bytes", "text": "gpt2"}[source]
        prepare(texts, folder, source, tokenizer, settings.val_every, settings.shard_tokens, settings.workers)
        for reason, count in skipped.items():
            print(f"skipped {count:,} {reason}")
    print(f"next: python train.py --data={folder}")


if __name__ == "__main__":
    run(main)
