"""Do the papers' checkpoints compute the same here? Seconds to convert one, and to let it write.

    python experiments/official.py theirs.pt --layers=rat --out=out/theirs
    python experiments/official.py theirs.pt --layers=rat+:16:256:4 --tokenizer=llama.model --prompt="The"

Checkpoints of huggingface.co/barpitf/RAT and barpitf/ratplus. Sizes are read off the tensors; layers, n_head
and qk_groups are not, and default to the papers': heads of width 128, 2 groups. The vocabulary is LLaMA-2's;
its SentencePiece model (pip install sentencepiece) turns text into tokens. Runs no code from the file.
"""

import argparse
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import run
from rat import RAT, Config

NAMES = {  # theirs: ours
    "_orig_mod.": "", "embedding.wte": "embedding", "backbone.ln": "norm", "backbone.layers": "blocks",
    "seq_layer.input_norm": "mixer_norm", "seq_layer": "mixer", "gate_bias": "forget_bias",
    "hidden_layer.ln": "mlp_norm", "hidden_layer.fc1": "mlp.0", "hidden_layer.fc2": "mlp.2",
}  # fmt: skip


def load_official(source, layers, **settings):
    """The RAT in a checkpoint of the papers' own code, a path or a dict of tensors.

    settings: n_head, qk_groups or context, by default as in the papers. ValueError names a tensor that is
    missing, unexpected or of another shape.
    """
    if not isinstance(source, dict):
        with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):  # of plain values
            source = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    weights = {}
    for name, tensor in source.get("task", source).items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor.float()
    if "embedding.weight" not in weights:
        raise ValueError("not a checkpoint of the papers: it has no embedding.wte.weight")
    embedding = weights["embedding.weight"]
    if not torch.equal(weights.pop("head.lm_head.weight", embedding), embedding):
        raise ValueError("head.lm_head.weight is not embedding.wte.weight: here they are one tensor")
    vocab_size, d = embedding.shape
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = dict(vocab_size=vocab_size, d_model=d, n_layer=n_layer, n_head=max(1, d // 128), context=4096)
    config = Config(layers=layers, **sizes | settings)
    with torch.device("meta"):
        model = RAT(config)
    weights["embedding.weight"] = F.pad(embedding, [0, 0, 0, -vocab_size % 64])
    names = config.layers.split(",")
    for layer, block in enumerate(model.blocks):
        if names[layer % len(names)].strip().startswith(("rat+", "gated")):  # of others the order is ours
            z, v, g, q, k = block.mixer.sizes
            name = f"blocks.{layer}.mixer.in_proj.weight"
            z, q, k, v, g = weights[name].split([z, q, k, v, g])
            weights[name] = torch.cat([z, v, g, q, k])
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is not one of layers {layers}: {error}") from error
    return model


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--layers", required=True, help="rat, rat+, gated, attention, rnn, rat,swa ...")
    parser.add_argument("--n_head", type=int)
    parser.add_argument("--qk_groups", type=int)
    parser.add_argument("--out", help="folder for the model as a checkpoint like train.py's")
    parser.add_argument("--tokenizer", help="LLaMA-2's SentencePiece model")
    parser.add_argument("--prompt", help="text to continue, greedily")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("n_head", "qk_groups") if getattr(args, name)}
    model = load_official(args.checkpoint, args.layers, **sizes)
    print(f"{model.config.n_layer} layers, {model.config.layers}, of width {model.config.d_model}")
    if args.out:
        os.makedirs(args.out, exist_ok=True)
        model.save(os.path.join(args.out, "ckpt.pt"))
    if args.prompt:
        from sentencepiece import SentencePieceProcessor

        tokenizer = SentencePieceProcessor(model_file=args.tokenizer)
        tokens = [tokenizer.bos_id(), *tokenizer.encode(args.prompt)]
        drawn = model.generate(torch.tensor([tokens]), args.max_new_tokens, temperature=0)
        print(tokenizer.decode(tokens + [token.item() for token in drawn]))


if __name__ == "__main__":
    run(main)
