"""A data set of photos: columns, one value a row, and the images."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from readers.prompts import Text, prompted, symbol_of

Split = Literal["train", "val"]
ReportedSplit = Literal["train", "val", "test"]

CONTROLS = dict.fromkeys([*range(32), *range(127, 160)]) | {ord(blank): " " for blank in "\t\n\r"}


def legible(text: str) -> str:
    """A text from outside without control characters, which could change a terminal's colours."""
    return text.translate(CONTROLS)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the key or line, and what to do."""

    def __init__(self, message: str):
        super().__init__(legible(message))


@dataclass
class Unreadable:
    """Stands for a photo that could not be decoded; `Collate` leaves it out and counts it."""

    reason: str


@dataclass
class Truth:
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


class PhotoDataset(Dataset):
    """Photos with their descriptions, as training, sampling and evaluation read them. Each reader returns one.

    captions: description of each row · product_ids, caption_ids: int64 arrays, equal where product or wording is
    images, source: `images[source[row]]` is the image of a row; it is decoded then, if the reader keeps files
    known: a column for each attribute that prompts may tell, "" where unknown; `categories` and `subcategories` are two
    names: how to call each image in messages
    problems: photos left out at opening, as text · dropped: what else was left out, counted, as text
    lead: words set before each description · prompts: put the category symbol and attribute prompts around it
    truths: give with each photo what it really shows, which `Synthetic` alone knows
    several: rows of one product are one photo with several captions, not several photos of one text
    what, group: what a row, and what a product, is called in the report
    """

    lead = ""
    prompts = False
    truths = False
    several = False
    what = "photos"
    group = "products"

    def __init__(
        self,
        captions: list[str],
        products: list,
        images: Sequence[Image.Image],
        image_size: int,
        known: dict[str, list[str]] | None = None,
        names: list[str] | None = None,
        source: list[int] | None = None,
    ):
        self.captions = [legible(caption) for caption in captions]
        self.product_ids = numbered(products)
        self.caption_ids = numbered(self.captions)
        self.images = images
        self.image_size = image_size
        self.known = {"category": [""] * len(captions), "subcategory": [""] * len(captions)} | (known or {})
        self.categories = self.known["category"]
        self.subcategories = self.known["subcategory"]
        self.names = names
        self.source = list(range(len(captions))) if source is None else source
        self.problems: list[str] = []
        self.dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict | Unreadable:
        try:
            photo = self.photo(row)
        except Exception as error:  # decoders raise many kinds for damaged files
            return Unreadable(legible(f"{self.name_of(row)}: {error}"))
        pixels = np.array(square(photo, self.image_size))
        item = {
            "row": row,
            "image": torch.from_numpy(pixels).permute(2, 0, 1),  # (3, S, S) uint8
            "text": self.text(row),
            "product_id": self.product_ids[row],
            "caption_id": self.caption_ids[row],
        }
        if self.truths:
            item["truth"] = self.truth(row)
        return item

    def photo(self, row: int) -> Image.Image:
        """The RGB photo of a row. Raises OSError or ValueError when it cannot be decoded."""
        return self.images[self.source[row]]

    def text(self, row: int) -> Text:
        """What an encoder reads of a row."""
        if not self.prompts:
            return self.lead, self.captions[row]
        symbol = symbol_of(self.categories[row], self.subcategories[row])
        known = {name: values[row] for name, values in self.known.items()}
        return prompted(self.captions[row], symbol, known, np.random.default_rng((7, row)))

    def name_of(self, row: int) -> str:
        """How to call the image of a row in messages."""
        image = self.source[row]
        return self.names[image] if self.names else f"row {image}"

    def fingerprint(self) -> int:
        """A number that changes with the rows: a run must be resumed on the data that it was started on."""
        return zlib.crc32(repr([self.captions, self.known]).encode() + self.product_ids.tobytes())

    def part(self, rows: np.ndarray) -> "PhotoDataset":
        """Some of its rows, numbered anew."""
        part = PhotoDataset(
            [self.captions[row] for row in rows],
            self.product_ids[rows].tolist(),
            self.images,
            self.image_size,
            {name: [values[row] for row in rows] for name, values in self.known.items()},
            self.names,
            [self.source[row] for row in rows],
        )
        for name in ("lead", "prompts", "several", "what", "group"):
            setattr(part, name, getattr(self, name))
        return part

    def report(self) -> str:
        """One line for the user: how much there is, and what was left out and why."""
        return f"{len(self):,} {self.what} of {self.product_ids.max() + 1:,} {self.group}{self.left_out()}"

    def left_out(self) -> str:
        """The end of a report: what was left out and why."""
        reasons = list(self.dropped)
        if self.problems:
            more = "; …" if len(self.problems) > 3 else ""
            reasons.insert(0, f"{len(self.problems):,} left out ({'; '.join(self.problems[:3])}{more})")
        return legible("".join(f", {reason}" for reason in reasons))


def numbered(values: list) -> np.ndarray:
    """Equal values get equal numbers, 0, 1, … in order of appearance. -> int64 (N,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def square(photo: Image.Image, size: int) -> Image.Image:
    """The whole photo, padded to a square with white (choice: nothing is cut off) and scaled to `size` pixels."""
    if photo.size == (size, size):
        return photo
    return ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, color=(255, 255, 255))
