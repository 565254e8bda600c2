"""Photos drawn here, with the ground truth of what each of them shows."""

import hashlib

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image
from tqdm import tqdm

from readers.camera import render
from readers.dataset import GroundTruth, PairDataset, Split
from readers.prompts import VISIBLE_ATTRIBUTES
from readers.wardrobe import GARMENTS, STYLE_COLOURS, Product, draw_family, pick


class Synthetic(PairDataset):
    """Drawn garments, deterministic in (seed, split, index), with three or four photos and one description each.

    Products come in families (`draw_family`). The hash of a style says its split, so the splits share no style.
    """

    def __init__(self, split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True):
        self.split = split
        self.seed = seed
        self.products = []
        while len(self.products) < products:
            self.products += self._family(len(self.products))
        del self.products[products:]
        self.rows = []  # of each photo the product, by number, and the view
        captions = []
        for index, product in enumerate(self.products):
            caption, _ = product.caption_and_spans()
            for view in self._views(index):
                self.rows.append((index, view))
                captions.append(caption)
        drawn = [self.products[index] for index, _ in self.rows]
        known = {  # what is true of the product, whatever a photo shows of it
            "category": [GARMENTS[product.garment].category for product in drawn],
            "subcategory": [product.garment.upper() for product in drawn],
        }
        for name in VISIBLE_ATTRIBUTES:
            known[name] = [getattr(product, name) or "" for product in drawn]
        self.photos = []
        self.regions = []
        super().__init__(captions, [index for index, _ in self.rows], self.photos, image_size, known)
        quiet = None if progress else True  # None: quiet unless in a terminal
        bar = tqdm(drawn, f"drawing {split} photos", unit=" photos", disable=quiet, leave=False)
        for row, product in enumerate(bar):
            photo, regions = self._render(product, row)
            self.photos.append(photo)
            self.regions.append(regions)

    def _rng(self, *where: int) -> Generator:
        split = 0 if self.split == "train" else 1
        return default_rng((self.seed, split, *where))

    def _family(self, first: int) -> list[Product]:
        """The products from number `first` on that are drawn together."""
        return draw_family(self._rng(0, first // (2 * STYLE_COLOURS)), self._owns)

    def _owns(self, product: Product) -> bool:
        in_training = hashlib.sha256(product.style.encode()).digest()[0] < 230
        return in_training == (self.split == "train")

    def _views(self, index: int) -> list[str]:
        rng = self._rng(1, index)
        third = pick(rng, ("close-up", "half"))
        count = rng.integers(3, 5)
        return ["front", "back", third, "close-up"][:count]

    def _render(self, product: Product, row: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """What the camera of a row makes of a product: the photo, and the regions of which at least 0.3 % of it can be
        seen, as packed bits of (image_size, image_size) pixels."""
        size = self.image_size
        photo, masks = render(product, self.rows[row][1], size, self._rng(2, row))
        regions = {}
        for key, mask in masks.items():
            region = np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 127
            if region.mean() >= 0.003:
                regions[key] = np.packbits(region)
        return photo, regions

    def product(self, row: int) -> Product:
        """The product on the photo of a row."""
        return self.products[self.rows[row][0]]

    def ground_truth(self, row: int) -> GroundTruth:
        """What the photo of a row really shows."""
        _, spans = self.product(row).caption_and_spans()
        return GroundTruth(spans, self.regions[row], self.image_size)

    def describes(self, product: int, row: int) -> bool:
        """Whether nothing that the description of `product` says, and this camera would show, is untrue of the photo
        of `row`. Of another product it is then a *false* negative."""
        described = self.products[product]
        claims = described.attributes()
        facts = self.product(row).attributes()
        if claims["garment"] != facts["garment"] or claims["colour"] != facts["colour"]:
            return False
        return all(claims[key] == facts.get(key) for key in self.would_show(described, row))

    def would_show(self, product: Product, row: int) -> set[str]:
        """What the camera of a row would show of another product in that place: keys of its attributes."""
        _, regions = self._render(product, row)
        return set(regions)
