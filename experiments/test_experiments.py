"""Tests of the experiments. Those that need lm-eval, sentencepiece or matplotlib skip where it is absent."""

import json
import math
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from experiments import finetune, harness, inspect_model, memory
from experiments.official import load_official
from prepare_data import get_tokenizer, write_shard
from rat import RAT, Config
from test_rat import BYTES, log_of, oracle_logits, randomize, relative_error, script, text
from test_rat import same_inputs_every_time, workplace  # noqa: F401, fixtures


# --- Memory ---
def texts_of(task, context=96, count=300, **options):
    """Documents, and their answers with dots for what is none."""
    args = types.SimpleNamespace(task=task, **options)
    x, y = memory.Documents(args, options.get("folder"), "train", context, 1).batch(3, count)
    assert x.shape == y.shape == (count, context) and (x[:, 0] == 256).all()
    tokens = np.concatenate([x, x[:, :1]], axis=1)[:, 1:]
    tokens[:, -1] = np.where(y[:, -1] >= 0, y[:, -1], 0)
    assert ((y == tokens) | (y == -100)).all()
    return [(bytes(row.clip(0, 255).tolist()).decode("latin-1"), y >= 0) for row, y in zip(tokens, y)]


@pytest.mark.parametrize("packed", [0, 1])
def test_recall_asks_for_facts_that_stand_in_the_first_half_spread_or_packed(packed):
    for words, answer in texts_of("recall", pairs=[4, 8], packed=packed):
        facts = dict(re.findall(r"([a-z])([0-7])", words[:48]))
        assert len(facts) in (4, 8) and words[:48].count(".") == 48 - 2 * len(facts)
        assert (max(map(len, words[:48].strip(".").split("."))) == 2 * len(facts)) or not packed
        for n in range(48, 96, 2):
            assert facts[words[n]] == words[n + 1] and answer[n : n + 2].tolist() == [False, True]
        assert not answer[:48].any()


def test_copies_are_a_string_and_the_same_again():
    documents = texts_of("copy", 25)
    for words, answer in documents:
        assert re.fullmatch(r"[a-z]{12}\|[a-z]{12}", words) and words[:12] == words[13:]
        assert answer.tolist() == [False] * 13 + [True] * 12
    assert len({words for words, _ in documents}) == 300


@pytest.fixture
def haystack(tmp_path):
    """A folder of data."""
    write_shard(tmp_path / "train.bin", np.frombuffer(b"abcdefghi " * 50, np.uint8))
    (tmp_path / "meta.json").write_text(BYTES)
    return tmp_path


@pytest.mark.parametrize("name", memory.NEEDLES)
def test_needles_are_hidden_at_all_depths_and_asked_for_as_in_ruler(name, haystack):
    keys, values, asked = memory.NEEDLES[name]
    depths = []
    for words, answer in texts_of("needle", 128, folder=haystack, needles=[name]):
        hidden = re.findall(r"\n(\w): (\d\d)\.\n", words[: answer.argmax()])
        depths.append(words.index("\n") / 128)
        assert len(hidden) == keys * values
        wanted = "".join(c for c, is_answer in zip(words, answer) if is_answer)
        questions = re.findall(r"\n(\w):( \d\d(?:, \d\d)*\.)", words[answer.argmax() - 3 :])
        assert wanted == "".join(found for _, found in questions) and len(questions) == asked
        for key, found in questions:
            assert found == f" {', '.join(value for k, value in hidden if k == key)}."
    assert min(depths) < 0.1 and max(depths) > (0.6 if len(hidden) == 1 else 0.2)


