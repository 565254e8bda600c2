"""Published weights: ViT, BERT and ALBEF checkpoints, renamed to our names."""

import argparse
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from model import ModelConfig, VisionLanguageModel
from photos.dataset import legible
from photos.prompts import SYMBOLS


class WeightsError(ValueError):
    """A weights file that cannot be read, or of which nothing fits the model."""

    def __init__(self, message: str):
        super().__init__(legible(message))


@dataclass
class LoadReport:
    """What `load_pretrained` did: names of ours that were filled, of theirs that were not used, of ours left."""

    loaded: list[str]
    skipped: dict[str, str]  # name -> reason; theirs, or ours where only the shape differs
    missing: list[str]
    kinds: dict[str, str | Path]  # whole, ViT or BERT -> the file

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.skipped)} skipped, {len(self.missing)} missing"]
        for kind, entries in (
            ("skipped", [f"{name}: {reason}" for name, reason in self.skipped.items()]),
            ("missing", self.missing),
        ):
            lines += [f"  {kind} {entry}" for entry in entries[:8]]
            lines += [f"  … and {len(entries) - 8} more {kind}"] if len(entries) > 8 else []
        return "\n".join(lines)


# Their names, made ours by the first rule that matches; \1 is a layer number. Of several spellings that of Hugging
# Face's files comes first: study/export.py turns the rules round.
LAYER = r"(?:encoder\.layer|blocks|layers)\.(\d+)\."
VISION_RULES = [
    (r"(?:embeddings\.)?cls_token", "cls_token"),
    (r"(?:embeddings\.position_embeddings|pos_embed)", "position_embed"),
    (r"(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.", "patch_embed."),
    (LAYER + r"attn\.qkv\.", r"layers.\1.attention.qkv."),
    (LAYER + r"(?:attention\.attention\.query|attention\.q_proj)\.", r"layers.\1.attention.query."),
    (LAYER + r"(?:attention\.attention\.key|attention\.k_proj)\.", r"layers.\1.attention.key."),
    (LAYER + r"(?:attention\.attention\.value|attention\.v_proj)\.", r"layers.\1.attention.value."),
    (LAYER + r"(?:attention\.output\.dense|attn\.proj|attention\.o_proj)\.", r"layers.\1.attention.output."),
    (LAYER + r"(?:layernorm_before|norm1)\.", r"layers.\1.norm1."),
    (LAYER + r"(?:layernorm_after|norm2)\.", r"layers.\1.norm2."),
    (LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.", r"layers.\1.mlp.0."),
    (LAYER + r"(?:output\.dense|mlp\.fc2)\.", r"layers.\1.mlp.2."),
    (r"(?:layernorm|norm)\.", "norm."),
]
TEXT_RULES = [
    (r"embeddings\.word_embeddings\.", "text.word_embeddings."),
    (r"embeddings\.position_embeddings\.weight", "text.position_embeddings"),
    (r"embeddings\.LayerNorm\.", "text.norm."),
    (LAYER + r"attention\.self\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (LAYER + r"attention\.output\.dense\.", r"layers.\1.attention.output."),
    (LAYER + r"attention\.output\.LayerNorm\.", r"layers.\1.attention_norm."),
    (LAYER + r"crossattention\.self\.(query|key|value)\.", r"layers.\1.cross_attention.\2."),
    (LAYER + r"crossattention\.output\.dense\.", r"layers.\1.cross_attention.output."),
    (LAYER + r"crossattention\.output\.LayerNorm\.", r"layers.\1.cross_attention_norm."),
    (LAYER + r"intermediate\.dense\.", r"layers.\1.mlp.0."),
    (LAYER + r"output\.dense\.", r"layers.\1.mlp.2."),
    (LAYER + r"output\.LayerNorm\.", r"layers.\1.mlp_norm."),
    (r"cls\.predictions\.transform\.dense\.", "mlm_head.0."),
    (r"cls\.predictions\.transform\.LayerNorm\.", "mlm_head.2."),
    (r"cls\.predictions\.bias", "mlm_bias"),
]


# A file is of the first kind that one of its names matches.
KINDS = {
    "whole": r"(visual_encoder|text_encoder|vision_proj|text_proj)\.",
    "BERT": r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+\.attention\.self)\.",
    "ViT": r"((vit|deit|model)\.)?(embeddings\.)?(cls_token|patch_embed|pos_embed)",
}


def kind_of(names: Iterable[str]) -> str | None:
    """Recognise a weights file by its tensor names: "whole", "BERT", "ViT", or None."""
    for kind, pattern in KINDS.items():
        if any(re.match(pattern, name) for name in names):
            return kind
    return None


def load_pretrained(model: VisionLanguageModel, files: list[str | Path]) -> LoadReport:
    """Fill `model` in place from published weights: `.safetensors`, or `.pth`/`.bin` without running pickled code.

    files: one or two, each of a kind of its own, which is recognised by its tensor names
        ViT: in Hugging Face's, timm's, DeiT's or MAE's naming; position embeddings are interpolated
        BERT: in Hugging Face's naming; its first layers fill the text encoder, the next the fusion encoder
        whole: an ALBEF checkpoint (`visual_encoder.*`, `text_encoder.bert.*`, projections and heads), or what
            study/export.py wrote (`vit.*`, `bert.*`, `cls.*`, and our own names)
    Raises WeightsError when a file cannot be read, is of no kind or of the kind of the other file, or when none of its
    tensors fits.
    """
    renames = {"whole": _rename_whole, "BERT": _rename_text, "ViT": _rename_vision}
    kinds: dict[str, str | Path] = {}
    report = LoadReport([], {}, [], kinds)
    ours = dict(model.named_parameters())
    states = {}
    for path in files:
        state = _read_weights(Path(path))
        kind = kind_of(state)
        if kind is None:
            raise WeightsError(f"{path}: none of its tensors has a name of a ViT, a BERT or an ALBEF model")
        if kind in kinds:
            raise WeightsError(f"{path}: a {kind} file as {kinds[kind]} is; give two of different kinds")
        kinds[kind], states[kind] = path, state
    for kind, path in sorted(kinds.items(), reverse=True):  # whole first: a ViT or BERT beside it replaces its part
        renamed = {}
        for name, tensor in states[kind].items():
            if reason := unfit(tensor):
                report.skipped[name] = reason
                continue
            parts = renames[kind](name, tensor, model.config)
            renamed.update(parts)
            if not parts:
                report.skipped[name] = "no counterpart in this model"
        loaded = _copy_fitting(_fold_token_types(renamed), ours, report)
        if not loaded:
            raise WeightsError(f"{path}: none of its tensors fits this model; is it the right preset?")
        report.loaded += [name for name in loaded if name not in report.loaded]
    report.missing = sorted(set(ours) - set(report.loaded))
    return report


def unfit(tensor: Tensor) -> str | None:
    """Why a tensor can be nobody's weights, if so."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
        return "no dense tensor of real numbers"
    return None if tensor.isfinite().all() else "not finite"


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and DeiT store their options
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weights file") from None
    except pickle.UnpicklingError:
        raise WeightsError(f"{path}: not plain tensors, or damaged; pickled code is never run") from None
    except Exception as error:  # forged and damaged files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: cannot be read as .safetensors or plain tensors ({reason})") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not named tensors")
    named = {legible(str(name)): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return {name.removeprefix("module."): tensor for name, tensor in named.items()}


def _apply(rules: list[tuple[str, str]], name: str) -> str | None:
    for pattern, ours in rules:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return None


def _rename_vision(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    ours = _apply(VISION_RULES, re.sub(r"^(vit|deit|model)\.", "", name))
    if ours is None:
        return {}
    if ".qkv." in ours and tensor.ndim:  # timm keeps the three projections in one matrix
        parts = zip(("query", "key", "value"), tensor.chunk(3))
        return {"vision." + ours.replace("qkv", part): t for part, t in parts}
    if ours == "position_embed":
        tensor = _interpolate_positions(tensor, config.grid)
    return {"vision." + ours: tensor}


def _interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + G², D) of another grid -> (1, 1 + grid², D), bicubic as in DeiT."""
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] < 2:
        return table
    side = round((table.shape[1] - 1) ** 0.5)
    if side == grid or 1 + side**2 != table.shape[1]:
        return table
    patches = rearrange(table[:, 1:].float(), "1 (h w) d -> 1 d h w", h=side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), rearrange(patches, "1 d h w -> 1 (h w) d")], dim=1)


