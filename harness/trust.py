"""What is believed of a checkpoint: that it is whole, and that everything in it is what its place asks for. Files come
from the internet, and disks flip bits."""

import math
import types
import typing
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import SPECIAL_TOKENS
from harness.flags import ConfigError

PARTS = {
    "model": dict, "momentum": dict, "queue": dict, "optimizer": dict, "sampler": dict, "worth": dict, "rng": dict,
    "config": dict, "data": int, "step": int, "seconds": float, "unreadable": list, "tokenizer": str,
}  # fmt: skip


def load_checkpoint(path: str | Path) -> dict:
    """The parts of a checkpoint, without running pickled code. Raises ConfigError, in one line, for anything else.

    torch.save writes a zip archive with a checksum for each tensor, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = archive.testzip()
        state = None if packed or damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except Exception:  # zipfile and torch raise many kinds for a file that is not their own
        raise ConfigError(f"{path}: damaged, or not a checkpoint of train.py") from None
    if damaged:
        raise ConfigError(f"{path}: damaged, its checksum is wrong at {damaged}; take the one before, or copy it again")
    if not isinstance(state, dict) or not PARTS.keys() <= state.keys():
        raise ConfigError(f"{path}: not a checkpoint of train.py, or of another version of this code")
    for part, kind in PARTS.items():
        if type(state[part]) is not kind:
            raise ConfigError(f"{path}: {part} is a {type(state[part]).__name__}, not a {kind.__name__}")
    if state["step"] < 0 or not 0 <= state["seconds"] < math.inf or not all(map(is_text, state["unreadable"])):
        raise ConfigError(f"{path}: no run leaves such a step, time or list of photos")
    return state


def is_text(value) -> bool:
    """Is it a string?"""
    return isinstance(value, str)


def check_like(found, mine, where: str) -> None:
    """Raise ConfigError where a part of a checkpoint is not built as this run's own: dicts with the same keys, dense
    tensors of the same shape and type, plain things of the same type."""
    if isinstance(mine, dict) and isinstance(found, dict):
        if odd := sorted(map(str, found.keys() ^ mine.keys())):
            raise ConfigError(f"{where} has other parts than this run, such as {odd[0]}")
        for key, value in mine.items():
            check_like(found[key], value, f"{where}.{key}")
    elif isinstance(mine, Tensor) and isinstance(found, Tensor):
        if found.layout != torch.strided or found.is_meta or (found.shape, found.dtype) != (mine.shape, mine.dtype):
            theirs, ours = (f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") for x in (found, mine))
            raise ConfigError(f"{where} is {theirs}, where this run has {ours}")
    elif type(found) is not type(mine):
        raise ConfigError(f"{where} is a {type(found).__name__}, where this run has a {type(mine).__name__}")


def check_finite(weights: dict[str, Tensor], where: str) -> None:
    """Raise ConfigError where weights are NaN or infinite."""
    if wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ConfigError(f"{where}: {wrong[0]} is not finite")


def check_sampler(state: dict, batches: int, items: int, where: str) -> None:
    """Raise ConfigError unless the state of a sampler is of so many batches and items: each item in one batch, and
    collected once at most."""
    try:
        parts, pool = state["order"].split(state["sizes"]), state["pool"]
        once = torch.equal(torch.cat(parts).sort().values, torch.arange(items)) and len(parts) == batches
        collected = torch.cat([torch.arange(0), *state["chains"], *(indices for indices, _, _ in pool)]).unique()
        count = sum(map(len, state["chains"])) + sum(len(indices) for indices, _, _ in pool)
        once &= len(collected) == count and set(collected.tolist()) <= set(range(items))
        once &= all(len(indices) == len(images) == len(texts) for indices, images, texts in pool)
        numbers = all(type(state[name]) is int for name in ("seed", "epoch", "first_batch", "conflicts"))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        once = numbers = False
    if not (once and numbers):
        raise ConfigError(f"{where} does not fit this run")


def check_types(config, where: str) -> None:
    """Raise ConfigError for a field of a config dataclass whose value is not of its type; an int passes as a float."""
    for spec in fields(config):
        value, kind = getattr(config, spec.name), typing.get_type_hints(type(config))[spec.name]
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
        if is_dataclass(value):
            check_types(value, where)
        elif not any(_is_a(value, kind) for kind in kinds):
            raise ConfigError(f"{where}: {spec.name} cannot be {str(value)[:40]!r}")


def _is_a(value, kind) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:  # which JSON makes a list
        return isinstance(value, tuple | list) and all(map(is_text, value))
    return type(value) is kind or (kind is float and type(value) is int)


def read_tokenizer(state: dict, where: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ConfigError for one that does not go with its model."""
    try:
        tokenizer, model = Tokenizer.from_str(state["tokenizer"]), state["config"]["model"]
        fits = tokenizer.get_vocab_size() == model["vocab_size"] == max(tokenizer.get_vocab().values()) + 1
        fits &= tokenizer.truncation["max_length"] <= model["max_length"] and bool(tokenizer.padding)
        fits &= all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS)
    except Exception:  # tokenizers raises Exception itself
        fits = False
    if not fits:
        raise ConfigError(f"{where}: its tokenizer does not go with its model")
    return tokenizer