def test_a_model_is_trained_on_recall_and_its_accuracy_is_reported(workplace):
    words = ["--layers=rat+", "--steps=12", "--eval_every=6", "--eval_tokens=3072", "--out=recall"]
    out = script("experiments/memory.py", "recall", "--pairs", "1", *words)
    assert "  accuracy 0." in out and "  whole " in out
    assert 0 < log_of(workplace / "recall")[-1]["accuracy"] <= 1
    again = ["recall", "--pairs", "1", "--init_from=recall", "--eval_only", "--eval_tokens=3072"]
    found = re.search(r"accuracy ([\d.]+)", script("experiments/memory.py", *again))
    assert float(found[1]) == pytest.approx(log_of(workplace / "recall")[-1]["accuracy"], abs=1e-3)


def test_scores_count_answers_whole_documents_and_depths(haystack):
    args = types.SimpleNamespace(task="needle", needles=["single"])
    data = memory.Documents(args, haystack, "val", 128, 0)
    x, y = data.batch(0, 512)

    class Knows(torch.nn.Module):  # the answer where the needle is in the first half; else its first token
        embedding = torch.nn.Embedding(257, 1)

        head = torch.nn.Identity()

        def features(self, tokens):
            logits = torch.zeros(*tokens.shape, 257)
            for row, known in zip(logits, tokens):
                words = bytes(known[1:].clip(0, 255).tolist()).decode("latin-1")
                place = words.index("\n")
                answer = words[place + 3 : place + 7].encode()
                for n, byte in enumerate(answer if place < 64 else answer[:1]):
                    row[128 - 4 + n, byte] = 1
            return logits

    scores = data.scores(Knows())
    early = np.array([bytes(row[1:].tolist()).index(b"\n") for row in x.clip(0, 255)]) < 64
    assert scores["whole"] == pytest.approx(early.mean())
    assert scores["accuracy"] == pytest.approx((4 * early + (1 - early)).mean() / 4)
    args.needles = ["multi-query"]  # whose answers stand in several places
    assert memory.Documents(args, haystack, "val", 128, 0).scores(Knows()).keys() == {"accuracy", "whole"}
    (haystack / "meta.json").unlink()
    with pytest.raises(ValueError, match="needles are hidden in bytes: .* is in tokens of gpt2"):
        memory.Documents(args, haystack, "val", 128, 0)
    assert scores["first_third"] == 1 and scores["last_third"] == 0 and 0 < scores["middle_third"] < 1


# --- Fine-tuning, inspection, comparison ---
def test_fine_tuning_learns_answers_alone_cut_from_the_left(workplace):
    with open(workplace / "questions.jsonl", "w") as file:
        for n in range(60):
            print(json.dumps({"prompt": f"{n} plus {n} is " * (1 + n % 5), "answer": str(2 * n)}), file=file)
    data = finetune.Answers(workplace / "questions.jsonl", "train", 32, 1, "bytes")
    x, y = data.batch(0, 57)
    assert len(data) == 57
    for inputs, targets in zip(x, y):
        places = np.flatnonzero(targets >= 0)
        answer = bytes(targets[places[:-1]].tolist()).decode()
        assert targets[places[-1]] == 256 and inputs[places[1:]].tolist() == targets[places[:-1]].tolist()
        before = bytes(inputs[: places[0] + 1].clip(0, 255).tolist()).decode("latin-1")
        assert before.endswith(f" plus {int(answer) // 2} is ") and places[-1] < 32
    words = ["--data=questions.jsonl", "--init_from=out", "--out=tuned", "--steps=20", "--lr=1e-3"]
    script("experiments/finetune.py", *words, "--batch_tokens=256", "--eval_every=10")
    log = log_of(workplace / "tuned")
    assert log[-1]["val_loss"] < log[0]["val_loss"] and 0 <= log[-1]["accuracy"] <= 1
    with pytest.raises(ValueError, match="give --data=FILE.jsonl and --init_from"):
        script("experiments/finetune.py", "--data=questions.jsonl")