def _rename_text(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    name = name.removeprefix("bert.")
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # TensorFlow
    if name == "embeddings.token_type_embeddings.weight":
        return {"token_type": tensor} if tensor.ndim and len(tensor) else {}
    ours = _apply(TEXT_RULES, name)
    if ours is None:
        return {}
    if ours == "text.position_embeddings" and tensor.ndim:
        tensor = tensor[: config.max_length]
    if match := re.match(r"layers\.(\d+)\.", ours):
        number, rest = int(match[1]), ours[match.end() :]
        upper = number >= config.text_layers
        ours = f"fusion.layers.{number - config.text_layers}.{rest}" if upper else f"text.layers.{number}.{rest}"
    return {ours: tensor}


def _rename_whole(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    if name.startswith(("visual_encoder.", "vit.")):
        return _rename_vision(name.removeprefix("visual_encoder."), tensor, config)
    if name.startswith(("text_encoder.", "bert.", "cls.")):
        return _rename_text(name.removeprefix("text_encoder."), tensor, config)
    if re.match(r"(vision_proj|text_proj|itm_head|vision|decoder|class_head|adapter|phrases|detector)\.|temp$", name):
        return {name: tensor}
    return {}  # momentum copies, queues, pointers


def _fold_token_types(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT adds token type 0 at every position: add it to the position embeddings once and for all."""
    token_type, places = renamed.pop("token_type", None), renamed.get("text.position_embeddings")
    if token_type is not None and places is not None and token_type[0].shape == places.shape[1:]:
        renamed["text.position_embeddings"] = places + token_type[0]
    return renamed


def _lacks_symbols(name: str, theirs: Tensor, ours: Tensor) -> bool:
    a_word_a_row = name in ("text.word_embeddings.weight", "mlm_bias")
    return a_word_a_row and theirs.shape == (len(ours) - len(SYMBOLS), *ours.shape[1:])


@torch.no_grad()
def _copy_fitting(theirs: dict[str, Tensor], ours: dict[str, nn.Parameter], report: LoadReport) -> list[str]:
    loaded = []
    for name, tensor in theirs.items():
        if name not in ours:
            report.skipped[name] = "no counterpart in this model"
        elif _lacks_symbols(name, tensor, ours[name]):
            ours[name][: -len(SYMBOLS)].copy_(tensor)
            loaded.append(name)
        elif tensor.shape != ours[name].shape:
            report.skipped[name] = f"shape {tuple(tensor.shape)}, this model has {tuple(ours[name].shape)}"
        else:
            ours[name].copy_(tensor)
            loaded.append(name)
    return loaded
