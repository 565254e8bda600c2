"""Does a photo tell its own text from one that differs in one thing that the photo shows?"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from engine.batches import match_scores, photo_features, text_features
from engine.run import Run
from readers.synthetic import Synthetic
from readers.wardrobe import WHOLE


@torch.no_grad()
def choices(run: Run, dataset: Synthetic, products: int) -> dict[str, float]:
    """Share of the photos, of the first `products` products, whose own text scores higher than one that differs in a
    single value; by cosine similarity and by the ITM head. Chance is 0.5, ties are wrong.

    choice_coarse and choice_fine (by the kind of the value), choice_coarse_itm and choice_fine_itm: means over kinds.
    """
    part = dataset.part((dataset.product_ids < products).nonzero()[0])
    kinds, rows, others = trials(dataset, part.source)
    if not rows:
        return {}
    texts = [part.text(row) for row in range(len(part))] + [(dataset.lead, other) for other in others]
    own, other = torch.tensor(rows), torch.arange(len(others)) + len(part)
    image_feat, text_feat = photo_features(run, part)[1], text_features(run, texts)
    cosines = [(image_feat[own] * text_feat[text]).sum(dim=1) for text in (own, other)]
    pairs = torch.stack([own.repeat(2), torch.cat([own, other])], dim=1)
    matches = match_scores(run, part, texts, pairs).chunk(2)
    return _shares(kinds, cosines[0] > cosines[1], "") | _shares(kinds, matches[0] > matches[1], "_itm")


def trials(dataset: Synthetic, rows: list[int]) -> tuple[list[str], list[int], list[str]]:
    """For each of some rows and each kind of attribute that its photo shows one wrong text, the same ones every time.
    -> kinds, which of the rows, texts."""
    found = []
    for number, row in enumerate(rows):
        rng, options = np.random.default_rng((11, row)), defaultdict(list)
        for kind, key, variant in dataset.products[dataset.rows[row][0]].variants():
            if key in dataset.regions[row]:
                options[kind].append(variant)
        for kind, variants in options.items():
            found.append((kind, number, variants[int(rng.integers(len(variants)))].caption_and_spans()[0]))
    return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])


def _shares(kinds: list[str], right: Tensor, end: str) -> dict[str, float]:
    by_kind = defaultdict(list)
    for kind, hit in zip(kinds, right.tolist(), strict=True):
        by_kind[kind].append(hit)
    coarse = [np.mean(hits) for kind, hits in by_kind.items() if kind in WHOLE]
    fine = [np.mean(hits) for kind, hits in by_kind.items() if kind not in WHOLE]
    shares = {}
    if coarse:
        shares[f"choice_coarse{end}"] = float(np.mean(coarse))
    if fine:
        shares[f"choice_fine{end}"] = float(np.mean(fine))
    return shares
