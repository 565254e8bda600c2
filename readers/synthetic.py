"""Photos drawn here, with the ground truth of what each of them shows."""

import hashlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from readers.camera import render
from readers.dataset import PhotoDataset, Split, Truth
from readers.wardrobe import GARMENTS, STYLE_COLOURS, Product, draw_family, pick


class Synthetic(PhotoDataset):
    """Drawn garments, deterministic in (seed, split, index), with three or four photos and one description each.

    Products come in families (`draw_family`). A style belongs to the split that the hash of its attributes says, so the
    splits share none, in no colour.
    """

    def __init__(self, split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True):
        self.split, self.seed = split, seed
        self.products = self._draw(products)
        self.rows = [(i, view) for i in range(products) for view in self._views(i)]
        described = [product.caption_and_spans()[0] for product in self.products]
        drawn = [self.products[i] for i, _ in self.rows]
        known = {  # what is true of the product, whatever a photo shows of it
            "category": [GARMENTS[product.garment].category for product in drawn],
            "subcategory": [product.garment.upper() for product in drawn],
            "colour": [product.colour for product in drawn],
            "sleeve": [product.sleeve or "" for product in drawn],
            "neck": [product.neck or "" for product in drawn],
            "pattern": [product.pattern or "" for product in drawn],
        }
        self.photos, self.regions = [], []
        super().__init__(
            captions=[described[i] for i, _ in self.rows],
            products=[i for i, _ in self.rows],
            images=self.photos,
            image_size=image_size,
            known=known,
        )
        rows, quiet = range(len(self.rows)), None if progress else True  # None: quiet unless in a terminal
        bar = tqdm(rows, f"drawing {split} photos", unit=" photos", disable=quiet, leave=False)
        for row in bar:
            photo, regions = self._render(row)
            self.photos.append(photo)
            self.regions.append(_visible(regions, image_size))

    def _rng(self, *where: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, ("train", "val").index(self.split), *where))

    def _draw(self, count: int) -> list[Product]:
        families = range(-(-count // (2 * STYLE_COLOURS)))
        return [product for f in families for product in draw_family(self._rng(0, f), self._owns)][:count]

    def _owns(self, product: Product) -> bool:
        return (hashlib.sha256(product.style.encode()).digest()[0] < 230) == (self.split == "train")

    def _views(self, index: int) -> list[str]:
        rng = self._rng(1, index)
        return ["front", "back", pick(rng, ("close-up", "half")), "close-up"][: 3 + int(rng.integers(2))]

    def _render(self, row: int) -> tuple[Image.Image, dict]:
        index, view = self.rows[row]
        return render(self.products[index], view, self.image_size, self._rng(2, row))

    def truth(self, row: int) -> Truth:
        """What the photo of a row really shows."""
        spans = self.products[self.rows[row][0]].caption_and_spans()[1]
        return Truth(spans, self.regions[row], self.image_size)

    def describes(self, product: int, row: int) -> bool:
        """Would the description of `product` pass for the photo of `row`? It would if nothing of what it says, and
        this camera would show, is untrue of the photo. Of another product it is then a *false* negative."""
        said, shown = self.products[product], self.products[self.rows[row][0]]
        if (said.garment, said.colour) != (shown.garment, shown.colour):
            return False
        claims, facts = said.attributes(), shown.attributes()
        return all(claims[key] == facts.get(key) for key in self.would_show(said, row))

    def would_show(self, product: Product, row: int) -> set[str]:
        """What the camera of a row would show of another product in that place: keys of its attributes."""
        regions = render(product, self.rows[row][1], self.image_size, self._rng(2, row))[1]
        return set(_visible(regions, self.image_size))


def _visible(regions: dict[str, Image.Image], size: int) -> dict[str, np.ndarray]:
    """The regions that count as seen, at least 0.3 % of the photo, as packed bits of (size, size) pixels."""
    shown = {key: np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 127 for key, mask in regions.items()}
    return {key: np.packbits(region) for key, region in shown.items() if region.mean() >= 0.003}
