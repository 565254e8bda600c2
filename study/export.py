"""Trained weights for others to read: safetensors, no pickle, under Hugging Face's names.

python study/export.py --checkpoint runs/…/last.pt --file exported/model.safetensors     --momentum: the average's

Beside the file stand config.json and vocab.txt. Where the architecture is theirs the names are, too, and `transformers`
reads the folder:

    vit.*     our ViT           ViTModel.from_pretrained(folder, add_pooling_layer=False)
    bert.*    text encoder      BertModel.from_pretrained(folder, add_pooling_layer=False): the lower layers of one BERT
              fusion encoder    its upper layers, which have cross-attention ("multimodal_config"); run them not causal
    cls.*     MLM head          BertForMaskedLM's, its decoder tied to the word embeddings; it reads fused tokens

What has no counterpart there keeps our name, and the command prints it:

    vision.registers            with them ViTModel alone computes something else: they stand after the patches, and are
                                dropped before the last norm. So do patches of an earlier layer (`patch_layer`)
    vision_proj, text_proj, temp, itm_head, decoder, class_head, adapter, phrases, detector
    token types                 ours live in the position embeddings, so BERT's are written as zeros
    pooler                      of BERT and ViT: there is none, and none is written

`python train.py --weights exported/model.safetensors --vocab exported/vocab.txt` starts from it: `load_pretrained`
reads it back bit for bit.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD
from harness.flags import ConfigError
from harness.trust import load_checkpoint, read_tokenizer
from harness.weights import TEXT_RULES, VISION_RULES
from model import ModelConfig, VisionLanguageModel


def turned(rules: list[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """Rules of harness/weights.py the other way: from our names to theirs, in the first of their spellings."""
    back = []
    for theirs, ours in rules:
        groups = re.findall(r"\((?!\?)[^)]*\)", theirs)  # such as (\d+), (query|key|value)
        theirs = re.sub(r"\(\?:([^|)]*)[^)]*\)\??", r"\1", theirs).replace(r"\.", ".")
        ours = ours.replace(".", r"\.")
        for number, group in enumerate(groups, start=1):
            theirs, ours = theirs.replace(group, rf"\{number}"), ours.replace(rf"\{number}", group)
        back.append((re.compile(ours), theirs))
    return back


VISION_NAMES, TEXT_NAMES = turned(VISION_RULES), turned(TEXT_RULES)


def their_name(ours: str, config: ModelConfig) -> str | None:
    """Hugging Face's name of one of our parameters, None where there is no counterpart."""
    name, rules, prefix = ours, TEXT_NAMES, "bert."
    if ours.startswith("vision."):
        name, rules, prefix = ours.removeprefix("vision."), VISION_NAMES, "vit."
    elif match := re.match(r"(text|fusion)\.layers\.(\d+)\.", ours):
        number = int(match[2]) + (config.text_layers if match[1] == "fusion" else 0)
        name = f"layers.{number}." + ours[match.end() :]
    for pattern, theirs in rules:
        if match := pattern.match(name):
            found = match.expand(theirs) + name[match.end() :]
            return found if found.startswith("cls.predictions") else prefix + found
    return None


def renamed(state: dict[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """A model's weights under their names, and the names that had to stay ours; of no registers nothing is said."""
    names = {ours: their_name(ours, config) for ours in state}
    tensors = {names[ours] or ours: tensor.detach().cpu().contiguous() for ours, tensor in state.items()}
    # not only for completeness: from_pretrained draws what it does not find at random
    tensors["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.width)
    return tensors, [ours for ours, theirs in names.items() if not theirs and state[ours].numel()]


def their_config(config: ModelConfig, pad: int) -> dict:
    """config.json: sizes for ViTConfig and BertConfig, ours whole, and how photos are normalised."""
    sizes = dict(hidden_size=config.width, num_attention_heads=config.heads, intermediate_size=4 * config.width,
                 hidden_act="gelu", attention_probs_dropout_prob=config.dropout,
                 hidden_dropout_prob=config.dropout)  # fmt: skip
    vision = sizes | dict(model_type="vit", num_hidden_layers=config.vision_layers, image_size=config.image_size,
                          patch_size=config.patch_size, num_channels=3, qkv_bias=True, layer_norm_eps=1e-6,
                          attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)  # fmt: skip
    text = sizes | dict(model_type="bert", num_hidden_layers=config.text_layers, vocab_size=config.vocab_size,
                        max_position_embeddings=config.max_length, type_vocab_size=2, pad_token_id=pad,
                        layer_norm_eps=1e-12)  # fmt: skip
    fusion = text | dict(num_hidden_layers=config.text_layers + config.fusion_layers, is_decoder=True,
                         add_cross_attention=True)  # fmt: skip
    parts = {"vision_config": vision, "multimodal_config": fusion, "text_config": text}  # of two BERTs the last is read
    photos = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return {"model_type": "albef"} | parts | photos | {"model": asdict(config)}


def open_model(state: dict, where: str, momentum: bool) -> VisionLanguageModel:
    """The model of a checkpoint, or its average. Raises ConfigError where sizes and weights are not of one model."""
    try:
        model = VisionLanguageModel(ModelConfig(**state["config"]["model"]))
        model.load_state_dict(state["momentum" if momentum else "model"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{where}: does not fit its own config; another version of this code saved it") from None
    return model.eval()


def export(checkpoint: str | Path, file: Path, momentum: bool = False) -> list[str]:
    """Write model.safetensors, config.json and vocab.txt. -> lines of a report. Raises ConfigError or OSError."""
    state = load_checkpoint(checkpoint)
    model = open_model(state, str(checkpoint), momentum)
    beside = [file, file.with_name("config.json"), file.with_name("vocab.txt")]
    if there := next((path for path in beside if path.exists()), None):
        raise ConfigError(f"{there} is there already; give a --file in another folder")
    tokenizer = read_tokenizer(state, checkpoint)
    words = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    tensors, own = renamed(model.state_dict(), model.config)
    config = their_config(model.config, tokenizer.token_to_id("[PAD]"))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    beside[1].write_text(json.dumps(config, indent=1) + "\n")
    beside[2].write_text("\n".join(words) + "\n", encoding="utf-8")
    parts = list(dict.fromkeys(name if name == "vision.registers" else name.split(".")[0] for name in own))
    lines = [
        f"{file}: {len(tensors)} tensors, {file.stat().st_size / 2**20:.1f} MiB; beside it config.json and vocab.txt",
        f"under our names, without a counterpart: {', '.join(parts)}",
        "written as zeros: token types (ours live in the position embeddings); not written: poolers (there are none)",
    ]
    if model.config.registers or model.config.patch_layer:
        differs = {"registers": model.config.registers, "patch_layer": model.config.patch_layer}
        said = ", ".join(f"{name} {value}" for name, value in differs.items() if value)
        lines.append(f"{said}: ViTModel alone computes something else (see the head of study/export.py)")
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="last.pt or best.pt of a run")
    parser.add_argument(
        "--file",
        type=Path,
        required=True,
        help="to write, in a folder of its own; transformers wants model.safetensors",
    )
    parser.add_argument("--momentum", action="store_true", help="the momentum model's weights instead of the model's")
    args = parser.parse_args(argv)
    if args.file.suffix != ".safetensors":
        parser.error(f"--file {args.file}: its name has to end with .safetensors")
    try:
        print("\n".join(export(args.checkpoint, args.file, args.momentum)))
    except (ConfigError, OSError, SafetensorError) as error:
        sys.exit(f"export.py: {error}")


if __name__ == "__main__":
    main()
