"""Published weights: read ViT, BERT and ALBEF files into our model."""

import argparse
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from engine.sizes import check_sizes
from model import ModelConfig, VisionLanguageModel
from readers.dataset import DataError
from readers.files import explain_failure
from readers.prompts import SYMBOLS

# Each line holds our name of a module or parameter, then the other names; # is the number of a layer.
# ViT: ours after `vision.`; Hugging Face's; transformers 5's if it differs; timm's, which DeiT, MAE and ALBEF share.
# Ours and timm's have one matrix `qkv` for queries, keys and values. The tables name them apart, as `split_qkv` does.
VIT_NAMES = """
cls_token                  embeddings.cls_token                       cls_token
position_embed             embeddings.position_embeddings             pos_embed
patch_embed                embeddings.patch_embeddings.projection     patch_embed.proj
norm                       layernorm                                  norm
layers.#.norm1             encoder.layer.#.layernorm_before           layers.#.layernorm_before  blocks.#.norm1
layers.#.norm2             encoder.layer.#.layernorm_after            layers.#.layernorm_after   blocks.#.norm2
layers.#.attention.query   encoder.layer.#.attention.attention.query  layers.#.attention.q_proj  blocks.#.attn.query
layers.#.attention.key     encoder.layer.#.attention.attention.key    layers.#.attention.k_proj  blocks.#.attn.key
layers.#.attention.value   encoder.layer.#.attention.attention.value  layers.#.attention.v_proj  blocks.#.attn.value
layers.#.attention.output  encoder.layer.#.attention.output.dense     layers.#.attention.o_proj  blocks.#.attn.proj
layers.#.mlp.0             encoder.layer.#.intermediate.dense         layers.#.mlp.fc1           blocks.#.mlp.fc1
layers.#.mlp.2             encoder.layer.#.output.dense               layers.#.mlp.fc2           blocks.#.mlp.fc2
"""
# BERT: ours; Hugging Face's. BERT numbers the layers of our text encoder and then those of our fusion encoder.
BERT_NAMES = """
text.word_embeddings             bert.embeddings.word_embeddings
text.position_embeddings         bert.embeddings.position_embeddings.weight
text.norm                        bert.embeddings.LayerNorm
layers.#.attention.query         bert.encoder.layer.#.attention.self.query
layers.#.attention.key           bert.encoder.layer.#.attention.self.key
layers.#.attention.value         bert.encoder.layer.#.attention.self.value
layers.#.attention.output        bert.encoder.layer.#.attention.output.dense
layers.#.attention_norm          bert.encoder.layer.#.attention.output.LayerNorm
layers.#.cross_attention.query   bert.encoder.layer.#.crossattention.self.query
layers.#.cross_attention.key     bert.encoder.layer.#.crossattention.self.key
layers.#.cross_attention.value   bert.encoder.layer.#.crossattention.self.value
layers.#.cross_attention.output  bert.encoder.layer.#.crossattention.output.dense
layers.#.cross_attention_norm    bert.encoder.layer.#.crossattention.output.LayerNorm
layers.#.mlp.0                   bert.encoder.layer.#.intermediate.dense
layers.#.mlp.2                   bert.encoder.layer.#.output.dense
layers.#.mlp_norm                bert.encoder.layer.#.output.LayerNorm
mlm_head.0                       cls.predictions.transform.dense
mlm_head.2                       cls.predictions.transform.LayerNorm
mlm_bias                         cls.predictions.bias
"""
# BERT adds the embedding of token type 0 at every position. In our model it is part of the position embeddings.
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
# Prefix of a name in a file -> its prefix in the tables above.
PREFIXES = {
    "visual_encoder.": "vit.",
    "deit.": "vit.",
    "model.": "vit.",
    "text_encoder.bert.": "bert.",
    "text_encoder.cls.": "cls.",
    "text_encoder.": "bert.",
}
NO_PREFIX = {"whole": "", "BERT": "bert.", "ViT": "vit."}  # what is put before a name without prefix, by kind of file
# The kind of a file is the first kind whose pattern matches one of its names.
KINDS = {
    "whole": r"(visual_encoder|text_encoder|vision_proj|text_proj)\.",
    "BERT": r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+\.attention\.self)\.",
    "ViT": r"((vit|deit|model)\.)?(embeddings\.)?(cls_token|patch_embed|pos_embed)",
}
# Keys under which training runs (DINO, MoCo v3, …) save weights, and what they put before names. Of teacher and
# student the teacher is read.
WRAPPERS = ("model", "state_dict", "teacher", "student")
WRAPPER_PREFIX = r"((module|_orig_mod|teacher|student|backbone|base_encoder)\.)+"