def test_inspection_shows_the_loss_by_position_and_what_gates_remember(workplace):
    model = randomize(RAT(Config(n_layer=2, n_head=2, d_model=16, layers="rat+,attention")))
    x = torch.randint(257, (3, 20))
    losses = inspect_model.loss_by_position(model, (x.numpy(), x.numpy()))
    picked = -model(x)[0].log_softmax(-1).gather(-1, x[..., None])[..., 0].mean(0)
    assert torch.allclose(losses, picked, atol=1e-4)
    first, second = inspect_model.memories(model, x)
    assert second is None and first.shape == (3, 20, 16) and (first > 1).all()
    block, normed = model.blocks[0], model.blocks[0].mixer_norm(model.embedding(x))
    f = torch.sigmoid(block.mixer.in_proj(normed)[..., 32:48])  # z, v, g
    assert torch.allclose(first, 1 / (1 - f), rtol=1e-3)
    out = script("experiments/inspect_model.py", "out", "--data=data/mine", "--context=64", "--tokens=640")
    shares = [float(share) for share in re.findall(r"([\d.]+)%", out.split("layer 0")[1].split("layer 1")[0])]
    assert out.count("positions") == 16 and out.count("layer ") == 2
    assert sum(shares) == pytest.approx(100, abs=1)


