"""Data: text to token shards, and token shards to training windows.

    python prepare_data.py                              the sources of Python's standard library, as bytes
    python prepare_data.py text FILES OR FOLDERS ...    your own: .txt .md .py .jsonl, and these gzipped
    python prepare_data.py fineweb-edu --shards=10      a billion tokens of FineWeb-Edu, tokenized (2 GB)
    python prepare_data.py recall --pairs=8             a test of memory: facts, then questions about them
    python prepare_data.py copy --letters=12            another: a random string, and the same again
    python prepare_data.py needle data/stdlib           a third: needles hidden in the text of that folder
    python prepare_data.py checkpoint theirs.pt --layers=rat --out=out/theirs/ckpt.pt     the papers' models

A shard is llm.c's format: 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros), then
that many uint16. Every document begins with <|endoftext|>. A data folder holds shards named *_train_*.bin and
*_val_*.bin, and meta.json with the tokenizer's name; without it, that is gpt2, as in published shards.

Where only answers count, each shard has a mask of the same name, .mask: one uint8 per token, 1 if a model
learns to predict it. `text` writes masks if a line of a .jsonl has "prompt" and "answer", not "text".

The last section, the command line, is here because every script imports this file.
"""

import argparse
import codecs
import contextlib
import difflib
import errno
import email.utils
import gzip
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import string
import sys
import sysconfig
import tempfile
import threading
import time
import typing
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter, OrderedDict, deque
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch

from rat import RAT, Config

try:
    import fcntl
except ImportError:  # Windows: `alone` does not lock
    fcntl = None

END_OF_TEXT = "<|endoftext|>"


# --- Mistakes, and files written whole or not at all -------------------------------------------------
class BadInput(ValueError):
    """A mistake that the caller can mend: one clear line with the value, what was expected, what to do."""


def expect(condition, message):
    if not condition:
        raise BadInput(message)


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path for a file or folder. If all goes well, it is flushed and renamed to `path`.

    Each call has a temporary folder of its own beside `path`, so processes never collide. It is removed in
    any case, unless the process is killed.
    """
    target = Path(os.path.realpath(path))
    try:
        fits = target.is_file() or not target.exists()
        expect(fits, f"{path} exists and is not a regular file: choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", f"{target.name}.", target.parent) as folder:
            partial = Path(folder, target.name)
            yield partial
            for name in filter(Path.is_file, [partial, *partial.rglob("*")]):
                with open(name, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__:  # torch hides the disk's error behind its own
            cause = cause.__context__
        if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"cannot write {path}: {cause}; what was there before is untouched") from error


def read_checkpoint(path):
    """The dict in a checkpoint file. Verifies all contents and never runs code; tensors load when used."""
    expect(os.path.isfile(path), f"there is no checkpoint {path}: `python train.py` writes out/ckpt.pt")
    with damage_reported(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch writes these checksums, but never reads them
        expect(damaged is None, f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def damage_reported(path):
    """Turns whatever a damaged or foreign file may raise into one clear line."""
    try:
        yield
    except Exception as error:
        lacks = "it lacks " * isinstance(error, KeyError)
        reason = lacks + " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{path} is not a checkpoint of train.py, or damaged: {reason}") from error


# --- Tokenizers -----------------------------------------------------------------------------------
def get_tokenizer(name):
    """The tiktoken.Encoding of that name: "bytes" needs no download, "gpt2" and others need one.

    A name ending in .model is the path of a SentencePiece model, such as LLaMA-2's, which the papers use.
    """
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {END_OF_TEXT: 256}
        return tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens=special)
    known = name.endswith(".model") or name in tiktoken.list_encoding_names()
    expect(known, f"there is no tokenizer {name!r}: take bytes, gpt2 or another encoding of tiktoken")
    try:
        tokenizer = SentencePiece(name) if name.endswith(".model") else tiktoken.get_encoding(name)
    except Exception as error:  # whatever the library, or its HTTP library, raises
        needs = "pip install sentencepiece, and a file" if name.endswith(".model") else "the network once"
        reason = f"the tokenizer {name} needs {needs} ({type(error).__name__})"
        raise BadInput(f"{reason}; or set TIKTOKEN_CACHE_DIR, or use the tokenizer bytes") from error
    fits = END_OF_TEXT in tokenizer.special_tokens_set and tokenizer.n_vocab <= 1 << 16
    expect(fits, f"the tokenizer {name} does not fit shards of uint16 with {END_OF_TEXT}: take gpt2 or bytes")
    return tokenizer


class SentencePiece:
    """A SentencePiece model with the part of tiktoken.Encoding used here. Its <s> is <|endoftext|>."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor

        self.model = SentencePieceProcessor(model_file=path)
        self.n_vocab, self.eot_token = self.model.vocab_size(), self.model.bos_id()
        self.special_tokens_set = {END_OF_TEXT} if self.eot_token >= 0 else set()

    def encode_ordinary(self, text):
        return self.model.encode(text)

    def decode_single_token_bytes(self, token):
        piece = self.model.id_to_piece(token)
        if self.model.is_byte(token):  # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return b"" if self.model.is_control(token) else piece.replace("\u2581", " ").encode()