@dataclass
class LoadReport:
    """The result of `load_pretrained`: names of tensors, ours where they have a counterpart (split by `split_qkv`)."""

    loaded: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason
    missing: list[str] = field(default_factory=list)
    kinds: dict[str, str | Path] = field(default_factory=dict)  # whole, ViT or BERT -> the file
    hints: list[str] = field(default_factory=list)  # flags that would load more

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.skipped)} skipped, {len(self.missing)} missing"]
        lines += [f"  skipped {name}: {reason}" for name, reason in list(self.skipped.items())[:8]]
        lines += [f"  missing {name}" for name in self.missing[:8]]
        lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)


def read_table(lines: str, our_prefix: str = "", other_prefix: str = "") -> dict[str, list[str]]:
    """Read a table of names. -> our name -> the other names"""
    table = {}
    for line in lines.strip().split("\n"):
        ours, *others = line.split()
        table[our_prefix + ours] = [other_prefix + name for name in others]
    return table


TABLE = read_table(VIT_NAMES, "vision.", "vit.") | read_table(BERT_NAMES)


def other_names(ours: str, config: ModelConfig) -> list[str]:
    """Return the other names of one of our parameters (split by `split_qkv`), Hugging Face's first; [] without any."""
    name = ours
    number = 0
    layer = re.match(r"(vision|text|fusion)\.layers\.(\d+)\.(.*)", ours)
    if layer:
        part, number, rest = layer[1], int(layer[2]), layer[3]
        name = f"layers.#.{rest}"
        if part == "vision":
            name = f"vision.{name}"
        if part == "fusion":
            number += config.text_layers
    suffix = ""
    if name not in TABLE:  # a module stands there, without .weight or .bias
        name, dot, last = name.rpartition(".")
        suffix = dot + last
    return [other.replace("#", str(number)) + suffix for other in TABLE.get(name, [])]


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split each tensor `qkv` of a model, or of a file of timm's, into views `query`, `key` and `value`."""
    split = {}
    for name, tensor in state.items():
        if ".qkv." in name and tensor.ndim and len(tensor) % 3 == 0:  # a file in float8 also has scalar scales
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = third
        else:
            split[name] = tensor
    return split


