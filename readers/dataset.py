"""The base of every data set: image-caption pairs, one in each row.

Letters: N rows, S side of an image in pixels.
"""

import html
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from readers.prompts import Text, category_symbol, prompt_text

Split = Literal["train", "val"]
ReportedSplit = Literal["train", "val", "test"]

# for str.translate: tabs and line ends become blanks, other control characters are deleted
CONTROL_CHARACTERS = {code: " " if chr(code).isspace() else "" for code in [*range(32), *range(127, 160)]}
CONTROL_CHARACTERS |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # surrogates, which UTF-8 cannot encode
# Soft hyphens, byte order marks and marks of direction are deleted. Zero-width joiners stay, as in emoji and Hindi.
CONTROL_CHARACTERS |= dict.fromkeys([0xAD, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF], "")
CONTROL_CHARACTERS[0x200B] = " "  # the zero-width space, which parts words


def printable(text: str) -> str:
    """Remove control characters from a text, since they could change the colours of a terminal."""
    return text.translate(CONTROL_CHARACTERS)


HTML_ENTITY = re.compile(r"&#?\w+;")
HTML_TAG = re.compile(r"<!--.*?-->|<!\[CDATA\[|\]\]>|<[!/?a-z][^<>]*>", re.IGNORECASE | re.DOTALL)
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0\ufffc"  # letters and symbols in Unicode, but drawn as blanks