class TextStream:
    """Turns tokens into text one at a time. A character appears once all of its bytes have."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token):
        try:
            return self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        except (KeyError, IndexError):  # a model may have more tokens than its tokenizer
            return "\ufffd"


# --- Shards ---------------------------------------------------------------------------------------
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "end_of_text": 50256}  # a folder without meta.json
BYTES = {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256}  # data/stdlib before it is made


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def read_shard(path):
    """The tokens of a shard, a read-only memory-mapped array of uint16. BadInput if it is not whole."""
    size, whole = os.path.getsize(path), whole_size(path)
    expect(size == whole, f"{path} has {size} bytes, its header says {whole}; prepare or download it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def whole_size(path):
    """The size in bytes that a shard's header announces. BadInput if it is not the header of a shard."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    (magic, version, tokens), remedy = (int(n) for n in header[:3]), "prepare or download it again"
    expect(magic == MAGIC, f"{path} is not a shard: it begins with {magic}, not {MAGIC}; {remedy}")
    expect(version == VERSION, f"{path} is a shard of version {version}, not {VERSION}; {remedy}")
    expect(tokens > 0, f"{path} is a shard of {tokens} tokens by its header, expected 1 or more; {remedy}")
    return HEADER_BYTES + 2 * tokens


def read_mask(path, tokens):
    """The mask of a shard of so many tokens, a memory-mapped array of uint8. BadInput if it does not fit."""
    remedy = "prepare it again"
    expect(path.exists(), f"there is no {path}, while other shards have masks; {remedy}")
    size = os.path.getsize(path)
    fits = f"not one for each of its shard's {tokens} tokens"
    expect(size == tokens, f"{path} has {size} bytes, {fits}; {remedy}")
    return np.memmap(path, dtype=np.uint8, mode="r")


