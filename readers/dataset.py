"""What a data set of photos is: the contract that every source keeps, and parts of one."""

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from readers.prompts import Text, prompted, symbol_of

Split = Literal["train", "val"]


CONTROLS = dict.fromkeys([*range(32), *range(127, 160)]) | {ord(blank): " " for blank in "\t\n\r"}


def legible(text: str) -> str:
    """A text from outside without control characters, which could move a terminal's cursor or change its colours."""
    return text.translate(CONTROLS)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the key or line, and what to do."""

    def __init__(self, message: str):
        super().__init__(legible(message))


@dataclass
class Unreadable:
    """Stands for a photo that could not be decoded; `Collate` leaves it out and counts it."""

    reason: str

    def __post_init__(self):
        self.reason = legible(self.reason)


@dataclass
class Truth:
    """What a photo really shows, where that is known.

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
    """What training, sampling and evaluation need to know of photos. Subclasses decode one in `photo(row)`.

    captions: description of each row · product_ids, caption_ids: int64 arrays, equal where product or wording is
    categories, subcategories: one string a row, "" where unknown
    problems: photos left out at opening, as text · dropped: what else was left out, counted, as text
    lead: words set before each description · prompts: put the category symbol and attribute prompts around it
    truths: give with each photo what it really shows, where that is known
    several: rows of one product are one photo with several captions, not several photos of one text
    what: a row is
    """

    lead, prompts, truths, several, what = "", False, False, False, "photos"

    def __init__(
        self, captions: list[str], products: list, categories: list[str], subcategories: list[str], image_size: int
    ):
        self.captions, self.categories, self.subcategories = (
            [legible(text) for text in texts] for texts in (captions, categories, subcategories)
        )
        self.product_ids, self.caption_ids = numbered(products), numbered(self.captions)
        self.image_size = image_size
        self.problems: list[str] = []
        self.dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def photo(self, row: int) -> Image.Image:
        """The RGB photo of a row. Raises OSError or ValueError when it cannot be decoded."""
        raise TypeError(f"{type(self).__name__} does not say how to read a photo")

    def __getitem__(self, row: int) -> dict | Unreadable:
        try:
            photo = self.photo(row)
        except Exception as error:  # decoders raise many kinds for damaged files
            return Unreadable(f"{self.name_of(row)}: {error}")
        image = torch.from_numpy(np.array(square(photo, self.image_size))).permute(2, 0, 1)  # (3, S, S) uint8
        return {
            "row": row,
            "image": image,
            "text": self.text(row),
            "product_id": self.product_ids[row],
            "caption_id": self.caption_ids[row],
            **({"truth": self.truth(row)} if self.truths else {}),
        }

    def truth(self, row: int) -> Truth:
        """What the photo of a row really shows."""
        raise TypeError(f"{type(self).__name__} does not know what its photos show")

    def text(self, row: int) -> Text:
        """What an encoder reads of a row."""
        if not self.prompts:
            return self.lead, self.captions[row]
        symbol = symbol_of(self.categories[row], self.subcategories[row])
        return prompted(self.captions[row], symbol, self.attributes(row), np.random.default_rng((7, row)))

    def attributes(self, row: int) -> dict[str, str]:
        """What else is known of the product of a row, for prompts: some of ATTRIBUTES, "" where unknown."""
        return {"category": self.categories[row], "subcategory": self.subcategories[row]}

    def name_of(self, row: int) -> str:
        """How to call a row in messages."""
        return f"row {row}"

    def fingerprint(self) -> int:
        """A number that changes with the rows: a run must be resumed on the data that it was started on."""
        known = [str(self.attributes(row)) for row in range(len(self))] if self.prompts else []
        return zlib.crc32("\n".join([*self.captions, *known]).encode() + self.product_ids.tobytes())

    def part(self, rows: np.ndarray) -> "PhotoDataset":
        """Some of its rows, numbered anew."""
        return Part(self, rows)

    def report(self) -> str:
        """For the user: how much there is, and what was left out and why; with prompts, a line on these."""
        line = f"{len(self):,} {self.what} of {self.product_ids.max() + 1:,} products{self._left_out()}"
        if not self.prompts:
            return line
        symbols = Counter(map(symbol_of, self.categories, self.subcategories))
        known = Counter(name for row in range(len(self)) for name, value in self.attributes(row).items() if value)
        by_symbol, by_prompt = (
            ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"
            for counts in (symbols, known)
        )
        return f"{line}\n  photos by symbol: {by_symbol}; by prompt: {by_prompt}"

    def _left_out(self) -> str:
        shown = "; ".join(self.problems[:3]) + ("; …" if len(self.problems) > 3 else "")
        named = [f"{len(self.problems):,} left out ({shown})"] if self.problems else []
        return legible("".join(f", {what}" for what in [*named, *self.dropped]))


class Part(PhotoDataset):
    """Some rows of another data set."""

    def __init__(self, whole: PhotoDataset, rows: np.ndarray):
        self.whole, self.source = whole, [int(row) for row in rows]
        columns = whole.captions, whole.product_ids.tolist(), whole.categories, whole.subcategories
        captions, products, categories, subcategories = ([column[row] for row in self.source] for column in columns)
        super().__init__(captions, products, categories, subcategories, whole.image_size)
        self.lead, self.prompts, self.several, self.what = whole.lead, whole.prompts, whole.several, whole.what

    def attributes(self, row: int) -> dict[str, str]:
        """What the whole data set knows of the product of a row."""
        return self.whole.attributes(self.source[row])

    def photo(self, row: int) -> Image.Image:
        """The photo of a row, read as the whole data set reads it."""
        return self.whole.photo(self.source[row])

    def name_of(self, row: int) -> str:
        return self.whole.name_of(self.source[row])


def numbered(values: list) -> np.ndarray:
    """Equal values get equal numbers, 0, 1, … in order of appearance. -> int64 (N,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def square(photo: Image.Image, size: int) -> Image.Image:
    """The whole photo, padded to a square with white (choice: nothing is cut off) and scaled to `size` pixels."""
    if photo.size == (size, size):
        return photo
    return ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, color=(255, 255, 255))
