"""What a data set of photos is: the contract that every source keeps, parts of one, and the decoding of photos."""

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from photos.prompts import Text, prompted, symbol_of

Split = Literal["train", "val"]


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the key or line, and what to do."""


def parse_json(text: str, where: str) -> object:
    """The value that a JSON text holds. Raises DataError, in one line, also for what Python will not read: nested ten
    thousand deep, numbers of thousands of digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


@dataclass
class Unreadable:
    """Stands for a photo that could not be decoded; `Collate` leaves it out and counts it."""

    reason: str


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
    """

    lead, prompts, truths, several = "", False, False, False

    def __init__(
        self, captions: list[str], products: list, categories: list[str], subcategories: list[str], image_size: int
    ):
        self.captions, self.categories, self.subcategories = captions, categories, subcategories
        self.product_ids, self.caption_ids = numbered(products), numbered(captions)
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

    def versions(self) -> list[str]:
        """Something that changes whenever a photo does, without decoding any: files' sizes and times of change."""
        raise TypeError(f"{type(self).__name__} does not say how to tell that a photo has changed")

    def part(self, rows: np.ndarray) -> "PhotoDataset":
        """Some of its rows, numbered anew."""
        return Part(self, rows)

    def report(self) -> str:
        """For the user: how much there is, and what was left out and why; with prompts, a line on these."""
        line = f"{len(self):,} photos of {self.product_ids.max() + 1:,} products{self._left_out()}"
        if not self.prompts:
            return line
        symbols = Counter(map(symbol_of, self.categories, self.subcategories))
        known = Counter(name for row in range(len(self)) for name, value in self.attributes(row).items() if value)
        said = lambda counts: ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "none"
        return f"{line}\n  photos by symbol: {said(symbols)}; by prompt: {said(known)}"

    def _left_out(self) -> str:
        shown = "; ".join(self.problems[:3]) + ("; …" if len(self.problems) > 3 else "")
        named = [f"{len(self.problems):,} left out ({shown})"] if self.problems else []
        return "".join(f", {what}" for what in [*named, *self.dropped])


class Part(PhotoDataset):
    """Some rows of another data set."""

    def __init__(self, whole: PhotoDataset, rows: np.ndarray):
        self.whole, self.source = whole, [int(row) for row in rows]
        chosen = lambda values: [values[row] for row in self.source]
        super().__init__(
            chosen(whole.captions), chosen(whole.product_ids.tolist()), chosen(whole.categories),
            chosen(whole.subcategories), whole.image_size,
        )  # fmt: skip
        self.lead, self.prompts, self.several = whole.lead, whole.prompts, whole.several

    def attributes(self, row: int) -> dict[str, str]:
        """What the whole data set knows of the product of a row."""
        return self.whole.attributes(self.source[row])

    def photo(self, row: int) -> Image.Image:
        """The photo of a row, read as the whole data set reads it."""
        return self.whole.photo(self.source[row])

    def name_of(self, row: int) -> str:
        return self.whole.name_of(self.source[row])


class PhotoFiles(PhotoDataset):
    """Photos by name, without text."""

    def __init__(self, paths: dict[str, Path], image_size: int):
        self.names, self.paths = list(paths), list(paths.values())
        blank = [""] * len(paths)
        super().__init__(blank, self.names, blank, blank, image_size)

    def versions(self) -> list[str]:
        return [version_of(path) for path in self.paths]

    def photo(self, row: int) -> Image.Image:
        """The photo of a name."""
        return open_photo(self.paths[row], self.image_size)

    def name_of(self, row: int) -> str:
        return self.names[row]


def numbered(values: list) -> np.ndarray:
    """Equal values get equal numbers, 0, 1, … in order of appearance. -> int64 (N,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def square(photo: Image.Image, size: int) -> Image.Image:
    """The whole photo, padded to a square with white (choice: nothing is cut off) and scaled to `size` pixels."""
    if photo.size == (size, size):
        return photo
    return ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, color=(255, 255, 255))


FORMATS, MOST_PIXELS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"), 64_000_000


def open_photo(path: Path, size: int) -> Image.Image:
    """The RGB photo of a file, upright, on white where it is transparent; a JPEG is decoded no larger than needed.

    Raises OSError when it cannot be decoded, is none of FORMATS, has more than MOST_PIXELS, or pixels that are neither
    8 nor 16 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.draft("RGB", (size, size))
            if file.width * file.height > MOST_PIXELS:  # a small file can hold so many that decoding takes gigabytes
                raise OSError(f"{file.width} x {file.height} pixels, more than {MOST_PIXELS:,}")
            if file.mode in ("I", "F"):
                raise OSError(f"pixels of kind {file.mode}, neither 8 nor 16 bits")
            photo = ImageOps.exif_transpose(file)
            if photo.mode.startswith("I;16"):  # Pillow would cut off at 255
                photo = Image.fromarray((np.asarray(photo) >> 8).astype(np.uint8))
            if photo.has_transparency_data:
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
            return photo.convert("RGB")
    except UnidentifiedImageError:
        raise OSError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(reason.splitlines()[0]) from None


def version_of(path: Path) -> str:
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}"