def clean_text(value: object) -> str | None:
    """Clean a caption, or another value of a file: every reader does it by this function.

    HTML entities become characters; tags, line ends and undecodable bytes become a blank; 17.0 becomes 17.
    -> None for what is neither text nor a whole number; "" where no visible character is left
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value)
    for _ in range(2):  # exports of shops are often escaped twice
        text = HTML_ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = " ".join(printable(HTML_TAG.sub(" ", text)).replace("\ufffd", " ").split())
    has_ink = any(unicodedata.category(letter)[0] in "LNPS" and letter not in BLANK_LETTERS for letter in text)
    return text if has_ink else ""


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the key or line, and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass
class Unreadable:
    """An item whose image could not be decoded. `Collate` leaves it out and counts it."""

    reason: str


class Span(NamedTuple):
    """A stretch of a caption, `caption[start:end]`, that names an attribute."""

    start: int
    end: int
    key: str  # the attribute, a key of `Product.attributes`; "invisible" for fabric, fit, wash, lining and season
    kind: str  # one of `wardrobe.ATTRIBUTE_KINDS`


@dataclass
class GroundTruth:
    """The ground truth of an image: what its caption names, and where the image shows it."""

    spans: list[Span]
    regions: dict[str, np.ndarray]  # visible attributes alone: key -> `region`, packed to bits
    size: int  # side of the image in pixels

    def region(self, key: str) -> np.ndarray:
        """Return where the image shows an attribute: bool (size, size)."""
        return np.unpackbits(self.regions[key]).reshape(self.size, self.size).astype(bool)


class PairDataset(Dataset):
    """A data set of image-caption pairs, one in each row. Every reader returns one.

    Several rows show one product: several images, which usually share a caption, or, with `several_captions`, one image
    that has several captions.

    captions: N texts
    product_ids, caption_ids: int64 (N,), equal where two rows have the same product, or the same caption
    images, image_index: the image of a row is `images[image_index[row]]`; files are decoded when the row is read
    attributes: name -> N values, "" where unknown; `categories` and `subcategories` are two of them
    image_names: the name of each image in messages; without names it is called by its number
    problems: a message for each image or line that was left out at opening
    notes: messages that count what else was left out, or what a user should know
    caption_prefix: words in front of each caption
    prompts: put the category symbol and the attribute prompts around each caption, instead of the prefix
    with_ground_truth: add `ground_truth` to each item, which `Synthetic` alone can
    row_noun, product_noun: what `report` calls rows and products
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
        image_names: list[str] | None = None,
        image_index: list[int] | None = None,
    ):
        self.captions = [printable(caption) for caption in captions]
        self.product_ids = factorize(products)
        self.caption_ids = factorize(self.captions)
        self.images = images
        self.image_size = image_size
        self.attributes = {"category": [""] * len(captions), "subcategory": [""] * len(captions)}
        self.attributes |= attributes or {}
        self.categories = self.attributes["category"]
        self.subcategories = self.attributes["subcategory"]
        self.image_names = image_names
        self.image_index = list(range(len(captions))) if image_index is None else image_index
        self.problems: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict | Unreadable:
        """Return the item of a row: row, image uint8 (3, S, S), text, product_id, caption_id, perhaps ground_truth."""
        try:
            image = self.image(row)
        except Exception as error:  # decoders raise many kinds for damaged files
            return Unreadable(printable(f"{self.name_of(row)}: {error}"))
        pixels = np.array(pad_to_square(image, self.image_size))
        item = {
            "row": row,
            "image": torch.from_numpy(pixels).permute(2, 0, 1),
            "text": self.text(row),
            "product_id": self.product_ids[row],
            "caption_id": self.caption_ids[row],
        }
        if self.with_ground_truth:
            item["ground_truth"] = self.ground_truth(row)
        return item

    def image(self, row: int) -> Image.Image:
        """Return the RGB image of a row, in its own size. Raises OSError or ValueError where it cannot be decoded."""
        return self.images[self.image_index[row]]

    def text(self, row: int) -> Text:
        """Return what the text encoder reads of a row: its caption, with its prefix or its prompts."""
        if not self.prompts:
            return self.caption_prefix, self.captions[row]
        symbol = category_symbol(self.categories[row], self.subcategories[row])
        attributes = {name: values[row] for name, values in self.attributes.items()}
        return prompt_text(self.captions[row], symbol, attributes, np.random.default_rng((7, row)))

    def name_of(self, row: int) -> str:
        """Return the name of the image of a row, for messages."""
        image = self.image_index[row]
        return self.image_names[image] if self.image_names else f"row {image}"

    def fingerprint(self) -> int:
        """Compute a checksum of captions, attributes and products. A run must resume on the data that it began with."""
        return zlib.crc32(repr([self.captions, self.attributes]).encode() + self.product_ids.tobytes())

    def subset(self, rows: np.ndarray) -> "PairDataset":
        """Return a data set of some rows (n,), numbered anew."""
        subset = PairDataset(
            [self.captions[row] for row in rows],
            self.product_ids[rows].tolist(),
            self.images,
            self.image_size,
            {name: [values[row] for row in rows] for name, values in self.attributes.items()},
            self.image_names,
            [self.image_index[row] for row in rows],
        )
        for setting in ("caption_prefix", "prompts", "several_captions", "row_noun", "product_noun"):
            setattr(subset, setting, getattr(self, setting))
        return subset

    def report(self) -> str:
        """Return one line for the user: how many rows and products there are, and what was left out."""
        products = self.product_ids.max() + 1
        return f"{len(self):,} {self.row_noun} of {products:,} {self.product_noun}{self.left_out_note()}"

    def left_out_note(self) -> str:
        """Return the end of `report`: how much was left out, with the first three reasons, and `notes`."""
        notes = []
        if self.problems:
            reasons = "; ".join(self.problems[:3])
            more = "; …" if len(self.problems) > 3 else ""
            notes.append(f"{len(self.problems):,} left out ({reasons}{more})")
        notes += self.notes
        return printable("".join(f", {note}" for note in notes))


def note_shared_products(products: list[str], train_products: set[str], train_file: str) -> list[str]:
    """Count the products of a validation file that the training file has too. -> the message, if there are any"""
    shared = [product for product in dict.fromkeys(products) if product in train_products]
    if not shared:
        return []
    examples = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
    return [f"{len(shared):,} of these products are in {train_file} too ({examples})"]


def factorize(values: list) -> np.ndarray:
    """Number values in the order in which they first appear, equal values alike. -> int64 (N,)"""
    number_of: dict = {}
    numbers = []
    for value in values:
        numbers.append(number_of.setdefault(value, len(number_of)))
    return np.array(numbers, dtype=np.int64)


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Pad an image with white to a square and scale it to (size, size) pixels. Our choice: nothing is cut off."""
    if image.size == (size, size):
        return image
    longest = max(image.size)
    # ImageOps.pad would leave no pixel of a very flat image
    width, height = (max(1, round(side / longest * size)) for side in image.size)
    square = Image.new("RGB", (size, size), "white")
    corner = (round((size - width) / 2), round((size - height) / 2))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), corner)
    return square
