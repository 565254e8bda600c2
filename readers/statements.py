"""Statements about photos: does the photo show that it is true, that it is false, or neither? (Visual entailment.)"""

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from readers.dataset import DataError, PhotoDataset, Split
from readers.families import clause
from readers.synthetic import Synthetic
from readers.wardrobe import Product, pick

LABELS = ("entailment", "neutral", "contradiction")


class Statements(PhotoDataset):
    """A row is a photo with a statement about it.

    photos: all photos there are · rows (N,): which of them · categories: some of LABELS · subcategories: what kind of
    attribute its block of statements turns on, "" where unknown · product_ids: what photos have in common
    """

    what = "statements"

    def __init__(
        self, photos: PhotoDataset, rows: list[int], statements: list[str], labels: list[str], kinds: list[str],
        groups: list,
    ):  # fmt: skip
        super().__init__(statements, groups, labels, kinds, photos.image_size)
        self.photos, self.rows = photos, rows

    def photo(self, row: int) -> Image.Image:
        """The photo that a statement is about."""
        return self.photos.photo(self.rows[row])

    def name_of(self, row: int) -> str:
        return self.photos.name_of(self.rows[row])

    def report(self) -> str:
        """One line for the user: statements by label, photos, what was left out and why."""
        counts = Counter(self.categories)
        labels = ", ".join(f"{label} {counts[label]:,}" for label in LABELS)
        return f"{len(self):,} statements ({labels}) about {len(set(self.rows)):,} photos{self._left_out()}"


def synthetic_statements(
    split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True
) -> Statements:
    """Six statements about two photos of each product that has two which differ in what they show: see `block`."""
    photos, found, groups = Synthetic(split, products, image_size, seed, progress), [], []
    rows_of = defaultdict(list)
    for row, (product, _) in enumerate(photos.rows):
        rows_of[product].append(row)
    quiet = None if progress else True
    for product, rows in tqdm(rows_of.items(), "making statements", unit=" products", leave=False, disable=quiet):
        six = block(photos, rows, photos._rng(5, product))
        found += six
        groups += [product] * len(six)
    if not found:
        raise DataError(f"--products {products}: no two photos of a product differ in what they show; give more")
    return Statements(photos, *map(list, zip(*found, strict=True)), groups)


def block(photos: Synthetic, rows: list[int], rng: np.random.Generator) -> list[tuple[int, str, str, str]]:
    """Of two photos, each of which shows something that the other does not: one statement each that it shows, one that
    it contradicts, and one that it cannot tell, which is what the other shows or contradicts. -> photo, statement,
    label, kind; nothing where no two photos of `rows` are such.

    So no photo has more statements of one label than of another, and a true claim and its lie are each undecided half
    the time: neither photo nor statement alone tells the label.
    """
    product = photos.products[photos.rows[rows[0]][0]]
    for one, other in rng.permutation([(a, b) for a in rows for b in rows if a < b]).tolist():
        claims = {a: _claim(photos, product, a, b, rng) for a, b in ((one, other), (other, one))}
        if None not in claims.values():
            return _six(product, claims, _extra(photos, product, one, other, rng), rng)
    return []


class Claim(NamedTuple):
    """Something that one photo shows and the other cannot tell."""

    kind: str
    truth: str
    lie: str  # contradicted by the one; the other would show nothing of it either


def _six(
    product: Product, claims: dict[int, Claim], extra: tuple[str, Product] | None, rng: np.random.Generator
) -> list[tuple[int, str, str, str]]:
    """The statements of a block; with something extra half of them turn on that, in that it is wrong."""
    by_extra = extra is not None and rng.random() < 0.5
    say = lambda words, of=product: f"{clause(of, extra[0])} and {words}" if extra else words
    found = []
    for photo, elsewhere in (tuple(claims), tuple(claims)[::-1]):
        mine, others = claims[photo], claims[elsewhere]
        wrong = say(mine.truth, extra[1]) if by_extra else say(mine.lie)
        undecided = say(pick(rng, (others.truth, others.lie)))
        kinds = (extra[0], extra[0]) if by_extra else (mine.kind, others.kind)
        found += [(photo, say(mine.truth), "entailment", kinds[0]), (photo, wrong, "contradiction", kinds[0]),
                  (photo, undecided, "neutral", kinds[1])]  # fmt: skip
    return found


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
            where = next(iter(variant.details.keys() - product.details.keys()), key)  # other than key if it has moved
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
