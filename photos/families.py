"""Synthetic triplets: products that come in families whose members differ in one or two attributes."""

from dataclasses import replace

import numpy as np

from photos.dataset import DataError, Split
from photos.synthetic import Synthetic
from photos.triplets import Triplets
from photos.wardrobe import COLOURS, DETAILS, GARMENTS, GRAPHICS, NECKS, PATTERNS, Product, pick

FAMILY = 5  # a product, three that differ from it in one or two attributes, and one that is no kin


class SyntheticFamilies(Synthetic):
    """Fronts alone, of products that come in families of FAMILY; a family belongs to one split."""

    def _product(self, index: int) -> Product:
        member = index % FAMILY
        if member in (0, FAMILY - 1):
            return super()._product(index)
        family, rng = [super()._product(index - member)], self._rng(3, index - member)
        while len(family) <= member:
            product = vary(family[0], rng)
            if self._owns(product) and product.attributes() not in [kin.attributes() for kin in family]:
                family.append(product)
        return family[member]

    def _views(self, index: int) -> list[str]:
        return ["front"]


def vary(product: Product, rng: np.random.Generator) -> Product:
    """A product that differs in one or two attributes, of those that a photo of the front shows."""
    garment, kinds = GARMENTS[product.garment], ["colour", "pattern", "detail"]
    kinds += ["sleeve"] * (len(garment.sleeves) > 1) + ["neck"] * (len(garment.necks) > 1)
    for kind in rng.permutation(kinds)[: int(rng.integers(1, 3))].tolist():
        product = _changed(product, kind, rng)
    return replace(product, marked_caption=product.describe(rng))


def _changed(product: Product, kind: str, rng: np.random.Generator) -> Product:
    garment, details = GARMENTS[product.garment], product.details
    used = {product.colour, *(product.pattern or ())[1:], *(colour for _, colour, _ in details)}
    free = tuple(colour for colour in COLOURS if colour not in used)
    if kind == "colour":
        colour = pick(rng, free)
        repainted = tuple((key, colour if key == "pocket" else ink, shape) for key, ink, shape in details)
        return replace(product, colour=colour, details=repainted)
    if kind == "pattern":
        others = tuple(name for name in PATTERNS if not product.pattern or name != product.pattern[0])
        plain = product.pattern is not None and rng.random() < 0.5
        return replace(product, pattern=None if plain else (pick(rng, others), pick(rng, free)))
    if kind == "neck":
        return replace(product, neck=pick(rng, tuple(neck for neck in garment.necks if neck != product.neck)))
    if kind == "sleeve":
        sleeve = pick(rng, tuple(sleeve for sleeve in garment.sleeves if sleeve != product.sleeve))
        return replace(product, sleeve=sleeve, details=tuple(d for d in details if d[0] != "cuffs" or sleeve == "long"))
    there = {key for key, _, _ in details}
    barred = there | ({"cuffs"} if product.sleeve != "long" else set())
    barred |= {"buttons", "zip"} if there & {"buttons", "zip"} else set()
    gone = tuple(key for key in sorted(there) if "front" in DETAILS[key][1])
    new = tuple(key for key in garment.details.split() if "front" in DETAILS[key][1] and key not in barred)
    if gone and (not new or rng.random() < 0.5):
        lost = pick(rng, gone)
        return replace(product, details=tuple(detail for detail in details if detail[0] != lost))
    if not new:
        return product
    key = pick(rng, new)
    ink = product.colour if key == "pocket" else pick(rng, free)
    return replace(
        product, details=tuple(sorted((*details, (key, ink, pick(rng, GRAPHICS) if key == "badge" else ""))))
    )


def difference(product: Product, other: Product, rng: np.random.Generator) -> str:
    """What to say to get from one product of a family to another: "is red instead of navy and has long sleeves"."""
    said = []
    if other.colour != product.colour:
        said.append(pick(rng, (f"is {other.colour} instead of {product.colour}", f"is {other.colour}")))
    if other.pattern != product.pattern:
        kind, ink = other.pattern or product.pattern
        said.append(f"has {'' if other.pattern else 'no '}{ink} {PATTERNS[kind][1].lower()}")
    if other.sleeve != product.sleeve:
        said.append("is sleeveless" if other.sleeve == "sleeveless" else f"has {other.sleeve} sleeves")
    if other.neck != product.neck:
        said.append(f"has {NECKS[other.neck][0].lower()}")
    mine, theirs = ({key: (ink, shape) for key, ink, shape in p.details} for p in (product, other))
    for key in sorted(mine.keys() ^ theirs.keys()):
        ink, shape = theirs.get(key) or mine[key]
        words = DETAILS[key][0][1].replace("COLOUR", ink).replace("SHAPE", shape)
        said.append(f"has {'' if key in theirs else 'no '}{words.replace('{', '').replace('}', '').lower()}")
    return " and ".join(rng.permutation(said).tolist())


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True) -> Triplets:
    """From the first product of each family to its variants and back."""
    photos = SyntheticFamilies(split, products, image_size, seed, progress)
    pairs = []
    for first in range(0, products - FAMILY + 1, FAMILY):
        pairs += [pair for v in range(first + 1, first + FAMILY - 1) for pair in ((first, v), (v, first))]
    if not pairs:
        raise DataError(f"--products {products}: no whole family of {FAMILY} products; give more")
    texts = [
        difference(photos.products[a], photos.products[b], photos._rng(4, number))
        for number, (a, b) in enumerate(pairs)
    ]
    references, targets = zip(*pairs, strict=True)
    return Triplets(
        photos, references, targets, texts, ["synthetic"] * len(pairs), [a // FAMILY for a in references],
        {"synthetic": list(range(products))},
    )  # fmt: skip
