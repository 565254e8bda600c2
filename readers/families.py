"""Synthetic triplets: products that come in families whose members differ in one or two attributes."""

import numpy as np

from readers.dataset import DataError, Split
from readers.synthetic import Synthetic
from readers.triplets import Triplets
from readers.wardrobe import Detail, Product, draw_family, pick

FAMILY = 5  # a product, three that differ from it in one or two attributes, and one that is no kin


class SyntheticFamilies(Synthetic):
    """Fronts alone, of products that come in families of FAMILY; a family belongs to one split."""

    def _draw(self, count: int) -> list[Product]:
        return [product for first in range(0, count, FAMILY) for product in self._family(first)][:count]

    def _family(self, first: int) -> list[Product]:
        rng = self._rng(3, first)
        stranger, family = draw_family(rng, self._owns)[0], draw_family(rng, self._owns)[:1]
        while len(family) < FAMILY - 1:
            product = vary(family[0], rng)
            if self._owns(product) and product.attributes() not in [kin.attributes() for kin in family]:
                family.append(product)
        return [*family, stranger]

    def _views(self, index: int) -> list[str]:
        return ["front"]


def vary(product: Product, rng: np.random.Generator) -> Product:
    """A product that differs in one or two attributes, of those that a photo of the front shows."""
    for _ in range(int(rng.integers(1, 3))):
        kinds: dict[str, list[Product]] = {}
        for kind, key, variant in product.variants():
            if kind != "garment" and key != "back":
                kinds.setdefault(kind, []).append(variant)
        product = pick(rng, tuple(kinds[pick(rng, tuple(kinds))]))
    return product


NOUN_OF = {"pattern": "pattern", "sleeve": "sleeves", "neck": "neckline", "closure": "front"}


def clause(product: Product, key: str) -> str:
    """What one attribute of a product is: "is red", "has long sleeves", "has dark stripes at chest"."""
    value = product.attributes()[key]
    if isinstance(value, Detail):
        return f"has {value.look} {value.noun} at {key}"
    if key == "colour" or value == "sleeveless":
        return f"is {value}"
    return f"has {value} {NOUN_OF[key]}"


def difference(product: Product, other: Product, rng: np.random.Generator) -> str:
    """What to say to get from one product of a family to another: "is red instead of grey and has long sleeves"."""
    said = []
    if other.colour != product.colour:
        said.append(pick(rng, (f"is {other.colour} instead of {product.colour}", f"is {other.colour}")))
    for key in ("pattern", "sleeve", "neck", "closure"):
        if getattr(other, key) != getattr(product, key):
            said.append(clause(other, key))
    for place in sorted(product.details.keys() | other.details.keys()):
        mine, theirs = product.details.get(place), other.details.get(place)
        if mine != theirs:
            said.append(clause(other, place) if theirs else clause(product, place).replace("has", "has no", 1))
    return " and ".join(rng.permutation(said).tolist())


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True) -> Triplets:
    """From the first product of each family to its variants and back."""
    photos = SyntheticFamilies(split, products, image_size, seed, progress)
    references, targets = [], []
    for first in range(0, products - FAMILY + 1, FAMILY):
        for variant in range(first + 1, first + FAMILY - 1):
            references += [first, variant]
            targets += [variant, first]
    if not references:
        raise DataError(f"--products {products}: no whole family of {FAMILY} products; give more")
    texts = []
    for number, (a, b) in enumerate(zip(references, targets, strict=True)):
        texts.append(difference(photos.products[a], photos.products[b], photos._rng(4, number)))
    subsets, families = ["synthetic"] * len(texts), [photo // FAMILY for photo in references]
    return Triplets(photos, references, targets, texts, subsets, families, {"synthetic": list(range(products))})
