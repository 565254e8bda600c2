"""Photos drawn here, with the ground truth of what each of them shows."""

import hashlib

import numpy as np
from PIL import Image, ImageStat
from tqdm import tqdm

from photos.camera import render
from photos.dataset import PhotoDataset, Split
from photos.wardrobe import DETAILS, GARMENTS, Product


class Synthetic(PhotoDataset):
    """Drawn garments, deterministic in (seed, split, index), with three or four photos and one description each.

    A product belongs to the split that the hash of its attributes says, so the splits share none.
    """

    def __init__(self, split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True):
        self.split, self.seed = split, seed
        self.products = [self._product(i) for i in range(products)]
        self.rows = [(i, view) for i in range(products) for view in self._views(i)]
        described = [product.caption_and_spans()[0] for product in self.products]
        super().__init__(
            captions=[described[i] for i, _ in self.rows],
            products=[i for i, _ in self.rows],
            categories=[GARMENTS[self.products[i].garment].category for i, _ in self.rows],
            subcategories=[self.products[i].garment.upper() for i, _ in self.rows],
            image_size=image_size,
        )
        rows, quiet = range(len(self.rows)), None if progress else True  # None: quiet unless in a terminal
        bar = tqdm(rows, f"drawing {split} photos", unit=" photos", disable=quiet, leave=False)
        self.photos = [self._render(row)[0] for row in bar]

    def _rng(self, *where: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, ("train", "val").index(self.split), *where))

    def _product(self, index: int) -> Product:
        rng = self._rng(0, index)
        while not self._owns(product := Product.draw(rng)):
            pass
        return product

    def _owns(self, product: Product) -> bool:
        attributes = (product.garment, product.colour, product.pattern, product.sleeve, product.neck, product.details)
        return (hashlib.sha256(repr(attributes).encode()).digest()[0] < 230) == (self.split == "train")

    def _views(self, index: int) -> list[str]:
        return ["front", "back", "close-up", "half"][: 3 + int(self._rng(1, index).integers(2))]

    def _render(self, row: int) -> tuple[Image.Image, dict]:
        index, view = self.rows[row]
        return render(self.products[index], view, self.image_size, self._rng(2, row))

    def attributes(self, row: int) -> dict[str, str]:
        """What is true of the product, whatever this photo shows of it."""
        product = self.products[self.rows[row][0]]
        known = {"colour": product.colour, "sleeve": product.sleeve or "", "neck": product.neck or ""}
        return super().attributes(row) | known | {"pattern": " in ".join(product.pattern or ())}

    def photo(self, row: int) -> Image.Image:
        """The photo of a row, drawn when the data set was made."""
        return self.photos[row]

    def versions(self) -> list[str]:
        return [f"{self.split} {self.seed} {self.image_size}"]

    def truth(self, row: int, grid: int) -> tuple[list[tuple[int, int, str]], dict[str, np.ndarray]]:
        """What the photo of `row` really shows: (start, end, key) of each attribute named in its description, and
        for every *visible* key the patches (grid·grid,) bool that it covers, row by row."""
        regions = {}
        for key, mask in _visible(self._render(row)[1]).items():
            cover = np.asarray(mask.resize((grid, grid), Image.Resampling.BOX), np.float32).ravel() / 255
            regions[key] = cover >= min(0.25, cover.max() / 2)  # a quarter of a patch, or half of what the best has
        return self.products[self.rows[row][0]].caption_and_spans()[1], regions

    def describes(self, product: int, row: int) -> bool:
        """Would the description of `product` pass for the photo of `row`? It would if nothing of what it says, and
        this camera would show, is untrue of the photo. Of another product it is then a *false* negative."""
        said, shown = self.products[product], self.products[self.rows[row][0]]
        if (said.garment, said.colour) != (shown.garment, shown.colour):
            return False
        regions = render(said, self.rows[row][1], self.image_size, self._rng(2, row))[1]  # by the same camera
        caption, spans = said.caption_and_spans()
        claims, facts = said.attributes(), shown.attributes()
        for key in _visible(regions):
            if key in DETAILS and key in facts:
                words = " ".join(caption[start:end].lower() for start, end, named in spans if named == key)
                pairs = zip(claims[key], facts[key], strict=True)  # colour, shape; not every wording names the colour
                if any(claim != fact and claim in words for claim, fact in pairs):
                    return False
            elif claims[key] != facts.get(key):
                return False
        return True


def _visible(regions: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """The regions that count as seen: at least 0.3 % of the photo."""
    return {key: mask for key, mask in regions.items() if ImageStat.Stat(mask).mean[0] >= 0.003 * 255}
