"""The choice between captions: an image's own caption against a foil.

A foil is the same caption with one wrong value of an attribute that the image shows. Letters: E embedding, n foils.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from engine.batches import image_features, score_pairs_with_itm, text_features
from engine.run import Run
from readers.synthetic import Synthetic
from readers.wardrobe import COARSE


@torch.no_grad()
def choice_metrics(run: Run, dataset: Synthetic, products: int) -> dict[str, float]:
    """Measure how often an image's own caption scores higher than a foil, by cosine and by the ITM head.

    Chance is 0.5, and a tie counts as wrong.
    products: number of products, from the first on, whose images are tested
    -> choice_coarse and choice_fine, by the kind of the wrong value; choice_coarse_itm and choice_fine_itm; {} where no
    image shows an attribute
    Raises DataError where an image cannot be read.
    """
    rows = np.flatnonzero(dataset.product_ids < products)
    images = dataset.subset(rows)
    kinds, image_numbers, foils = draw_foils(dataset, rows.tolist())
    if not kinds:
        return {}
    captions = [images.text(row) for row in range(len(images))]
    captions += [(dataset.caption_prefix, foil) for foil in foils]
    image = torch.tensor(image_numbers)  # (n,), numbers of the images and of their own captions
    foil_caption = torch.arange(len(images), len(captions))  # (n,)

    _, image_feat = image_features(run, images)
    text_feat = text_features(run, captions)
    cosine = (image_feat[image] * text_feat[image]).sum(dim=1)
    cosine_foil = (image_feat[image] * text_feat[foil_caption]).sum(dim=1)

    own_pairs = torch.stack([image, image], dim=1)
    foil_pairs = torch.stack([image, foil_caption], dim=1)
    itm, itm_foil = score_pairs_with_itm(run, images, captions, torch.cat([own_pairs, foil_pairs])).chunk(2)

    metrics = mean_over_kinds(kinds, cosine > cosine_foil)
    for key, share in mean_over_kinds(kinds, itm > itm_foil).items():
        metrics[f"{key}_itm"] = share
    return metrics


def draw_foils(dataset: Synthetic, rows: list[int]) -> tuple[list[str], list[int], list[str]]:
    """Draw a foil for each image and each kind of attribute that the image shows, the same ones every time.

    rows: the images
    -> of each foil its kind of attribute, the position of its image in `rows`, and the foil
    """
    kinds, positions, foils = [], [], []
    for position, row in enumerate(rows):
        siblings_by_kind = defaultdict(list)
        for kind, key, sibling in dataset.product(row).siblings():
            if key in dataset.regions[row]:
                siblings_by_kind[kind].append(sibling)
        rng = np.random.default_rng((11, row))
        for kind, siblings in siblings_by_kind.items():
            sibling = siblings[rng.integers(len(siblings))]
            foil, _ = sibling.caption_and_spans()
            kinds.append(kind)
            positions.append(position)
            foils.append(foil)
    return kinds, positions, foils


def mean_over_kinds(kinds: list[str], hits: Tensor) -> dict[str, float]:
    """Average the hits (n,) within each kind of attribute, then over the coarse and over the fine kinds.

    -> choice_coarse, choice_fine; a group without foils has no key
    """
    hits_by_kind = defaultdict(list)
    for kind, hit in zip(kinds, hits.tolist(), strict=True):
        hits_by_kind[kind].append(hit)
    shares_by_group = defaultdict(list)
    for kind, hits_of_kind in hits_by_kind.items():
        group = "choice_coarse" if kind in COARSE else "choice_fine"
        shares_by_group[group].append(np.mean(hits_of_kind))
    return {group: float(np.mean(shares)) for group, shares in shares_by_group.items()}
