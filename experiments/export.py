"""Trained weights for others to read: safetensors, no pickle, under Hugging Face's names.

python experiments/export.py --checkpoint runs/…/last.pt --file exported/model.safetensors

config.json and vocab.txt are written beside the file, and `transformers` reads the folder:

    vit.*     our ViT           ViTModel.from_pretrained(folder, add_pooling_layer=False)
    bert.*    text encoder      BertModel.from_pretrained(folder, add_pooling_layer=False): the lower layers of one BERT
              fusion encoder    its upper layers, which have cross-attention ("multimodal_config"); run them not causal
    cls.*     MLM head          BertForMaskedLM's, its decoder tied to the word embeddings; it reads fused tokens

Parts without a counterpart keep our names, and the command prints them. ViTModel alone computes something else if the
model has `vision.registers`, which stand after the patches and are dropped before the last norm, or `patch_layer`.
Token types are written as zeros, since our position embeddings include them. Poolers are not written.

`python train.py --weights exported/model.safetensors --vocab exported/vocab.txt` starts from it, bit for bit.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from safetensors.torch import save_file
from torch import Tensor

from data import IMAGENET_MEAN, IMAGENET_STD
from engine.checkpoints import load_checkpoint, read_tokenizer
from engine.flags import ConfigError
from engine.weights import TOKEN_TYPES, other_names, split_qkv
from model import ModelConfig, VisionLanguageModel


def rename(model: VisionLanguageModel) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a model under Hugging Face's names, and the parts of the model that keep our names."""
    tensors = {TOKEN_TYPES: torch.zeros(2, model.config.width)}  # from_pretrained draws at random what it does not find
    own_parts = {}
    for name, tensor in split_qkv(model.state_dict()).items():
        theirs = other_names(name, model.config)
        tensors[theirs[0] if theirs else name] = tensor.clone()  # since safetensors refuses tensors that share memory
        if not theirs and tensor.numel():  # a model without registers has an empty tensor
            part = name if name == "vision.registers" else name.split(".")[0]
            own_parts[part] = True
    return tensors, list(own_parts)


def their_config(config: ModelConfig, pad: int) -> dict:
    """Sizes for ViTConfig and BertConfig, our whole config, and the normalisation of images; pad: id of [PAD]."""
    width = config.width
    sizes = {"hidden_size": width, "num_attention_heads": config.heads, "intermediate_size": 4 * width}
    vision = sizes | {
        "model_type": "vit",
        "num_hidden_layers": config.vision_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": 1e-6,
    }
    text = sizes | {
        "model_type": "bert",
        "num_hidden_layers": config.text_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "pad_token_id": pad,
        "attention_probs_dropout_prob": config.dropout,
        "hidden_dropout_prob": config.dropout,
    }
    layers = config.text_layers + config.fusion_layers
    fusion = text | {"num_hidden_layers": layers, "is_decoder": True, "add_cross_attention": True}
    return {
        "model_type": "albef",
        "vision_config": vision,
        "multimodal_config": fusion,
        "text_config": text,  # of two BERTs transformers reads the last
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "model": asdict(config),
    }


def export(checkpoint: str, file: Path) -> None:
    """Write model.safetensors, config.json and vocab.txt, and print what was written. Raises ConfigError or OSError."""
    state = load_checkpoint(checkpoint)
    model = VisionLanguageModel(ModelConfig(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    tokenizer = read_tokenizer(state)
    config_file = file.with_name("config.json")
    if config_file.exists():
        raise ConfigError(f"{config_file} is there already; give a --file in another folder")
    tensors, own_parts = rename(model)
    words = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    config = their_config(model.config, tokenizer.token_to_id("[PAD]"))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=1) + "\n")
    file.with_name("vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    print(f"{file}: {len(tensors)} tensors; beside it config.json and vocab.txt")
    print(f"under our names, without a counterpart: {', '.join(own_parts)}")
    if model.config.registers or model.config.patch_layer:
        print("registers or patch_layer: ViTModel alone computes something else (see the head of export.py)")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("export.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="last.pt or best.pt of a run")
    parser.add_argument("--file", type=Path, required=True, help="model.safetensors, in a folder of its own")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.file)
    except (ConfigError, OSError) as error:
        sys.exit(f"export.py: {error}")


if __name__ == "__main__":
    main()
