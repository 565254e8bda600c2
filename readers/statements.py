"""Statements about photos: does the photo show that it is true, that it is false, or neither? (Visual entailment.)"""

from collections import defaultdict
from itertools import combinations
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from readers.dataset import DataError, PhotoDataset, Split
from readers.families import clause
from readers.synthetic import Synthetic
from readers.wardrobe import Product, pick

LABELS = ("entailment", "neutral", "contradiction")


class Statement(NamedTuple):
    """A statement about a photo."""

    photo: int
    text: str
    label: str  # one of LABELS
    kind: str  # of the attribute that it turns on


class Claim(NamedTuple):
    """Something that one photo shows and the other of a pair cannot tell."""

    kind: str
    truth: str
    lie: str  # contradicted by the one; the other would show nothing of it either


def synthetic_statements(split: Split, products: int, image_size: int, seed: int = 0) -> PhotoDataset:
    """Six statements about two photos of each product that has two which differ in what they show: see `block`.

    A row is a statement; its category is its label, its sub-category the kind of attribute that it turns on."""
    photos = Synthetic(split, products, image_size, seed)
    rows_of = defaultdict(list)
    for row, (product, _) in enumerate(photos.rows):
        rows_of[product].append(row)
    found = []
    for product, rows in tqdm(rows_of.items(), "making statements", unit=" products", leave=False, disable=None):
        found += block(photos, rows, photos._rng(5, product))
    if not found:
        raise DataError(f"--products {products}: no two photos of a product differ in what they show; give more")
    source = [statement.photo for statement in found]
    dataset = PhotoDataset(
        captions=[statement.text for statement in found],
        products=[photos.rows[photo][0] for photo in source],
        images=photos.images,
        image_size=image_size,
        known={
            "category": [statement.label for statement in found],
            "subcategory": [statement.kind for statement in found],
        },
        source=source,
    )
    dataset.what = "statements"
    return dataset


def block(photos: Synthetic, rows: list[int], rng: np.random.Generator) -> list[Statement]:
    """Of two photos, each of which shows something that the other does not: one statement each that it shows, one that
    it contradicts, and one that it cannot tell, which is what the other shows or contradicts. Nothing where no two
    photos of `rows` are such.

    So no photo has more statements of one label than of another, and a true claim and its lie are each undecided half
    the time: neither photo nor statement alone tells the label.
    """
    product = photos.product(rows[0])
    for one, other in rng.permutation(list(combinations(rows, 2))).tolist():
        one_claim = _claim(photos, product, one, other, rng)
        other_claim = _claim(photos, product, other, one, rng)
        if one_claim and other_claim:
            extra = _extra(photos, product, one, other, rng)
            return _six(product, {one: one_claim, other: other_claim}, extra, rng)
    return []


def _six(
    product: Product, claims: dict[int, Claim], extra: tuple[str, Product] | None, rng: np.random.Generator
) -> list[Statement]:
    """The statements of a block; with something extra half of the blocks turn on that, in that it is wrong."""
    start = wrong_start = ""
    by_extra = False
    if extra:
        extra_kind, variant = extra
        start = f"{clause(product, extra_kind)} and "
        wrong_start = f"{clause(variant, extra_kind)} and "
        by_extra = rng.random() < 0.5
    one, other = claims
    statements = []
    for photo, elsewhere in ((one, other), (other, one)):
        mine, others = claims[photo], claims[elsewhere]
        wrong = wrong_start + mine.truth if by_extra else start + mine.lie
        undecided = start + pick(rng, (others.truth, others.lie))
        kind = extra_kind if by_extra else mine.kind
        undecided_kind = extra_kind if by_extra else others.kind
        statements.append(Statement(photo, start + mine.truth, "entailment", kind))
        statements.append(Statement(photo, wrong, "contradiction", kind))
        statements.append(Statement(photo, undecided, "neutral", undecided_kind))
    return statements


def _claim(photos: Synthetic, product: Product, photo: int, elsewhere: int, rng: np.random.Generator) -> Claim | None:
    """Something that a photo shows and the one elsewhere cannot tell, if there is such a thing."""
    shown, hidden = photos.regions[photo], photos.regions[elsewhere]
    kinds = defaultdict(list)
    for kind, key, variant in product.variants():
        if kind not in ("garment", "colour", "pattern") and key in shown and key not in hidden:
            kinds[kind].append((key, variant))
    for kind in rng.permutation(sorted(kinds)).tolist():
        for number in rng.permutation(len(kinds[kind])).tolist():
            key, variant = kinds[kind][number]
            added = variant.details.keys() - product.details.keys()
            where = next(iter(added), key)  # other than key if the detail has moved
            # shown here as the truth is, or truths and lies would be of different kinds
            if where in photos.would_show(variant, photo) and where not in photos.would_show(variant, elsewhere):
                return Claim(kind, clause(product, key), clause(variant, where))
    return None


def _extra(
    photos: Synthetic, product: Product, one: int, other: int, rng: np.random.Generator
) -> tuple[str, Product] | None:
    """For half of the products colour or pattern, which both photos show: the kind, and the product with another."""
    kinds = defaultdict(list)
    for kind, key, variant in product.variants():
        if kind in ("colour", "pattern") and key in photos.regions[one] and key in photos.regions[other]:
            kinds[kind].append(variant)
    if not kinds or rng.random() < 0.5:
        return None
    kind = pick(rng, tuple(kinds))
    return kind, pick(rng, tuple(kinds[kind]))
