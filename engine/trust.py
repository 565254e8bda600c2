"""Checkpoints are read as data: no pickled code is run, and damage is found by the archive's checksums."""

import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.flags import ConfigError
from readers.dataset import legible

PARTS = (
    "model",
    "momentum",
    "queue",
    "optimizer",
    "sampler",
    "config",
    "data",
    "step",
    "seconds",
    "unreadable",
    "tokenizer",
    "telling",
)


def load_checkpoint(path: str | Path) -> dict:
    """Read the parts of a checkpoint without running pickled code. Raises ConfigError, in one line.

    torch.save writes a zip archive with a checksum for each tensor. torch.load does not check it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except Exception:  # zipfile and torch raise many kinds for a file that is not their own
        raise ConfigError(f"{path}: damaged, or not a checkpoint of train.py") from None
    if damaged:
        raise ConfigError(f"{path}: damaged, its checksum is wrong at {damaged}; take the one before, or copy it again")
    if not isinstance(state, dict) or not state.keys() >= set(PARTS):
        raise ConfigError(f"{path}: not a checkpoint of train.py, or of another version of this code")
    return state


def does_not_fit(path: str | Path, error: Exception) -> ConfigError:
    """Say in one line why the parts of a checkpoint could not be restored."""
    said = legible(" ".join(str(error).split()))[:200] or type(error).__name__
    return ConfigError(f"{path}: does not fit this run ({said})")


def read_tokenizer(state: dict, where: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint. Raises ConfigError for one of another vocabulary size than the model."""
    try:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        fits = tokenizer.get_vocab_size() == state["config"]["model"]["vocab_size"]
    except Exception:  # tokenizers raises Exception itself
        fits = False
    if not fits:
        raise ConfigError(f"{where}: its tokenizer does not go with its model")
    return tokenizer