def load_pretrained(model: VisionLanguageModel, files: list[str | Path]) -> LoadReport:
    """Fill `model` in place from published weights: `.safetensors`, or `.pth`/`.bin` without running pickled code.

    files: each of another kind, which is recognised by its tensor names; a later file replaces what an earlier filled
        ViT: in the naming of Hugging Face, timm, DeiT or MAE; position embeddings are interpolated
        BERT: in Hugging Face's naming; its first layers fill the text encoder, the next the fusion encoder
        whole: a checkpoint of ALBEF or of ours, or a file of experiments/export.py
    Raises DataError if a file cannot be read, is of no kind or of another file's kind, or has no tensor that fits.
    Raises ConfigError if its width, heads or patch size are not the model's, with the flags that would fit.
    """
    report = LoadReport()
    for path in files:
        state = _read_weights(Path(path))
        kinds = [kind for kind, pattern in KINDS.items() if any(re.match(pattern, name) for name in state)]
        if not kinds:
            names = ", ".join(list(state)[:3])
            raise DataError(f"{path}: no tensor has a name of a ViT, BERT or ALBEF model; the first are {names}")
        kind = kinds[0]
        if kind in report.kinds:
            raise DataError(f"{path}: a {kind} file like {report.kinds[kind]}; give files of different kinds")
        report.kinds[kind] = path
        # the names of a checkpoint of ours become published ones; other names stay
        state = {(other_names(name, model.config) or [name])[0]: tensor for name, tensor in split_qkv(state).items()}
        tensors = {_as_in_table(name, kind): tensor for name, tensor in state.items()}
        report.hints += check_sizes(Path(path), kind, tensors, model.config)
        renamed = _rename(state, kind, model, report)
        _fit_positions(renamed, model.config)
        loaded = _copy_fitting(renamed, model, report)
        if not loaded:
            raise DataError(f"{path}: no tensor fits this model; choose the preset or the sizes of these weights")
        report.loaded |= loaded
    names = split_qkv(dict(model.named_parameters()))
    report.missing = [name for name in names if name not in report.loaded]
    return report


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, in fp32. Raises DataError where it cannot be read, or where there are none."""
    try:
        open(path, "rb").close()  # safetensors reports a file without read permission as missing
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and DeiT store their options
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such weights file; check the path") from None
    except Exception as error:  # damaged files raise many kinds
        damage = "damaged, or not plain tensors (pickled code is never run); copy it again or convert it"
        raise DataError(f"{path}: {explain_failure(path, error, damage)}") from None
    for wrapper in 2 * WRAPPERS:  # one may be in another
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not named tensors; give a state dict")
    tensors = {}
    for name, tensor in state.items():
        inner = re.sub(f"^{WRAPPER_PREFIX}", "", str(name))
        if isinstance(tensor, Tensor) and (inner not in tensors or "teacher." in name):
            tensors[inner] = tensor.float()  # float8 has no arithmetic
    if not tensors:
        names = ", ".join(map(str, list(state)[:3])) or "none"
        raise DataError(f"{path}: holds no tensors, the first keys are {names}; give a state dict")
    return tensors


def _rename(state: dict[str, Tensor], kind: str, model: VisionLanguageModel, report: LoadReport) -> dict[str, Tensor]:
    """Rename the tensors of a file to our names; note in the report the tensors without a counterpart."""
    ours = {TOKEN_TYPES: TOKEN_TYPES}
    for name in split_qkv(dict(model.named_parameters())):
        for other in other_names(name, model.config) or [name]:
            ours[other] = name
    renamed = {}
    for name, tensor in state.items():
        other = _as_in_table(name, kind)
        if other in ours:
            renamed[ours[other]] = tensor
        else:
            report.skipped[name] = "no counterpart in this model"
    return renamed


def _as_in_table(name: str, kind: str) -> str:
    """Return the name in VIT_NAMES or BERT_NAMES of a tensor in a file of some kind."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # TensorFlow
    for file_prefix, table_prefix in PREFIXES.items():
        if name.startswith(file_prefix):
            return table_prefix + name.removeprefix(file_prefix)
    if name.startswith(("vit.", "bert.", "cls.")):
        return name
    return NO_PREFIX[kind] + name


def _fit_positions(renamed: dict[str, Tensor], config: ModelConfig) -> None:
    """Fit position embeddings in place: interpolate those of patches (bicubic, as DeiT), cut those of words.

    Token type 0 is added to the position embeddings of words.
    """
    if "vision.position_embed" in renamed:
        table = renamed["vision.position_embed"]  # (1, 1 + G², D)
        side = math.isqrt(table.shape[1] - 1)
        if side != config.grid and table.shape[1] == 1 + side**2:
            patches = rearrange(table[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
            patches = F.interpolate(patches, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
            patches = rearrange(patches, "1 d h w -> 1 (h w) d")
            renamed["vision.position_embed"] = torch.cat([table[:, :1].float(), patches], dim=1)
    token_types = renamed.pop(TOKEN_TYPES, None)
    if "text.position_embeddings" in renamed:
        positions = renamed["text.position_embeddings"][: config.max_length]
        if token_types is not None:
            positions = positions + token_types[0]
        renamed["text.position_embeddings"] = positions


@torch.no_grad()
def _copy_fitting(renamed: dict[str, Tensor], model: VisionLanguageModel, report: LoadReport) -> set[str]:
    """Copy the tensors that have the shape of ours. -> their names"""
    parameters = split_qkv(dict(model.named_parameters()))
    loaded = set()
    for name, tensor in renamed.items():
        target = parameters[name]
        if name in ("text.word_embeddings.weight", "mlm_bias") and tensor.ndim:
            words = len(target)
            if len(tensor) < words:
                words -= len(SYMBOLS)  # the last words of our vocabulary
            target = target[:words]
            if len(tensor) > words and len(tensor) % 8 == 0:  # padded; not another vocabulary
                report.hints.append(f"{name}: the first {words} of {len(tensor)} rows, for the words of --vocab")
                tensor = tensor[:words]
        if tensor.shape == target.shape:
            target.copy_(tensor)
            loaded.add(name)
        else:  # before what is skipped for other reasons
            reason = f"shape {tuple(tensor.shape)}, this model has {tuple(parameters[name].shape)}"
            report.skipped = {name: reason} | report.skipped
    return loaded