def test_runs_are_compared_in_a_table_with_the_mean_and_deviation_over_seeds(workplace, capsys):
    for name, losses in {"a/1": [3.0, 2.0], "a/2": [4.0, 1.0], "b": [5.0, 4.5]}.items():
        (workplace / "logs" / name).mkdir(parents=True)
        with open(workplace / "logs" / name / "log.jsonl", "w") as file:
            for n, loss in enumerate(losses, 1):
                record = dict(step=10 * n, tokens=100 * n, tokens_per_second=9.0, val_loss=loss)
                print(json.dumps(dict(step=10 * n - 5)), json.dumps(record), sep="\n", file=file)
    out = script("experiments/compare.py", "logs")
    assert re.search(r"logs/a +3\.500 +1\.500 ± 0\.707 +9 +2\n", out)
    assert re.search(r"logs/b +5\.000 +4\.500 ", out)
    assert script("experiments/compare.py", "logs", "logs/a") == out  # each run counts once
    with pytest.raises(ValueError, match="there is no folder none"):
        script("experiments/compare.py", "logs", "none")
    pytest.importorskip("matplotlib")
    script("experiments/compare.py", "logs", "--plot=loss.png")
    assert (workplace / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_show_what_is_visible_and_what_bench_measured(workplace):
    pytest.importorskip("matplotlib")
    script("experiments/pictures.py", "--out=pictures")
    kinds = [Config(layers=name).kind(0) for name in "attention swa:3 rnn rat:4 rat+ rat+:4:2:1".split()]
    cells = sum(bool(kind.visible(i, j)) for kind in kinds for i in range(12) for j in range(12))
    picture = (workplace / "pictures/visibility.svg").read_text()
    assert len(re.findall("<use .*#(1b4f8a|c8551c)", picture)) == cells
    script("bench.py", "--lengths=64,128", "--tokens=128", "--d_model=32", "--repeats=1", "--json=bench.json")
    script("experiments/pictures.py", "bench.json", "--out=pictures")
    drawn = {path.name for path in (workplace / "pictures").iterdir()}
    assert drawn == {"visibility.svg", "output.svg", "speed.svg"}


# --- The papers' checkpoints, made from the oracle's parameters ---
OFFICIAL = {
    "attention": (dict(layers="attention"), "vqk"), "rnn": (dict(layers="rnn"), "zvg"),
    "rat": (dict(layers="rat"), "zvgqk"), "four groups": (dict(layers="rat:4", qk_groups=4), "zvgqk"),
    "rat,swa": (dict(layers="rat,swa:7"), "zvgqk,vqk"), "rat+": (dict(layers="rat+:4:3:2"), "zqkvg"),
    "gated": (dict(layers="gated"), "zqkv"),
}  # fmt: skip


def official(settings, rows, vocab_size=30, d=16, H=4, n_layer=2):
    """Random parameters, as the oracle takes them and as the papers' code names and orders them."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=draw) * (0.3 if len(shape) == 2 else 1)

    embedding, norm = tensor(vocab_size, d), tensor(d)
    ours = {"embedding.weight": embedding, "norm.weight": norm}
    theirs = {"embedding.wte.weight": embedding, "backbone.ln.weight": norm, "head.lm_head.weight": embedding}
    for n in range(n_layer):
        order, name = (text.split(",")[n % len(text.split(","))] for text in (rows, settings["layers"]))
        name = name.split(":")[0]
        heads = settings.get("qk_groups", 2) if name == "rat" else H
        part = {c: tensor(heads * d // H if c in "qk" else d, d) for c in order}
        here, there = f"blocks.{n}.", f"backbone.layers.{n}."
        ours[here + "mixer.in_proj.weight"] = torch.cat([part[c] for c in "zvgqk" if c in order])
        theirs[there + "seq_layer.in_proj.weight"] = torch.cat([part[c] for c in order])
        for mine, other, *shape in [
            ("mixer.out_proj", "seq_layer.out_proj", d, d), ("mixer_norm", "seq_layer.input_norm", d),
            ("mlp.0", "hidden_layer.fc1", 4 * d, d), ("mlp.2", "hidden_layer.fc2", d, 4 * d),
            ("mlp_norm", "hidden_layer.ln", d),
        ]:  # fmt: skip
            ours[f"{here}{mine}.weight"] = theirs[f"{there}{other}.weight"] = tensor(*shape)
        if name in ("rat", "rnn"):
            ours[here + "mixer.forget_bias"] = theirs[there + "seq_layer.gate_bias"] = tensor(d)
    return {name: tensor.double() for name, tensor in ours.items()}, theirs


@pytest.mark.parametrize("settings, rows", OFFICIAL.values(), ids=OFFICIAL)
def test_official_checkpoints_of_every_kind_give_the_oracles_logits(settings, rows, tmp_path):
    ours, theirs = official(settings, rows)
    torch.save({"task": {f"_orig_mod.{n}": x for n, x in theirs.items()}, "step": 7}, tmp_path / "theirs.pt")
    tokens, names = torch.randint(30, (2, 21)), list(theirs)
    for source in (theirs, tmp_path / "theirs.pt"):
        m = load_official(source, n_head=4, **settings)
        assert (m.config.n_layer, m.config.d_model, m.config.context, m.tokenizer) == (2, 16, 4096, "")
        expected = torch.stack([oracle_logits(row, ours, m.config) for row in tokens])
        assert relative_error(m.double()(tokens)[0], expected) < 1e-11
    assert list(theirs) == names  # the dict that was given is as it was


def test_a_mismatched_official_checkpoint_names_the_tensor_and_runs_no_code(tmp_path, monkeypatch):
    theirs, layer = official(*OFFICIAL["rat"])[1], "backbone.layers.0.seq_layer"
    for message, source, settings in [
        ("blocks.0.mixer.in_proj", theirs, dict(qk_groups=4)),
        ("blocks.1.mixer.in_proj.weight", theirs, dict(layers="rat,swa")),
        ("Missing.*blocks.1.mlp.0", {k: v for k, v in theirs.items() if "1.hidden_layer.fc1" not in k}, {}),
        ("Unexpected key.*blocks.0.mixer.extra", theirs | {f"{layer}.extra": torch.ones(1)}, {}),
        ("head.lm_head.weight is not embedding", theirs | {"head.lm_head.weight": torch.zeros(30, 16)}, {}),
        ("has no embedding.wte.weight", {}, {}),
    ]:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_official(source, **dict(n_head=4, layers="rat") | settings)
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module)
        torch.save({"task": theirs, "config": module.EasyDict(depth=2)}, tmp_path / "theirs.pt")
    assert load_official(tmp_path / "theirs.pt", layers="rat", n_head=4).config.d_model == 16
    torch.save({"task": theirs, "config": Path("any class")}, tmp_path / "theirs.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_official(tmp_path / "theirs.pt", layers="rat", n_head=4)
    config = load_official(official(dict(layers="rat,swa"), "zvgqk,vqk", d=512)[1], layers="rat,swa").config
    assert (config.n_head, config.qk_groups) == (4, 2)
    assert (config.kind(0).restart, config.kind(1).window) == (16, 1024)


def test_official_checkpoints_are_converted_trained_on_and_write_with_their_tokenizer(workplace):
    theirs = official(*OFFICIAL["rat+"], vocab_size=320)[1]
    torch.save({"task": theirs}, workplace / "theirs.pt")
    words = ["theirs.pt", "--layers=rat+:4", "--n_head=4"]
    assert "2 layers, rat+:4, of width 16" in script("experiments/official.py", *words, "--out=theirs")
    options = ["--data=data/mine", "--context=32", "--batch_tokens=512", "--steps=5", "--sample_tokens=0"]
    script("train.py", "--init_from=theirs", *options, "--out=from")
    trained = RAT.load(workplace / "from")
    assert trained.tokenizer == "bytes" and trained.config.vocab_size == 320  # the model's: the data uses 257
    sentencepiece = pytest.importorskip("sentencepiece")
    more = dict(vocab_size=290, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    more |= dict(input=str(workplace / "texts" / "1.txt"), model_prefix=str(workplace / "tiny"))
    sentencepiece.SentencePieceTrainer.train(**more)
    size = sentencepiece.SentencePieceProcessor(model_file=str(workplace / "tiny.model")).vocab_size()
    torch.save({"task": official(*OFFICIAL["rat+"], vocab_size=size)[1]}, workplace / "theirs.pt")
    out = script("experiments/official.py", *words, "--tokenizer=tiny.model", "--prompt=The number")
    assert out.splitlines()[1].startswith("The number")


# --- lm-evaluation-harness ---
def requests(*args):
    return [types.SimpleNamespace(args=words) for words in args]


def oracle_loglikelihood(model, tokens, first, max_length):
    """Token by token, each with its own forward pass over as much as fits: log-probabilities, and hits."""
    nats, hits = [], []
    for t in range(first, len(tokens)):
        end = min(len(tokens), first + ((t - first) // max_length + 1) * max_length)  # of t's window
        logits = model(torch.tensor([tokens[max(0, end - 1 - max_length) : t]]))[0][0, -1].double()
        nats.append(logits.log_softmax(-1)[tokens[t]].item())
        hits.append(logits.argmax().item() == tokens[t])
    return sum(nats), all(hits)


@pytest.mark.parametrize("layers", ["attention", "rnn", "rat:4", "rat+:4:8:2"])
def test_loglikelihoods_are_those_of_full_forwards_token_by_token(layers, monkeypatch):
    monkeypatch.setattr(harness, "BATCH", 200)  # several batches
    model = randomize(RAT(Config(n_layer=2, n_head=4, d_model=32, context=64, layers=layers))).eval()
    lm, long = harness.Harness(model, get_tokenizer("bytes"), 70), "It was the best of times. " * 2
    asked = [(long, end) for end in ("a", "b", "\xe9")] + [(long + "It ", "was"), ("", "It was"), ("  ", "b")]
    asked += [(long * 2, "the worst"), ("x", "y" * 90)]
    for (context, end), (nats, right) in zip(asked, lm.loglikelihood(requests(*asked))):
        tokens = [256, *(context + end).encode()]
        expected = oracle_loglikelihood(model, tokens, 1 + len(context.rstrip().encode()), 70)
        assert nats == pytest.approx(expected[0], abs=1e-3 * max(1, len(end))) and right == expected[1]
    texts = ["", "a", long[:45], long * 4]
    for words, nats in zip(texts, lm.loglikelihood_rolling(requests(*((words,) for words in texts)))):
        assert nats == pytest.approx(oracle_loglikelihood(model, [256, *words.encode()], 1, 70)[0], abs=1e-2)


def test_a_continuation_that_merges_with_its_context_is_scored_alone():
    """With tokens of several bytes, context and continuation may become one: it is never certain."""

    class Pairs:
        eot_token = 256

        def encode_ordinary(self, words):
            words = words.encode()
            return [sum(words[n : n + 2]) for n in range(0, len(words), 2)]

    lm = harness.Harness(randomize(RAT(Config(n_layer=1))), Pairs(), 64)
    for context, continuation, count in ("abc", "d", 1), ("abc", "de", 1), ("abc", "", 1), ("", "abc", 2):
        tokens, first = lm.encode_pair(context, continuation)
        assert first == len(lm.encode(context)) and len(tokens) - first == count
    scores = lm.loglikelihood(requests(("abc", "d"), ("abc", "")))
    assert all(nats < 0 for nats, _ in scores)


@pytest.fixture(scope="module")
def tasks(workplace):
    """Tasks of lm-evaluation-harness as its users write them, on this disk."""
    pytest.importorskip("lm_eval")
    draw, folder = random.Random(1), workplace / "tasks"
    folder.mkdir()
    shared = "test_split: test\ndataset_path: json\ndoc_to_text: '{{question}}'\n"
    shared += f"dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\n"
    (folder / "choose.yaml").write_text(
        f"task: choose\n{shared}output_type: multiple_choice\ndoc_to_choice: ['39', '6', '12 follows']\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{shared}output_type: generate_until\ndoc_to_target: ' 7'\n"
        "generation_kwargs: {until: ['.', 'zz'], max_gen_toks: 20, do_sample: false, top_k: 0}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (folder / "follow.yaml").write_text(
        f"task: follow\n{shared.replace('{{question}}', '')}output_type: loglikelihood_rolling\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    with open(folder / "documents.jsonl", "w") as file:
        for n in range(16):
            question = "The number 7 follows the number 6. " * draw.randrange(4)
            question += f"The number {n} follows the"
            print(json.dumps({"question": question, "answer": n % 3}), file=file)
    return ",".join(str(folder / f"{name}.yaml") for name in ("choose", "write", "follow"))


def test_tasks_are_run_and_scored(workplace, tasks):
    words = [f"--tasks={tasks}", "--limit=0.5", "--max_length=64"]
    printed = script("experiments/harness.py", "out", *words, "--json=one.json")
    assert all(f"|{name}" in printed for name in ("choose", "write", "follow", "acc", "bits_per_byte"))
    one = json.loads((workplace / "one.json").read_text())
    questions = [json.loads(line)["question"] for line in open(workplace / "tasks" / "documents.jsonl")][:8]
    model, tokenizer = RAT.load(workplace / "out"), get_tokenizer("bytes")
    nats = sum(oracle_loglikelihood(model, [256, *words.encode()], 1, 64)[0] for words in questions)
    bits = -nats / math.log(2) / sum(map(len, questions))
    assert one["follow"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    lm = harness.Harness(model, tokenizer, 64)
    for words in questions[:3]:
        drawn = text(model, torch.tensor([[256, *words.encode()][-44:]]), 20, temperature=0)
        whole = bytes(drawn.flatten().tolist()).decode()
        for stops in ([], [whole[12:14], whole[5:8]]):
            for top_k in (0, -1, 1):
                options = dict(until=stops, max_gen_toks=20, do_sample=False, temperature=1.0, top_k=top_k)
                (answer,) = lm.generate_until(requests((words, options)))
                assert answer == (whole[: min(map(whole.find, stops))] if stops else whole)
    with pytest.raises(ValueError, match="--max_length=20 leaves no room for a prompt"):
        harness.Harness(model, tokenizer, 20).generate_until(requests(("The", dict(max_gen_toks=20))))
    many = requests(*[(questions[0], dict(max_gen_toks=20, do_sample=True, temperature=1.0, top_k=0))] * 300)
    assert len(set(lm.generate_until(many))) > 250
