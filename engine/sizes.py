"""Sizes of published models, from their config.json or from the shapes of their tensors."""

import re
from pathlib import Path

from torch import Tensor

from engine.flags import ConfigError, flag_of
from model import ModelConfig
from readers.dataset import DataError
from readers.files import read_json

# kind of a weights file -> the keys of its config.json, and the field of ModelConfig that each of them sets
TRANSFORMER_KEYS = {"hidden_size": "width", "num_attention_heads": "heads"}
CONFIG_KEYS = {
    "BERT": TRANSFORMER_KEYS | {"num_hidden_layers": "bert_layers"},  # divided by `divide_bert`
    "ViT": TRANSFORMER_KEYS
    | {"num_hidden_layers": "vision_layers", "patch_size": "patch_size", "image_size": "image_size"},
}
MODEL_TYPES = {"bert": "BERT", "vit": "ViT", "deit": "ViT", "vit_mae": "ViT"}
# of our own config.json, which experiments/export.py writes
OWN_FIELDS = (
    "image_size",
    "patch_size",
    "width",
    "heads",
    "vision_layers",
    "text_layers",
    "fusion_layers",
    "max_length",
)
MUST_FIT = {"width", "heads", "patch_size"}  # a file with another number of layers still fills those that both have


def read_sizes(file: Path) -> tuple[str, dict[str, int]]:
    """Read the sizes in a config.json of a BERT or ViT, as Hugging Face writes it, or of our own export.

    -> kind of the model, "BERT", "ViT" or "whole" (all encoders)
    -> field of ModelConfig -> size, with `bert_layers` of a BERT
    Raises ConfigError where there is no such file, or its model has another architecture, and DataError as `read_json`.
    """
    try:
        content = read_json(file)
    except OSError as error:
        reason = error.strerror.lower()
        raise ConfigError(f"{file}: {reason}; give a folder with the config.json of a BERT or a ViT") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a config of a model; give the config.json of a BERT or a ViT")
    if isinstance(content.get("model"), dict):
        kind = "whole"
        keys = {name: name for name in OWN_FIELDS}
        content = content["model"]
    else:
        model_type = content.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ConfigError(f"{file}: of a model of type {model_type}; only BERT and ViT fit this model")
        kind = MODEL_TYPES[model_type]
        keys = CONFIG_KEYS[kind]
    sizes = {}
    for key, name in keys.items():
        if not isinstance(content.get(key), int):
            raise ConfigError(f"{file}: key {key} is missing, or is no whole number; give another config.json")
        sizes[name] = content[key]
    if content.get("intermediate_size", 4 * sizes["width"]) != 4 * sizes["width"]:
        raise ConfigError(f"{file}: intermediate_size must be 4 times hidden_size; this model has no other ratio")
    return kind, sizes


def sizes_from_folders(folders: list[str], preset: ModelConfig) -> dict[str, int]:
    """Read the sizes for `--sizes-from`. -> field of ModelConfig -> size

    folders: each with a config.json, of a BERT, of a ViT, or of our own export
    preset: its layers decide how the layers of a BERT are divided
    Raises ConfigError and DataError as `read_sizes`, and where two of the models contradict each other.
    """
    sizes: dict[str, int] = {}
    for folder in folders:
        _, found = read_sizes(Path(folder) / "config.json")
        for name, size in found.items():
            if sizes.setdefault(name, size) != size:
                reason = f"{flag_of(name)} {size} for {folder}, but {sizes[name]} for another"
                raise ConfigError(f"--sizes-from: {reason}; all encoders have one width and heads; drop one folder")
    return divide_bert(sizes, preset)


def divide_bert(sizes: dict[str, int], preset: ModelConfig) -> dict[str, int]:
    """Replace `bert_layers` by text_layers and fusion_layers (our choice).

    A BERT with as many layers as the preset's two encoders together fills both. A BERT no deeper than the preset's text
    encoder fills the text encoder; the fusion encoder then starts at random. Any other BERT is halved, as in ALBEF.
    """
    divided = dict(sizes)
    layers = divided.pop("bert_layers", None)
    if layers is None or layers == preset.text_layers + preset.fusion_layers:
        return divided
    if layers <= preset.text_layers:
        return divided | {"text_layers": layers}
    return divided | {"text_layers": layers // 2, "fusion_layers": layers - layers // 2}


def sizes_of_tensors(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Read sizes from the shapes of tensors. -> field of ModelConfig -> size, with `bert_layers` of a BERT

    tensors: by the names of `engine/weights.py:VIT_NAMES` and `BERT_NAMES`
    """
    sizes = {}
    for name, tensor in tensors.items():
        if name == "bert.embeddings.word_embeddings.weight" and tensor.ndim == 2:
            sizes["width"] = tensor.shape[1]
        if re.fullmatch(r"vit\.(embeddings\.)?patch_embed.*\.weight", name) and tensor.ndim == 4:
            sizes["width"] = tensor.shape[0]
            sizes["patch_size"] = tensor.shape[-1]
        layer = re.match(r"(vit|bert)\.(?:encoder\.layer|layers|blocks)\.(\d+)\.", name)
        if layer:
            field = "vision_layers" if layer[1] == "vit" else "bert_layers"
            sizes[field] = max(sizes.get(field, 0), int(layer[2]) + 1)
    return sizes


def check_sizes(file: Path, kind: str, tensors: dict[str, Tensor], config: ModelConfig) -> list[str]:
    """Check that the weights of a file have the sizes of the model. Only a config.json beside the file gives the heads.

    kind, tensors: as `load_pretrained` recognises and names them
    -> hints: flags with which more of the layers would be loaded
    Raises ConfigError where width, heads or patch size differ. The message names the flags that would fit.
    """
    sizes = sizes_of_tensors(tensors)
    try:
        kind_beside, sizes_beside = read_sizes(file.with_name("config.json"))
    except DataError:  # most files have none
        kind_beside, sizes_beside = "", {}
    if kind_beside == kind and sizes_beside["width"] == sizes.get("width"):
        sizes["heads"] = sizes_beside["heads"]
    differing = {name: size for name, size in divide_bert(sizes, config).items() if size != getattr(config, name)}
    flags = " ".join(f"{flag_of(name)} {size}" for name, size in differing.items())
    if differing.keys() & MUST_FIT:
        if "heads" in sizes:
            advice = f"give {flags}, or --sizes-from {file.parent}"
        else:
            advice = f"give {flags}, and --heads as its config.json says"
        raise ConfigError(f"{file}: does not fit the sizes of this model; {advice}")
    return [f"{file}: {flags} would load all of its layers"] if flags else []
