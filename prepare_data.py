"""Data: text to token shards, and token shards to training windows.

    python prepare_data.py                              the sources of Python's standard library, as bytes: no download
    python prepare_data.py text FILES OR FOLDERS ...    your own text

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
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding of that name. "bytes" is 256 bytes and <|endoftext|>, and needs no download; "gpt2" does, once."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"there is no tokenizer {name!r}: take bytes, gpt2 or another encoding of tiktoken")
    try:
        tokenizer = tiktoken.get_encoding(name)
    except Exception as error:  # whatever its HTTP library raises
        reason = str(error).splitlines()[0][:150]
        raise ValueError(
            f"the tokenizer {name} has to be downloaded once, and that failed ({reason}): connect to the network, set "
            f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use the tokenizer bytes"
        ) from error
    if END_OF_TEXT not in tokenizer.special_tokens_set or tokenizer.n_vocab > 1 << 16:
        raise ValueError(f"the tokenizer {name} does not fit shards of uint16 with {END_OF_TEXT}: take gpt2 or bytes")
    return tokenizer


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


# What a folder without meta.json holds: pre-tokenized FineWeb-Edu, as published.
DEFAULT_META = {"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": 50256}


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
        meta = self.folder / "meta.json"
        self.meta = json.loads(meta.read_text()) if meta.exists() else DEFAULT_META

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

    def batch(self, step, size):
        """The `size` windows of training step `step`, counted from 0. See `windows`."""
        epoch, place = np.divmod(np.arange(step * size, (step + 1) * size), len(self))
        for e in set(epoch.tolist()) - self.orders.keys():
            self.orders = {old: order for old, order in self.orders.items() if old == e - 1}
            self.orders[e] = np.random.default_rng([self.seed, e]).permutation(len(self))
        return self.windows(np.array([self.orders[e][p] for e, p in zip(epoch.tolist(), place.tolist())]))

    def sample(self, size):
        """About `size` windows, evenly spaced and always the same. See `windows`."""
        return self.windows(np.unique(np.linspace(0, len(self) - 1, min(size, len(self))).astype(np.int64)))


# ----------------------------------------------------------------------------------------------------------------------
# Sources: each yields documents, as strings, and counts what it skips

TEXT_ENDINGS = (".txt", ".md", ".py", ".jsonl")


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
        lines = path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
                for part in file if lines else [file.read()]:
                    try:
                        text = part.decode("utf-8-sig")
                        text = json.loads(text)["text"] + "" if lines else text
                    except UnicodeDecodeError:
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


def prepare(texts, folder, source, tokenizer_name, val_every=20, shard_tokens=100_000_000, workers=1):
    """Tokenizes texts into train and validation shards in `folder`, which appears whole or not at all.

    Every val_every-th document is for validation; of a single document, its last tenth.
    """
    folder, partial = Path(folder), Path(f"{folder}.partial")
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
                except (ValueError, KeyError):
                    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
                    fail(f"--{field.name}={text}: expected {words[types[field.name].split(' |')[0]]}")
        results.append(values)
    return (*results, parsed.words) if positional else tuple(results)


def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """Runs a script's main. A mistake of its user's is one line, not a traceback; `python -X dev` shows the traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        fail(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# The script


@dataclasses.dataclass
class Settings:
    """Settings of prepare_data.py"""

    out: str | None = None  # the folder to make (data/stdlib or data/text)
    tokenizer: str | None = None  # bytes, gpt2 or another of tiktoken's encodings (stdlib: bytes, text: gpt2)
    val_every: int = 20  # every so many documents, one goes to validation
    shard_tokens: int = 100_000_000  # tokens per shard
    workers: int = os.cpu_count() or 1  # threads that tokenize


def main():
    values, words = parse_command_line(Settings, positional=("SOURCE", "stdlib (default), or text FILES OR FOLDERS ..."))
    settings, source, names = Settings(**values), words[0] if words else "stdlib", words[1:]
    if source == "text" and not names:
        raise ValueError("text wants files or folders: python prepare_data.py text FILES OR FOLDERS ...")
    if source not in ("stdlib", "text") or source == "stdlib" and names:
        raise ValueError(f"unexpected {' '.join(words)!r}: the sources are stdlib, and text FILES OR FOLDERS ...")
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"there is no file or folder {name}")
    skipped = Counter()
    texts = documents(stdlib_files() if source == "stdlib" else text_files(names, skipped), skipped)
    tokenizer = settings.tokenizer or {"stdlib": "bytes", "text": "gpt2"}[source]
    folder = settings.out or f"data/{source}"
    prepare(texts, folder, source, tokenizer, settings.val_every, settings.shard_tokens, settings.workers)
    for reason, count in skipped.items():
        print(f"skipped {count:,} {reason}")
    print(f"next: python train.py --data={folder}")


if __name__ == "__main__":
    run(main)
