"""Synthetic triplets: products that come in families whose members differ in one or two attributes."""

from numpy.random import Generator

from readers.dataset import DataError, Split
from readers.synthetic import Synthetic
from readers.triplets import Triplets
from readers.wardrobe import Detail, Product, draw_family, pick, pick_variant

FAMILY = 5  # a product, three that differ from it in one or two attributes, and one that is no kin


class SyntheticFamilies(Synthetic):
    """Fronts alone, of products that come in families of FAMILY; a family belongs to one split."""

    def _family(self, first: int) -> list[Product]:
        rng = self._rng(3, first)
        stranger = draw_family(rng, self._owns)[0]
        family = draw_family(rng, self._owns)[:1]
        while len(family) < FAMILY - 1:
            product = vary(family[0], rng)
            known = [kin.attributes() for kin in family]
            if self._owns(product) and product.attributes() not in known:
                family.append(product)
        return [*family, stranger]

    def _views(self, index: int) -> list[str]:
        return ["front"]


def vary(product: Product, rng: Generator) -> Product:
    """A product that differs in one or two attributes, of those that a photo of the front shows."""
    for _ in range(rng.integers(1, 3)):
        variants = []
        for kind, key, variant in product.variants():
            if kind != "garment" and key != "back":
                variants.append((kind, variant))
        product = pick_variant(rng, variants)
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


def difference(product: Product, other: Product, rng: Generator) -> str:
    """What to say to get from one product of a family to another: "is red instead of grey and has long sleeves"."""
    before = product.attributes()
    after = other.attributes()
    clauses = []
    if other.colour != product.colour:
        new = clause(other, "colour")
        clauses.append(pick(rng, (f"{new} instead of {product.colour}", new)))
    places = sorted(product.details.keys() | other.details.keys())
    for key in ("pattern", "sleeve", "neck", "closure", *places):
        if before.get(key) == after.get(key):
            continue
        if key in after:
            clauses.append(clause(other, key))
        else:  # a detail that has moved
            clauses.append(clause(product, key).replace("has", "has no", 1))
    return " and ".join(rng.permutation(clauses).tolist())


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True) -> Triplets:
    """From the first product of each family to its variants and back."""
    photos = SyntheticFamilies(split, products, image_size, seed, progress)
    references = []
    targets = []
    for first in range(0, products - FAMILY + 1, FAMILY):
        for variant in range(first + 1, first + FAMILY - 1):
            references += [first, variant]
            targets += [variant, first]
    if not references:
        raise DataError(f"--products {products}: no whole family of {FAMILY} products; give more")
    texts = []
    for number, (a, b) in enumerate(zip(references, targets)):
        rng = photos._rng(4, number)
        texts.append(difference(photos.products[a], photos.products[b], rng))
    subsets = ["synthetic"] * len(texts)
    families = [photo // FAMILY for photo in references]
    return Triplets(photos, references, targets, texts, subsets, families, {"synthetic": list(range(products))})
