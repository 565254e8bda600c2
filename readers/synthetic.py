"""Images of synthetic garments, with the ground truth of each image."""

import hashlib

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image
from tqdm import tqdm

from readers.camera import render
from readers.dataset import GroundTruth, PairDataset, Split
from readers.prompts import VISIBLE_ATTRIBUTES
from readers.wardrobe import GARMENTS, STYLE_COLOURS, Product, draw_family, pick

MIN_REGION = 0.003  # share of the image that a region must have to be visible


class Synthetic(PairDataset):
    """Drawn garments: each product has three or four images and one caption.

    Products, captions and images are deterministic in (seed, split, index). Products come in families
    (`draw_family`). The splits share no style, since the hash of a style determines its split.

    products: the products; `product_ids` of a row is the index of its product in this list
    views: the view of each row, see `camera.render`
    regions: the visible attributes of each row, see `GroundTruth.regions`
    progress: show a progress bar where the output is a terminal
    """

    def __init__(self, split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True):
        self.split = split
        self.seed = seed
        self.products: list[Product] = []
        while len(self.products) < products:
            self.products += self._draw_family(len(self.products))
        del self.products[products:]

        self.views: list[str] = []
        indices = []  # the product of each row
        captions = []
        for index, product in enumerate(self.products):
            caption, _ = product.caption_and_spans()
            for view in self._draw_views(index):
                self.views.append(view)
                indices.append(index)
                captions.append(caption)

        # attributes of the product, whether the image shows them or not
        row_products = [self.products[index] for index in indices]
        attributes = {
            "category": [GARMENTS[product.garment].category for product in row_products],
            "subcategory": [product.garment.upper() for product in row_products],
        }
        for name in VISIBLE_ATTRIBUTES:
            attributes[name] = [getattr(product, name) or "" for product in row_products]
        super().__init__(captions, indices, [], image_size, attributes)

        self.regions: list[dict[str, np.ndarray]] = []
        disable = None if progress else True  # None: tqdm is quiet unless in a terminal
        bar = tqdm(row_products, f"drawing {split} images", unit=" images", disable=disable, leave=False)
        for row, product in enumerate(bar):
            image, regions = self._render(product, row)
            self.images.append(image)
            self.regions.append(regions)

    def rng(self, *key: int) -> Generator:
        """Make a generator from (seed, split, key). key: a number for the purpose, then perhaps an index"""
        split = 0 if self.split == "train" else 1
        return default_rng((self.seed, split, *key))

    def _draw_family(self, first: int) -> list[Product]:
        """Draw a family of products, whose first one gets the index `first`."""
        number = first // (2 * STYLE_COLOURS)
        return draw_family(self.rng(0, number), self._in_split)

    def _in_split(self, product: Product) -> bool:
        """Return whether a product is in this split, by a hash of its style. Nine of ten styles are for training."""
        in_training = hashlib.sha256(product.style.encode()).digest()[0] < 230
        return in_training == (self.split == "train")

    def _draw_views(self, index: int) -> list[str]:
        """Draw the three or four views of a product."""
        rng = self.rng(1, index)
        third = pick(rng, ("close-up", "half"))
        count = rng.integers(3, 5)
        return ["front", "back", third, "close-up"][:count]

    def _render(self, product: Product, row: int) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """Render a product as the camera of a row shows it. -> image, regions of the visible attributes, packed"""
        size = self.image_size
        image, masks = render(product, self.views[row], size, self.rng(2, row))
        regions = {}
        for key, mask in masks.items():
            region = np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 127
            if region.mean() >= MIN_REGION:
                regions[key] = np.packbits(region)
        return image, regions

    def product(self, row: int) -> Product:
        """Return the product of a row."""
        return self.products[self.product_ids[row]]

    def ground_truth(self, row: int) -> GroundTruth:
        """Return the ground truth of a row."""
        _, spans = self.product(row).caption_and_spans()
        return GroundTruth(spans, self.regions[row], self.image_size)

    def caption_matches(self, product: int, row: int) -> bool:
        """Return whether the image of a row contradicts nothing in the caption of a product, given by its index.

        A caption of another product that matches is a false negative of the image.
        """
        captioned = self.products[product]
        caption_attributes = captioned.attributes()
        image_attributes = self.product(row).attributes()
        for key in ("garment", "colour"):
            if caption_attributes[key] != image_attributes[key]:
                return False
        for key in self.visible_attributes(captioned, row):
            if caption_attributes[key] != image_attributes.get(key):
                return False
        return True

    def visible_attributes(self, product: Product, row: int) -> set[str]:
        """Return the keys of the attributes that an image of a product shows, taken by the camera of a row."""
        _, regions = self._render(product, row)
        return set(regions)
