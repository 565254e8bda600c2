"""A data set of photos: columns, one value a row, and the images."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from readers.prompts import Text, category_symbol, prompt_text

Split = Literal["train", "val"]
ReportedSplit = Literal["train", "val", "test"]

CONTROLS = dict.fromkeys([*range(32), *range(127, 160)]) | {ord(blank): " " for blank in "\t\n\r"}


def printable(text: str) -> str:
    """A text from outside without control characters, which could change a terminal's colours."""
    return text.translate(CONTROLS)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the key or line, and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass
class Unreadable:
    """Stands for a photo that could not be decoded; `Collate` leaves it out and counts it."""

    reason: str


@dataclass
class GroundTruth:
    """What a photo really shows.

    spans: (start, end, key, kind) of every stretch of the description that names an attribute
    regions: of the attributes that the photo shows, where, as packed bits of (size, size) pixels
    """

    spans: list[tuple[int, int, str, str]]
    regions: dict[str, np.ndarray]
    size: int

    def region(self, key: str) -> np.ndarray:
        """(size, size) bool."""
        return np.unpackbits(self.regions[key]).reshape(self.size, self.size).astype(bool)


class PairDataset(Dataset):
    """Photos with their descriptions, as training, sampling and evaluation read them. Each reader returns one.

    captions: the caption of each row
    product_ids, caption_ids: int64 arrays (N,), equal where the products, or the captions, are equal
    images, source: the image of a row is `images[source[row]]`; readers of files decode it at that moment
    attributes: a column for each attribute of the prompts, "" where it is not known; `categories` and `subcategories`
        are two of these columns
    names: the name of each image in messages
    problems: a message for each image left out at opening · dropped: what else was left out, counted, as text
    caption_prefix: words before each caption · prompts: put the category symbol and the attribute prompts around it
    with_ground_truth: give `ground_truth` with each item; only `Synthetic` knows it
    several_captions: the rows of one product are one image with several captions, not several images with one caption
    row_noun, product_noun: the words for rows and products in the report
    """

    caption_prefix = ""
    prompts = False
    with_ground_truth = False
    several_captions = False
    row_noun = "images"
    product_noun = "products"

    def __init__(
        self,
        captions: list[str],
        products: list,
        images: Sequence[Image.Image],
        image_size: int,
        attributes: dict[str, list[str]] | None = None,
        names: list[str] | None = None,
        source: list[int] | None = None,
    ):
        self.captions = [printable(caption) for caption in captions]
        self.product_ids = factorize(products)
        self.caption_ids = factorize(self.captions)
        self.images = images
        self.image_size = image_size
        self.attributes = {"category": [""] * len(captions), "subcategory": [""] * len(captions)} | (attributes or {})
        self.categories = self.attributes["category"]
        self.subcategories = self.attributes["subcategory"]
        self.names = names
        self.source = list(range(len(captions))) if source is None else source
        self.problems: list[str] = []
        self.dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict | Unreadable:
        try:
            photo = self.image(row)
        except Exception as error:  # decoders raise many kinds for damaged files
            return Unreadable(printable(f"{self.name_of(row)}: {error}"))
        pixels = np.array(pad_to_square(photo, self.image_size))
        item = {
            "row": row,
            "image": torch.from_numpy(pixels).permute(2, 0, 1),  # (3, S, S) uint8
            "text": self.text(row),
            "product_id": self.product_ids[row],
            "caption_id": self.caption_ids[row],
        }
        if self.with_ground_truth:
            item["ground_truth"] = self.ground_truth(row)
        return item

    def image(self, row: int) -> Image.Image:
        """The RGB photo of a row. Raises OSError or ValueError when it cannot be decoded."""
        return self.images[self.source[row]]

    def text(self, row: int) -> Text:
        """What an encoder reads of a row."""
        if not self.prompts:
            return self.caption_prefix, self.captions[row]
        symbol = category_symbol(self.categories[row], self.subcategories[row])
        known = {name: values[row] for name, values in self.attributes.items()}
        return prompt_text(self.captions[row], symbol, known, np.random.default_rng((7, row)))

    def name_of(self, row: int) -> str:
        """How to call the image of a row in messages."""
        image = self.source[row]
        return self.names[image] if self.names else f"row {image}"

    def fingerprint(self) -> int:
        """A number that changes with the rows: a run must be resumed on the data that it was started on."""
        return zlib.crc32(repr([self.captions, self.attributes]).encode() + self.product_ids.tobytes())

    def subset(self, rows: np.ndarray) -> "PairDataset":
        """Some of its rows, numbered anew."""
        part = PairDataset(
            [self.captions[row] for row in rows],
            self.product_ids[rows].tolist(),
            self.images,
            self.image_size,
            {name: [values[row] for row in rows] for name, values in self.attributes.items()},
            self.names,
            [self.source[row] for row in rows],
        )
        for name in ("caption_prefix", "prompts", "several_captions", "row_noun", "product_noun"):
            setattr(part, name, getattr(self, name))
        return part

    def report(self) -> str:
        """One line for the user: how much there is, and what was left out and why."""
        return f"{len(self):,} {self.row_noun} of {self.product_ids.max() + 1:,} {self.product_noun}{self.left_out()}"

    def left_out(self) -> str:
        """The end of a report: what was left out and why."""
        reasons = list(self.dropped)
        if self.problems:
            more = "; …" if len(self.problems) > 3 else ""
            reasons.insert(0, f"{len(self.problems):,} left out ({'; '.join(self.problems[:3])}{more})")
        return printable("".join(f", {reason}" for reason in reasons))


def factorize(values: list) -> np.ndarray:
    """Equal values get equal numbers, 0, 1, … in order of appearance. -> int64 (N,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def pad_to_square(photo: Image.Image, size: int) -> Image.Image:
    """The whole photo, padded to a square with white (choice: nothing is cut off) and scaled to `size` pixels."""
    if photo.size == (size, size):
        return photo
    return ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, color=(255, 255, 255))
