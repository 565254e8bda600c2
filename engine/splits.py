"""Which photos a fine-tuning reads, and which of them it holds out."""

import numpy as np

from data import build_dataset, build_statements, build_triplets
from engine.finetune_config import FinetuneConfig
from readers.dataset import DataError, PhotoDataset
from readers.prompts import DESCRIPTION, DIFFERENCE
from readers.triplets import Triplets


def open_photos(config: FinetuneConfig, split: str) -> PhotoDataset:
    """A data set of photos; what is in which split follows the pretraining run's seed."""
    photos = open_triplets(config, split).photos if config.data == "fashioniq" else build_dataset(*where(config, split))
    photos.lead = lead_of(config)
    return photos


def open_triplets(config: FinetuneConfig, split: str) -> Triplets:
    """A set of triplets, by the same rule."""
    triplets = build_triplets(*where(config, split))
    triplets.lead = lead_of(config)
    return triplets


def open_statements(config: FinetuneConfig, split: str) -> PhotoDataset:
    """A set of statements, by the same rule."""
    statements = build_statements(*where(config, split))
    statements.lead = lead_of(config)
    return statements


def where(config: FinetuneConfig, split: str) -> tuple:
    """Arguments of `build_dataset`, `build_triplets` and `build_statements`."""
    return config.data, config.root, split, config.model.image_size, config.data_seed, config.products


def lead_of(config: FinetuneConfig) -> str:
    """What stands before each text, where pretraining has framed its texts."""
    return (DIFFERENCE if "tgir" in (config.task, config.start) else DESCRIPTION) if config.prompts else ""


def hold_out(
    groups: np.ndarray, share: float, most: int, seed: int, labels: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, rows to choose the best step by: whole groups (N,), `share` of them but no more than `most`.

    No label (N,) leaves training altogether: its last group is kept. Raises DataError if nothing can be held out.
    """
    names = np.random.default_rng((5, seed)).permutation(np.unique(groups))
    wanted, chosen = min(most, max(2, round(share * len(names))), len(names) - 1), []
    kinds = numbers_of(labels or [""] * len(groups))
    left = np.bincount(kinds)
    for name in names:
        kind = kinds[groups == name] if labels else kinds[:0]
        if len(chosen) < wanted and (left - np.bincount(kind, minlength=len(left)) > 0)[kind].all():
            left -= np.bincount(kind, minlength=len(left))
            chosen.append(name)
        elif len(chosen) == wanted:
            break
    held = np.isin(groups, chosen)
    if held.all() or not held.any():
        raise DataError("too few products to hold any out of training; give more")
    return np.flatnonzero(~held), np.flatnonzero(held)


def numbers_of(labels: list[str]) -> np.ndarray:
    """Labels as numbers in alphabetical order. -> int64 (N,)."""
    return np.unique(labels, return_inverse=True)[1]
