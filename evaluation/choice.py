"""Does an image tell its own caption from a foil: the same caption with one wrong value that the image shows?"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from engine.batches import image_features, itm_scores, text_features
from engine.run import Run
from readers.synthetic import Synthetic
from readers.wardrobe import COARSE


@torch.no_grad()
def choices(run: Run, dataset: Synthetic, products: int) -> dict[str, float]:
    """Measure how often the own caption scores higher than a foil, by cosine and by the ITM head, for the images of the
    first `products` products. Chance is 0.5, ties are wrong.

    -> choice_coarse and choice_fine, by the kind of the wrong value, choice_coarse_itm and choice_fine_itm
    """
    part = dataset.subset(np.flatnonzero(dataset.product_ids < products))
    kinds, rows, foils = draw_foils(dataset, part.image_index)
    if not kinds:
        return {}
    captions = [part.text(row) for row in range(len(part))]
    captions += [(dataset.caption_prefix, foil) for foil in foils]
    own = torch.tensor(rows)
    foil = torch.arange(len(part), len(captions))

    _, image_feat = image_features(run, part)
    text_feat = text_features(run, captions)
    cosine = (image_feat[own] * text_feat[own]).sum(dim=1)
    cosine_foil = (image_feat[own] * text_feat[foil]).sum(dim=1)

    own_pairs = torch.stack([own, own], dim=1)
    foil_pairs = torch.stack([own, foil], dim=1)
    match, match_foil = itm_scores(run, part, captions, torch.cat([own_pairs, foil_pairs])).chunk(2)

    shares = mean_over_kinds(kinds, cosine > cosine_foil)
    for key, share in mean_over_kinds(kinds, match > match_foil).items():
        shares[f"{key}_itm"] = share
    return shares


def draw_foils(dataset: Synthetic, rows: list[int]) -> tuple[list[str], list[int], list[str]]:
    """Draw a foil for each of some rows and each kind of attribute that the image shows, the same ones every time.

    -> the kind of each foil, the place of its image in `rows`, the foil
    """
    kinds, numbers, foils = [], [], []
    for number, row in enumerate(rows):
        options = defaultdict(list)
        for kind, key, sibling in dataset.product(row).siblings():
            if key in dataset.regions[row]:
                options[kind].append(sibling)
        rng = np.random.default_rng((11, row))
        for kind, siblings in options.items():
            drawn = rng.integers(len(siblings))
            foil, _ = siblings[drawn].caption_and_spans()
            kinds.append(kind)
            numbers.append(number)
            foils.append(foil)
    return kinds, numbers, foils


def mean_over_kinds(kinds: list[str], hits: Tensor) -> dict[str, float]:
    """Average the hits (n,) within each kind, then over the coarse and over the fine kinds that occur."""
    hits_by_kind = defaultdict(list)
    for kind, hit in zip(kinds, hits.tolist(), strict=True):
        hits_by_kind[kind].append(hit)
    shares = defaultdict(list)
    for kind, found in hits_by_kind.items():
        group = "choice_coarse" if kind in COARSE else "choice_fine"
        shares[group].append(np.mean(found))
    return {group: float(np.mean(values)) for group, values in shares.items()}