class Data:
    """One split of a data folder, as windows of `context` tokens and their targets.

    Windows lie end to end in each shard and never cross into the next. Each epoch shows each window once, in
    an order that depends on (seed, epoch) alone: what a step sees does not depend on how the run got there.

    masks: of the shards; empty if all tokens are targets
    """

    def __init__(self, folder, split, context, seed=0):
        self.context, self.seed, self.orders = context, seed, {}
        expect(os.path.isdir(folder), f"there is no folder {folder}: make it with prepare_data.py")
        self.paths = sorted(Path(folder).glob(f"*_{split}_*.bin"))
        expect(self.paths, f"{folder} holds no {split} shards, *_{split}_*.bin: see prepare_data.py --help")
        self.shards = [np.asarray(read_shard(path)) for path in self.paths]  # slices of a memmap are slow
        masks = [path.with_suffix(".mask") for path in self.paths]
        masks = masks if any(Path(folder).glob("*.mask")) else []
        self.masks = [np.asarray(read_mask(*pair)) for pair in zip(masks, map(len, self.shards))]
        self.ends = np.cumsum([max(0, len(shard) - 1) // context for shard in self.shards])
        short = f"{folder} holds {sum(map(len, self.shards))} {split} tokens, less than a window of {context}"
        expect(len(self), f"{short}: prepare more text or a larger share (--val_every), or lower --context")
        self.meta = self.read_meta(folder)

    @staticmethod
    def read_meta(folder):
        """Name, vocabulary size and <|endoftext|> of the tokenizer that made the folder's tokens."""
        path = Path(folder, "meta.json")
        if not path.exists():
            return BYTES if folder == "data/stdlib" else GPT2
        try:
            meta = json.loads(path.read_text())
            meta = {name: type(value)(meta[name]) for name, value in GPT2.items()}
            expect(0 <= meta["end_of_text"] < meta["vocab_size"] <= 1 << 16, "no numbers of a uint16")
            return meta
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BadInput(f"{path} is damaged, expected something like {json.dumps(GPT2)}") from error

    def __len__(self):
        """Number of windows."""
        return int(self.ends[-1])

    def checksum(self):
        """CRC-32 of the shards and masks: of every token up to 16 M, beyond that of evenly spaced pages."""
        page, total = 2048, 0
        stride = page * -(-sum(map(len, self.shards)) // (1 << 24))
        for values in self.shards + self.masks:
            total = zlib.crc32(len(values).to_bytes(8, "little"), total)
            for start in range(0, len(values), stride):
                total = zlib.crc32(values[start : start + page], total)
        return total

    def windows(self, index):
        """Windows number index (n,): inputs and targets, both (n, context) int64.

        Every token is a target, the first of a document too, unless a mask says no: -100.
        """
        shard = np.searchsorted(self.ends, index, side="right")
        first = (index - np.concatenate([[0], self.ends])[shard]) * self.context
        tokens = np.empty((len(index), self.context + 1), dtype=np.int64)
        mask = np.ones(tokens.shape, dtype=np.uint8)
        for row, (s, a) in enumerate(zip(shard.tolist(), first.tolist())):
            tokens[row] = self.shards[s][a : a + self.context + 1]
            if self.masks:
                mask[row] = self.masks[s][a : a + self.context + 1]
        size, largest = self.meta["vocab_size"], tokens.max()
        path = self.paths[shard[tokens.max(axis=1).argmax()]]
        expect(largest < size, f"{path} holds token {largest}, its tokenizer has {size}: prepare it again")
        expect(mask.max() <= 1, f"a mask of {path.parent} holds {mask.max()}, not 0 or 1: prepare it again")
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        targets[mask[:, 1:] == 0] = -100
        return inputs, targets

    def batch(self, step, size, rows=slice(None)):
        """Of the `size` windows of training step `step`, counted from 0, those in `rows`. See `windows`."""
        epoch, place = np.divmod(np.arange(step * size, (step + 1) * size)[rows], len(self))
        self.orders = {e: self.orders[e] if e in self.orders else self.order(e) for e in set(epoch.tolist())}
        index = [self.orders[e][p] for e, p in zip(epoch.tolist(), place.tolist())]
        return self.windows(np.array(index, dtype=np.int64))

    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(np.arange(len(self), dtype=np.uint32))

    def sample(self, size):
        """About `size` windows, evenly spaced and always the same. See `windows`."""
        return self.windows(np.unique(np.linspace(0, len(self) - 1, min(size, len(self))).astype(np.int64)))


def prefetch(iterator, depth=4):
    """The items of an iterator, which runs ahead by `depth` items in a thread of its own."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item


# --- Text to shards -------------------------------------------------------------------------------
def stdlib_files():
    """The Python sources of the standard library that runs this, without its tests and what pip installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]


def text_files(names, skipped):
    """The files named, and those in the folders named whose ending is known."""
    for path in map(Path, names):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file == path or file.name.removesuffix(".gz").endswith((".txt", ".md", ".py", ".jsonl")):
                if not file.is_dir():
                    yield file
            elif file.is_file():
                skipped["files with other endings"] += 1


def documents(files, skipped):
    """The documents in the files: each file is one, or each line of a .jsonl. skipped: a Counter of reasons.

    A document is a list of parts (text, whether a model learns to predict it).
    """
    for path in files:
        is_json = path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for part in file if is_json else [file.read()]:
                    try:
                        text = part.decode("utf-8-sig")
                        document = parse_json(text) if is_json else [(text, True)]
                        text = "".join(text for text, _ in document)
                        text.encode()  # JSON can name half a character
                        learned = document[-1][0]
                    except (ValueError, KeyError, TypeError, RecursionError):
                        learned = ""
                    if learned.strip() and "\0" not in text:
                        yield document
                    else:
                        wanted = "lines that are not JSON with text, or prompt and answer"
                        skipped[wanted if is_json else "files without text in UTF-8"] += 1
        except (OSError, EOFError, zlib.error):
            skipped["files that cannot be read"] += 1


def parse_json(line):
    """The document in a line of a .jsonl: its "text", or a "prompt" and the "answer" to learn."""
    line = json.loads(line)
    if "text" in line:
        return [(line["text"] + "", True)]
    return [(line["prompt"] + "", False), (line["answer"] + "", True)]


def prepare(texts, folder, source, tokenizer_name, val_every=20, shard_tokens=100_000_000, workers=1):
    """Tokenizes documents into train and validation shards in a new `folder`, atomically.

    texts  each a text, or a list of parts (text, whether a model learns to predict it), tokenized apart; a
           part may be a list of tokens
    Every val_every-th document is for validation; of a single text, its last tenth.
    """
    folder = Path(folder)
    expect(not folder.exists(), f"{folder} is there already: choose another folder with --out")
    expect(val_every >= 2, f"val_every is {val_every}: it must be 2 or more")
    expect(0 < shard_tokens < 1 << 31, f"shard_tokens is {shard_tokens}: it must be from 1 to 2**31 - 1")
    for left in folder.parent.glob(f"{folder.name}.????????.partial"):
        progress(f"note: {left} belongs to another preparation; remove it if that one was killed", last=True)
    parted = ([(text, True)] if isinstance(text, str) else text for text in texts)
    first = list(itertools.islice(parted, 2))
    expect(first, "no text was found: expected .txt, .md, .py or .jsonl files, or these gzipped, in UTF-8")
    if len(first) == 1:
        expect(len(first[0]) == 1, "a single prompt was found, none is left for validation: give two or more")
        progress("one document: its last tenth is for validation", last=True)
        ((text, wanted),) = first[0]
        cut = len(text) * 9 // 10
        first = [[(text[:cut], wanted)], [(text[cut:], wanted)]]
    parted, tokenizer = itertools.chain(first, parted), get_tokenizer(tokenizer_name)

    def encode(document):
        """Its tokens and their mask."""
        parts = [
            (tokenizer.encode_ordinary(text) if isinstance(text, str) else text, wanted)
            for text, wanted in document
        ]
        masks = (bytes([wanted]) * len(tokens) for tokens, wanted in parts)
        return itertools.chain.from_iterable(tokens for tokens, _ in parts), b"".join(masks)

    with atomic(folder) as partial:
        partial.mkdir()
        start, count, written = time.perf_counter(), 0, Counter()
        buffers = {"train": (array("H"), bytearray()), "val": (array("H"), bytearray())}
        with ThreadPoolExecutor(workers) as pool:  # tiktoken releases the GIL while it encodes
            batch = True
            while batch:
                batch = list(itertools.islice(parted, 64 * workers))
                for tokens, mask in pool.map(encode, batch):
                    all_tokens, masks = buffers["val" if count % val_every == 1 else "train"]
                    masks.extend((masks[-1:] or b"\1") + mask)  # predict the end of what was to be predicted
                    all_tokens.extend([tokenizer.eot_token, *tokens])
                    count += 1
                for split, (tokens, mask) in buffers.items():
                    while len(tokens) >= (shard_tokens if batch else 1):
                        path = partial / f"{source}_{split}_{written[split] // shard_tokens:06d}.bin"
                        write_shard(path, tokens[:shard_tokens])
                        if 0 in mask[:shard_tokens]:
                            path.with_suffix(".mask").write_bytes(mask[:shard_tokens])
                        written[split] += min(len(tokens), shard_tokens)
                        del tokens[:shard_tokens], mask[:shard_tokens]
                rate = count / (time.perf_counter() - start)
                progress(f"{count:,} documents, {rate:,.0f} per second", every=2)
        missing = {path.with_suffix(".mask") for path in partial.glob("*.bin")}
        masks = set(partial.glob("*.mask"))
        for path in missing - masks if masks else ():  # one mask, or one for each shard
            path.write_bytes(b"\1" * len(read_shard(path.with_suffix(".bin"))))
        meta = dict(zip(GPT2, (tokenizer_name, tokenizer.n_vocab, tokenizer.eot_token)))
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
    tokens = f"{written['train']:,} training and {written['val']:,} validation tokens ({tokenizer_name})"
    progress(f"{folder}: {count:,} documents, {tokens}", last=True)


def prepare_stdlib(folder="data/stdlib"):
    """The default data: real text that every machine with Python has. If two run at once, the first wins."""
    try:
        prepare(documents(stdlib_files(), Counter()), folder, "stdlib", "bytes")
    except (OSError, BadInput):
        if not os.path.isdir(folder):
            raise


# --- Tests of memory ------------------------------------------------------------------------------
def recall(number, pairs, packed, length, seed):
    """Documents of facts, each a key and its digit, then questions: a key, and as the answer its digit.

    Such as ..k3...q7..k3q7q7k3q7: half of the `length` tokens are facts among dots, half are questions. Keys
    are letters, all different. pairs: a list, of which each document draws its number of facts; packed: the
    share of documents with facts side by side, from a multiple of 16 tokens on. (Associative recall: Arora et
    al. 2023, "Zoology", arXiv 2312.04927)
    """
    room, most = length // 2 - 2, max(pairs)  # without the <|endoftext|> and the end of the line
    expect(length % 4 == 0, f"length is {length}: it must be a multiple of 4")
    expect(most <= 26, f"pairs is {most}: there are 26 keys")
    fits = 2 * most + 15 * (packed > 0) <= room
    expect(fits, f"{most} pairs do not fit into half of length {length}: take fewer, or a larger --length")
    expect(packed <= 1, f"packed is {packed}: it is a share of the documents, from 0 to 1")
    draw = random.Random(seed)
    for _ in range(number):
        n = draw.choice(pairs)
        facts = [key + draw.choice("01234567") for key in draw.sample(string.ascii_lowercase, n)]
        text = facts + ["."] * (room - 2 * n)
        draw.shuffle(text)
        if draw.random() < packed:
            before = draw.randrange(15, room - 2 * n + 1, 16)  # and the <|endoftext|>
            text = ["."] * before + facts + ["."] * (room - 2 * n - before)
        parts = [("".join(text), False)]
        for key, digit in draw.choices(facts, k=length // 4):
            parts += [(key, False), (digit, True)]
        yield [*parts, ("\n", False)]


def copies(number, letters, seed):
    """Documents of a random string, a bar, and as the answer the same again."""
    expect(letters > 0, f"letters is {letters}: it must be 1 or more")
    draw = random.Random(seed)
    for _ in range(number):
        text = "".join(draw.choices(string.ascii_lowercase, k=letters))
        yield [(f"{text}|", False), (text, True), ("\n", False)]


NEEDLES = {  # keys, values of each key, keys asked for
    "single": (1, 1, 1), "multi-key": (4, 1, 1), "multi-value": (1, 4, 1), "multi-query": (4, 1, 4),
}  # fmt: skip
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def needles(number, names, letters, digits, length, haystack, tokenizer, seed):
    """Documents of `length` tokens that hide needles, keys with values, in a haystack, then ask for values.

    A needle is a line, "bako: 4170263."; the question is "bako:", the answer " 4170263". All values of a key
    are asked for, in order. (Hsieh et al. 2024, "RULER", arXiv 2404.06654; its sentences are longer)
    names            of NEEDLES, of which each document draws one
    letters, digits  of a key, and of a value
    haystack         tokens, of which each document takes a piece; None: NOISE, again and again
    """
    draw, encode = random.Random(seed), tokenizer.encode_ordinary
    haystack = encode(NOISE * (length // 16 + 2)) if haystack is None else haystack
    for _ in range(number):
        n_keys, n_values, n_asked = NEEDLES[draw.choice(names)]
        facts = {}  # key: its tokens, and those of its values
        while len(facts) < n_keys:
            key = "".join(draw.choices(string.ascii_lowercase, k=letters))
            values = [draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(n_values)]
            facts[key] = encode(f"\n{key}:"), [encode(f" {value}") for value in values]
        hidden = [key + value + encode(".\n") for key, values in facts.values() for value in values]
        end = []
        for key, values in draw.sample(list(facts.values()), n_asked):
            end.append((key, False))
            for value in values:
                end += [(value, True), (encode(","), False)]
            end[-1] = (encode("."), False)
        room = length - 1 - sum(map(len, hidden)) - sum(len(tokens) for tokens, _ in end)
        expect(room >= 0, f"length is {length}: needles and questions alone take {length - room}")
        expect(room <= len(haystack), f"the haystack has {len(haystack)} tokens, less than --length={length}")
        first = draw.randrange(len(haystack) - room + 1)
        places = sorted(draw.randrange(room + 1) for _ in hidden)
        text = []
        for start, stop, needle in zip([0, *places], [*places, room], [*hidden, []]):
            text += [*haystack[first + start : first + stop], *needle]
        yield [(text, False), *end]


# --- Download -------------------------------------------------------------------------------------
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"
SHARD_BYTES = HEADER_BYTES + 2 * 100_000_000  # of a published shard


def download(base_url, folder, names, **options):
    """Fetches shards into folder, four at a time. Those that are there stay. options: see `fetch`."""
    folder = Path(folder)
    with alone(folder):
        missing = [folder / name for name in names if not is_shard(folder / name)]
        there = f"{len(names) - len(missing)} of {len(names)} shards are there, validation's included"
        progress(f"{folder}: {there}", last=True)
        begun, free, start = bytes_of(missing), shutil.disk_usage(folder).free, time.perf_counter()
        needed = len(missing) * SHARD_BYTES - begun
        room = f"{folder} has {free / 1e9:,.1f} GB free, the download needs {needed / 1e9:,.1f} GB"
        remedy = "make room, choose another folder with --out, or take fewer --shards"
        expect(needed <= free, f"{room}: {remedy}")
        stop, pool = threading.Event(), ThreadPoolExecutor(4)
        try:
            urls = {path: f"{base_url.rstrip('/')}/{path.name}" for path in missing}
            waiting = {pool.submit(fetch, url, path, stop, **options) for path, url in urls.items()}
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                rate = (bytes_of(missing) - begun) / (time.perf_counter() - start) / 1e6
                line = f"{len(missing) - len(waiting)} of {len(missing)} shards, {rate:,.1f} MB/s"
                progress(line, last=not waiting, every=0.5 if sys.stdout.isatty() else 10)
        except BaseException as error:
            stop.set()  # the other threads stop after the block they are reading, which may never come
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
            raise


def bytes_of(paths):
    """Bytes on disk of these files, complete or not."""
    total = 0
    for file in (file for path in paths for file in (path, Path(f"{path}.partial"))):
        with contextlib.suppress(FileNotFoundError):  # renamed by its thread just now
            total += file.stat().st_size
    return total


def is_shard(path):
    try:
        read_shard(path)
        return True
    except (OSError, BadInput):
        return False


def fetch(url, path, stop, tries=6, pause=1.0, timeout=30.0):
    """Downloads one shard, resuming NAME.partial. It gets its name once header, length and SHA-256 are right.

    Hugging Face sends the SHA-256; without one, header and length have to do. NAME.version tells which
    version of the server's file the partial one is; if the server does not say, each try starts over.
    tries: failures in a row without progress; pause: seconds before the second try, then doubled; timeout:
    seconds without an answer that count as a failure.
    """
    partial, version, failures, most = Path(f"{path}.partial"), Path(f"{path}.version"), 0, bytes_of([path])
    while not stop.is_set():
        delay = min(60, pause * 2**failures) * random.uniform(0.5, 1)
        try:
            if not is_shard(partial):
                receive(url, partial, version, stop, timeout)
            if not stop.is_set():
                verify(partial, version)
                os.replace(partial, path)
                version.unlink(missing_ok=True)
            return
        except BadInput as error:  # wrong bytes: from the beginning
            partial.unlink(missing_ok=True)
            reason = str(error)
        except ValueError as error:
            raise BadInput(f"{url} is not a valid URL: {error}: is --base_url right?") from error
        except urllib.error.HTTPError as error:
            reason = str(error)
            gone = error.code in (401, 403, 404, 410)
            expect(not gone, f"{url}: {reason}: is --base_url right, and --shards?")
            if error.code == 416:  # the server has no more, and what is here is no shard
                partial.unlink(missing_ok=True)
            wanted = seconds_until(error.headers["Retry-After"])
            if wanted > 600:
                raise OSError(f"{url}: {reason}: run this again in {int(wanted)} seconds") from error
            delay = max(delay, wanted)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        failures = 1 if bytes_of([path]) > most else failures + 1
        most = max(most, bytes_of([path]))
        if failures >= tries:
            raise OSError(f"{url}: {reason}, {failures} times in succession; run this again to continue")
        stop.wait(delay)


def receive(url, partial, version, stop, timeout):
    """Appends the missing bytes to `partial`. BadInput if they are not of this version of the shard."""
    known = text_of(version)
    begun = partial.stat().st_size if known and partial.exists() else 0
    request, redirect = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"}), Redirect()
    with (
        urllib.request.build_opener(redirect).open(request, timeout=timeout) as response,
        open(partial, "ab") as file,
    ):
        headers, linked = response.headers, redirect.linked or response.headers["X-Linked-Etag"]
        named = f"sha256 {linked}" if linked else headers["ETag"] or headers["Last-Modified"]
        if response.status == 200:
            begun = 0  # the whole file, whatever range was asked for
        if begun:
            sent = headers["Content-Range"] or ""
            expect(sent.startswith(f"bytes {begun}-"), f"range {sent} came, not {begun} on")
            expect(named == known, "the server's file has changed")
        file.truncate(begun)
        version.write_text(named or "", "utf-8")
        while not stop.is_set() and (block := response.read1(1 << 18)):
            file.write(block)
            file.flush()
            begun += len(block)
            if begun >= HEADER_BYTES:
                whole = whole_size(partial)
                expect(begun <= whole, f"{url} is longer than the {whole} bytes that its header says")
        os.fsync(file.fileno())


def verify(partial, version):
    """Checks a download. BadInput if its bytes are wrong, OSError if some are missing."""
    whole, size = whole_size(partial), partial.stat().st_size
    if size < whole:
        raise OSError(f"{partial.name} has {size} bytes, its header says {whole}")
    read_shard(partial)
    named = re.fullmatch('sha256 "?([0-9a-f]{64})"?', text_of(version))
    if named:
        with open(partial, "rb") as file:
            right = hashlib.file_digest(file, "sha256").hexdigest() == named[1]
        expect(right, f"{partial.name} does not have the SHA-256 {named[1]}")


def text_of(path):
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


class Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and notes the SHA-256 that Hugging Face sends with them."""

    linked = None

    def redirect_request(self, request, file, code, message, headers, url):
        self.linked = headers["X-Linked-Etag"] or self.linked
        return super().redirect_request(request, file, code, message, headers, url)


def seconds_until(retry_after):
    """The seconds in a header Retry-After: a number, or a date."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # none, or nonsense
        if retry_after.strip().isdecimal():
            return int(retry_after)
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0


# --- The papers' checkpoints ----------------------------------------------------------------------
def load_official(source, **settings):
    """The RAT in a checkpoint of the papers' own code (Hugging Face barpitf/RAT and barpitf/ratplus).

    source    a path, or the dict of tensors
    settings  layers, and what else of Config the tensors do not show, by default as in the papers: heads of
              width 128, context 4096, 2 groups
    The vocabulary is LLaMA-2's; the model's tokenizer has no name. Raises BadInput, a ValueError, naming a
    tensor that is missing, unexpected or of another shape.
    """
    tensors = official_tensors(source)
    expect("embedding.wte.weight" in tensors, "not a checkpoint of the papers: it lacks embedding.wte.weight")
    embedding = tensors["embedding.wte.weight"]
    output = tensors.pop("head.lm_head.weight", embedding)
    tied = torch.equal(output, embedding)
    expect(tied, "head.lm_head.weight is not embedding.wte.weight: here they are one tensor")
    vocab_size, d = embedding.shape
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")})
    shown = dict(vocab_size=vocab_size, d_model=d, n_layer=n_layer, context=4096, n_head=max(1, d // 128))
    config = Config(**shown | settings)
    with torch.device("meta"):
        model = RAT(config)
    weights = {our_name(name): tensor.float() for name, tensor in tensors.items()}
    weights["embedding.weight"] = torch.nn.functional.pad(embedding.float(), [0, 0, 0, -vocab_size % 64])
    try:
        for layer, block in enumerate(model.blocks):
            name = f"blocks.{layer}.mixer.in_proj.weight"
            names = config.layers.split(",")
            if names[layer % len(names)].startswith(("rat+", "gated")):  # of other kinds their order is ours
                z, v, g, q, k = block.mixer.sizes
                z, q, k, v, g = weights[name].split([z, q, k, v, g])
                weights[name] = torch.cat([z, v, g, q, k])
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError) as error:
        what = f"layers {config.layers!r}, n_head {config.n_head}, qk_groups {config.qk_groups}"
        raise BadInput(f"the checkpoint is not of {what}: {' '.join(str(error).split())[:300]}") from error
    return model


def our_name(theirs):
    """rat.py's name for a parameter of the papers' code."""
    names = {
        "embedding.wte": "embedding", "backbone.ln": "norm", "backbone.layers": "blocks",
        "seq_layer.input_norm": "mixer_norm", "seq_layer": "mixer", "gate_bias": "forget_bias",
        "hidden_layer.ln": "mlp_norm", "hidden_layer.fc1": "mlp.0", "hidden_layer.fc2": "mlp.2",
    }  # fmt: skip
    for name, ours in names.items():
        theirs = theirs.replace(name, ours)
    return theirs


def official_tensors(source):
    """{name: tensor} of a file of the papers' code, or of such a dict. Runs no code from the file."""
    if isinstance(source, (str, os.PathLike)):
        expect(os.path.isfile(source), f"there is no checkpoint {source}")
        try:
            with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):  # of plain values
                source = read_checkpoint(source)
        except BadInput as error:
            code = re.search(r"GLOBAL (\S+)", str(error.__cause__))
            reason = f"it holds a {code[1]}, which is code" if code else "it is damaged, or not a checkpoint"
            remedy = "if you trust it, torch.save(torch.load(path, weights_only=False)['task'], new_path)"
            raise BadInput(f"cannot read {source}: {reason}; {remedy}") from error
    source = source.get("task", source) if isinstance(source, dict) else None
    known = isinstance(source, dict) and all(isinstance(x, torch.Tensor) for x in source.values())
    expect(known, "not a checkpoint of the papers: it is neither a dict of tensors nor holds one as 'task'")
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in source.items()}


def convert_checkpoint(path, out, tokenizer, settings):
    """Writes the papers' checkpoint at `path` as one of train.py, to be read like any other."""
    expect(out, "--out is missing: name the checkpoint to write, such as --out=out/theirs/ckpt.pt")
    expect(not os.path.exists(out), f"{out} is there already: choose another --out")
    expect("layers" in settings, "--layers is missing: rat, rat+, gated, attention, rnn, rat,swa ...")
    model = load_official(path, **settings)
    if tokenizer:
        size, ours = get_tokenizer(tokenizer).n_vocab, model.config.vocab_size
        expect(size <= ours, f"the tokenizer {tokenizer} has {size} tokens, the model {ours}: name its own")
        model.tokenizer = tokenizer
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    model.save(out)
    print(f"{out}: {model.config.n_layer} layers, {model.config.layers}, of width {model.config.d_model}")
    print(f"next: python sample.py --ckpt={out}")


# --- The command line that all scripts share ------------------------------------------------------
def parse_command_line(settings, model, words=None):
    """The flags --name=value of a dataclass's fields and of some of rat.Config's.

    A field's type tells how to read its value, the comment beside it is its help. model: names of Config's
    fields, with defaults to show; words: (metavar, help) of words that are not flags. Returns the values
    given, a dict for each of the two, and the list of words.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = fail
    if words:
        parser.add_argument("words", nargs="*", metavar=words[0], help=words[1])
    flags = {settings: {field.name: field.default for field in fields(settings)}, Config: model}
    for cls, defaults in flags.items():
        group = parser.add_argument_group(cls.__doc__.partition(".")[0])
        lines = [line.partition("  # ") for line in inspect.getsource(cls).splitlines()]
        comments = {line.partition(":")[0].strip(): comment for line, _, comment in lines}
        for field in (field for field in fields(cls) if field.name in defaults):
            kind = type_of(field)
            default = "" if defaults[field.name] is None else f" [{defaults[field.name]}]"
            options = dict(type=reader(kind), metavar=kind.__name__.upper())
            switch = dict(nargs="?", const=True) if kind is bool else {}
            text = (comments[field.name] + default).replace("%", "%%")
            group.add_argument(f"--{field.name}", help=text, **options, **switch)
    given, unknown = parser.parse_known_intermixed_args()
    for word in unknown:
        names = [f"--{name}" for names in flags.values() for name in names]
        close = difflib.get_close_matches(word.partition("=")[0], names, n=1)
        fail(f"unknown setting {word}: {f'did you mean {close[0]}?' if close else '--help lists all'}")
    given = vars(given)
    values = [{name: given[name] for name in names if name in given} for names in flags.values()]
    return *values, given.get("words", [])


def type_of(field):
    """The type of a dataclass's field, of str | None: str."""
    return (typing.get_args(field.type) or [field.type])[0]


def reader(kind):
    """A function from a flag's text to an int, float, bool or str, for argparse. No setting is negative."""
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a value: leave it out"}
    if kind in (int, float):
        expected[kind] += " from 0 to 2**63 - 1"

    def read(text):
        try:
            if kind is str and text:
                return text
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            value = float(text) if kind is float or "e" in text.lower() else int(text)  # 1e9 is whole, too
            if 0 <= value < 1 << 63 and kind(value) == value:
                return kind(value)
        except (ValueError, KeyError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected[kind]}")

    return read


def numbers(name, text):
    """The whole numbers in the text of a flag, such as 1,2,4."""
    fits = all(part.isdecimal() and int(part) > 0 for part in text.split(","))
    expect(fits, f"{name} is {text!r}: it is a list of whole numbers above 0")
    return list(map(int, text.split(",")))


def progress(line, last=False, every=0.0):
    """Shows a line that the next one replaces unless it is the last; in a file, lines follow one another.

    every: seconds to pass between two lines; those that come sooner are left out.
    """
    now, tty = time.monotonic(), sys.stdout.isatty()
    if last or now - progress.shown >= every:
        progress.shown = now
        if tty:
            line = "\r\033[K" + (line if last else line[: shutil.get_terminal_size().columns - 1])
        print(line, end="" if tty and not last else "\n", flush=True)


progress.shown = -math.inf


@contextlib.contextmanager
def alone(folder):
    """Makes and locks a folder. BadInput if another process has locked it; a lock dies with its process."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, ".lock"), "a+", errors="replace") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = f"{folder} is in use by {file.read() or 'another process'}"
            raise BadInput(f"{who}: wait for it, or choose another folder with --out") from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
        yield


def first_process_first(deserted=False):
    """Of torchrun's processes, the first speaks: if it fails too, torchrun ends the others as they wait.

    deserted: whether this one fails because another is gone, which has reported why
    """
    rank = int(os.environ.get("RANK", 0))
    if rank or deserted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 + rank)


def fail(message):
    """Ends the program with one line and exit code 2."""
    first_process_first()
    print(f"{Path(sys.argv[0]).name}: error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """Runs a script's main. A user's mistake is one line; a bug, in this code or yours, has its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may not know every character
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output is gone, as in `| head`
        os._exit(141)
    except (ValueError, OSError) as error:
        if type(error) not in (ValueError, BadInput) and not isinstance(error, OSError):
            raise
        fail(error)
    except (MemoryError, RuntimeError) as error:
        known = "out of memory", "can't allocate memory", "Storage size calculation overflowed"
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in known):
            first_process_first("closed by peer" in str(error))
            raise
        fail(f"out of memory: smaller sizes, batches, prompts or samples need less ({error})")
    except KeyboardInterrupt:
        os._exit(130)  # at once: a thread may wait for a silent server


# --- The script -----------------------------------------------------------------------------------
@dataclass
class Settings:
    """Settings of prepare_data.py"""

    out: str | None = None  # the folder to make (data/SOURCE); checkpoint: the file
    tokenizer: str | None = None  # bytes, gpt2, a SentencePiece .model, ... (bytes; text: gpt2)
    val_every: int = 20  # every N-th document goes to validation
    shard_tokens: int = 100_000_000  # tokens per shard
    shards: int = 10  # fineweb-edu: how many of its 1001 training shards, 0.2 GB and 100 M tokens each
    base_url: str = FINEWEB_EDU  # fineweb-edu: where its shards are
    documents: int = 20_000  # recall, copy, needle: how many to make
    pairs: str = "8"  # recall: facts in a document; of a list, such as 4,8, each document draws its number
    packed: float = 0.0  # recall: share of documents with facts side by side, not spread among dots
    needles: str = "single"  # needle: single, multi-key, multi-value, multi-query, or a list to draw from
    digits: int = 7  # needle: digits of a value
    length: int = 256  # recall, needle: tokens of a document
    letters: int | None = None  # copy: letters of a string (12); needle: of a key (4)
    seed: int = 1  # recall, copy, needle: of what is drawn


def main():
    usage = "stdlib (default), text FILES OR FOLDERS ..., fineweb-edu, recall, copy, needle [FOLDER] or "
    usage += "checkpoint FILE"
    shown = ("vocab_size", "n_layer", "d_model")  # by a checkpoint's tensors
    model = {field.name: None for field in fields(Config) if field.name not in shown}
    values, model_values, words = parse_command_line(Settings, model, ("SOURCE", usage))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, which leaves nothing half made
    settings, (source, *names) = Settings(**values), words or ["stdlib"]
    wanted = dict.fromkeys(("stdlib", "fineweb-edu", "recall", "copy"), not names)
    wanted |= {"text": names, "checkpoint": len(names) == 1, "needle": len(names) < 2}
    expect(wanted.get(source), f"{' '.join(words)!r} is not a source: give {usage}")
    if source == "checkpoint":
        return convert_checkpoint(names[0], settings.out, settings.tokenizer, model_values)
    expect(not model_values, f"--{min(model_values, default='')} is for checkpoint: leave it out")
    for name in names:
        expect(os.path.exists(name), f"there is no file or folder {name}")
    folder, skipped = settings.out or f"data/{source}", Counter()
    made, context, name = None, 0, settings.tokenizer
    if source == "fineweb-edu":
        expect(1 <= settings.shards <= 1001, f"shards is {settings.shards}: there are 1 to 1001 of them")
        web = settings.base_url.startswith(("http://", "https://"))
        expect(web, f"base_url is {settings.base_url!r}: it must begin with http:// or https://")
        shards = [f"edu_fineweb_train_{n:06d}.bin" for n in range(1, settings.shards + 1)]
        download(settings.base_url, folder, ["edu_fineweb_val_000000.bin", *shards])
    elif source == "recall":
        context, pairs = settings.length, numbers("pairs", settings.pairs)
        made = recall(settings.documents, pairs, settings.packed, context, settings.seed)
    elif source == "copy":
        letters = 12 if settings.letters is None else settings.letters
        made = copies(settings.documents, letters, settings.seed)
        context = 2 * letters + 3
    elif source == "needle":
        context, kinds, haystack = settings.length, settings.needles.split(","), None
        known = set(kinds) <= set(NEEDLES)
        expect(known, f"needles is {settings.needles!r}: it is a list of {', '.join(NEEDLES)}")
        letters = 4 if settings.letters is None else settings.letters
        for what, count in {"letters": letters, "digits": settings.digits}.items():
            expect(0 < count <= 100, f"{what} is {count}: it must be from 1 to 100")
        if names:
            data = Data(names[0], "train", 1)
            theirs, haystack = data.meta["tokenizer"], data.shards[0]  # one is enough
            fits = name in (None, theirs)
            expect(fits, f"{names[0]} has tokens of {theirs}, not {name}: leave --tokenizer out")
            name, haystack = theirs, haystack[haystack != data.meta["end_of_text"]]
        options = kinds, letters, settings.digits, context, haystack
        made = needles(settings.documents, *options, get_tokenizer(name or "bytes"), settings.seed)
    else:
        made = documents(stdlib_files() if source == "stdlib" else text_files(names, skipped), skipped)
    if context:  # of a test, each window is a document
        fits = settings.documents > settings.val_every + 1
        expect(fits, f"documents is {settings.documents}: of two for validation, that is too few")
        fits = source == "needle" or name in (None, "bytes")
        expect(fits, f"tokenizer is {name!r}: {source} has bytes, leave it out")
    if made:
        name = name or ("gpt2" if source == "text" else "bytes")
        workers, shard = os.cpu_count() or 1, settings.shard_tokens
        shard = max(shard - shard % context, context) if context else shard  # no document is cut
        try:
            prepare(made, folder, source, name, settings.val_every, shard, workers)
        finally:
            for reason, count in skipped.items():
                print(f"skipped {count:,} {reason}")
    sizes = f" --context={context} --batch_tokens={64 * context}" if context else ""
    print(f"next: python train.py --data={folder}{sizes}")


if __name__ == "__main__":
    run(main)
