"""Datasets, tokenizer, collation and augmentation.

Every dataset is a list of *photos* (rows). Several photos show one product and share its one description.

    synthetic    garments drawn here, with the ground truth of what every photo shows
    fashiongen   FashionGen's two HDF5 files, as distributed
    jsonl        one's own photos: one JSON object a line

For text-guided retrieval there are *triplets*: a reference photo, a text that says what differs, the target photo.

    synthetic    fronts of drawn garments that differ in one or two attributes
    fashioniq    FashionIQ's captions, image splits and photos, as distributed

A description is read as it is, or framed as FashionSAP and Fashion-FINE read it (`PhotoDataset.text`).

Photos are decoded to uint8 squares and stay uint8 until they are on the training device, where `augment` or
`normalise` turns a whole batch to floats at once.

    python data.py export-fashiongen DIR --items N     synthetic items in FashionGen's own HDF5 layout
"""

import argparse
import functools
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat, UnidentifiedImageError
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

DataName = Literal["synthetic", "fashiongen", "jsonl"]
TripletName = Literal["synthetic", "fashioniq"]
Split = Literal["train", "val"]
VAL_PRODUCTS = 300  # synthetic products held out of training
Text = tuple[str, ...]  # pieces by turns: frame, own words, frame, own words, …; only own words are ever masked
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the key or line, and what to do."""


@dataclass
class Unreadable:
    """Stands for a photo that could not be decoded; `Collate` leaves it out and counts it."""

    reason: str


class PhotoDataset(Dataset):
    """What training, sampling and evaluation need to know of photos. Subclasses decode one in `photo(row)`.

    captions: description of each row · product_ids, caption_ids: int64 arrays, equal where product or wording is
    categories, subcategories: one string a row, "" where unknown · problems: rows left out at opening, as text
    lead: words set before each description · prompts: put the category symbol and attribute prompts around it
    """

    lead, prompts = "", False

    def __init__(
        self, captions: list[str], products: list, categories: list[str], subcategories: list[str], image_size: int
    ):
        self.captions, self.categories, self.subcategories = captions, categories, subcategories
        self.product_ids, self.caption_ids = numbered(products), numbered(captions)
        self.image_size = image_size
        self.problems: list[str] = []

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
        }

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
        return f", {len(self.problems):,} left out ({shown})" if self.problems else ""


class Part(PhotoDataset):
    """Some rows of another data set."""

    def __init__(self, whole: PhotoDataset, rows: np.ndarray):
        self.whole, self.source = whole, [int(row) for row in rows]
        chosen = lambda values: [values[row] for row in self.source]
        super().__init__(
            chosen(whole.captions), chosen(whole.product_ids.tolist()), chosen(whole.categories),
            chosen(whole.subcategories), whole.image_size,
        )  # fmt: skip
        self.lead, self.prompts = whole.lead, whole.prompts

    def attributes(self, row: int) -> dict[str, str]:
        """What the whole data set knows of the product of a row."""
        return self.whole.attributes(self.source[row])

    def photo(self, row: int) -> Image.Image:
        """The photo of a row, read as the whole data set reads it."""
        return self.whole.photo(self.source[row])

    def name_of(self, row: int) -> str:
        return self.whole.name_of(self.source[row])


# The frames of FashionSAP (Han et al. 2023) and Fashion-FINE (Jin et al. 2024): a symbol for the kind of garment, a
# lead, and one prompt an attribute.
DESCRIPTION, DIFFERENCE = "the image description is", "the difference between two images are"
ATTRIBUTES = (
    "category", "subcategory", "name", "composition", "gender", "season", "colour", "pattern", "sleeve", "neck",
)  # fmt: skip
# Which words of a category or sub-category mean which symbol; categories as FashionSAP divides FashionGen's.
SYMBOLS = {
    "tops": r"(?:tank|crop)?tops?|\w*shirts?|tees?|polos?|sweaters?|knits?|knitwear|hoodies?|cardigans?|blouses?"
    r"|kurt\w+|tunics?|pullovers?|camisoles?|turtlenecks?|vests?|waistcoats?",
    "pants": r"\w*pants?|trousers?|jeans?|shorts?|leggings?|jeggings?|tights|capris?|chinos?|culottes?",
    "skirts": r"skirts?",
    "dresses": r"dress(?:es)?|gowns?|suits?|blazers?|jumpsuits?|sarees?",
    "coats": r"coats?|jackets?|parkas?|bombers?|trench\w*|outerwear",
    "shoes": r"\w*shoes?|footwear|sneakers?|trainers?|slippers?|clogs?|boots?|heels?|flats?|flops?|sandals?|loafers?"
    r"|espadrilles?|moccasins?|monkstraps?|ups|oxfords?",
    "bags": r"\w*bags?|backpacks?|clutches|totes?|pouch(?:es)?|holders?|briefcases?|satchels?|wallets?",
    "accessories": r"accessor\w+|jewell?e?ry|ties?|bars?|eyewear|sunglasses|hats?|headwear|caps?|beanies?|belts?"
    r"|suspenders?|keychains?|blankets?|gloves?|socks?|scar(?:f|ves)|mufflers?|stoles?|watch(?:es)?|cufflinks?"
    r"|umbrellas?|\w*rings?",
    "others": r"(?!)",
}  # fmt: skip


def symbol_of(category: str, subcategory: str = "") -> str:
    """The one of SYMBOLS for a category, or else for a sub-category: by its last word that means one ("bag accessories"
    are accessories), "others" if none does."""
    for name in (category, subcategory):
        for word in reversed(re.findall(r"[a-z]+", name.lower())):
            for symbol, words in SYMBOLS.items():
                if re.fullmatch(words, word):
                    return symbol
    return "others"


def prompted(caption: str, symbol: str, attributes: dict[str, str], rng: np.random.Generator) -> Text:
    """The text that Fashion-FINE pretrains on: "[symbol] the image description is … [SEP] the image season is … the
    image category is …", a prompt for each attribute that is known, in random order (choice: the same every epoch and
    for every seed, by the row alone)."""
    known = rng.permutation([name for name in ATTRIBUTES if attributes.get(name)]).tolist()
    frames = [f"the image {name.replace('subcategory', 'sub category')} is" for name in known]
    if frames:
        frames[0] = f"[SEP] {frames[0]}"
    prompts = zip(frames, (attributes[name] for name in known), strict=True)
    return f"[{symbol}] {DESCRIPTION}", caption, *(piece for prompt in prompts for piece in prompt)


def numbered(values: list) -> np.ndarray:
    """Equal values get equal numbers, 0, 1, … in order of appearance. -> int64 (N,)."""
    numbers: dict = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def square(photo: Image.Image, size: int) -> Image.Image:
    """The whole photo, padded to a square with white (choice: nothing is cut off) and scaled to `size` pixels."""
    if photo.size == (size, size):
        return photo
    return ImageOps.pad(photo, (size, size), Image.Resampling.BILINEAR, color=(255, 255, 255))


def open_photo(path: Path, size: int) -> Image.Image:
    """The RGB photo of a file, upright, on white where it is transparent; a JPEG is decoded no larger than needed.

    Raises OSError when it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (size, size))
            photo = ImageOps.exif_transpose(file)
            if photo.has_transparency_data:
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
            return photo.convert("RGB")
    except UnidentifiedImageError:
        raise OSError("not an image") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(reason.splitlines()[0]) from None


def _version(path: Path) -> str:
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def build_dataset(
    name: DataName,
    root: str | Path | None,
    split: Split,
    image_size: int,
    seed: int = 0,
    products: int = 2500,
    progress: bool = True,
) -> PhotoDataset:
    """Open a split of a data set. Raises DataError with one clear line when it cannot be used.

    root: folder of the files (default `data/<name>`; `synthetic` has none) · image_size: side in pixels
    seed: of the synthetic set, and of the split by product where the data has none
    products: synthetic products in the training split; validation has VAL_PRODUCTS
    """
    if name == "synthetic":
        return Synthetic(split, products if split == "train" else VAL_PRODUCTS, image_size, seed, progress)
    folder = Path(root or f"data/{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; say with --root where the {name} files are")
    return FashionGen(folder, split, image_size) if name == "fashiongen" else Jsonl(folder, split, image_size, seed)


# ------------------------------------------------------------------------------- synthetic: the wardrobe
#
# Garment space: x to the right, y down, the whole garment inside [−1, 1]². An outline is the right half of
# the garment from (0, top) to (0, bottom); the left half mirrors it.

COLOURS = {
    "black": (35, 35, 38), "white": (246, 246, 242), "grey": (140, 142, 145), "navy": (28, 40, 92),
    "blue": (52, 120, 215), "red": (204, 36, 40), "green": (38, 132, 66), "yellow": (244, 206, 52),
    "orange": (240, 128, 36), "purple": (122, 58, 160), "pink": (244, 150, 184), "brown": (112, 70, 42),
    "beige": (216, 194, 158), "teal": (22, 146, 150),
}  # fmt: skip
PATTERNS = {
    "striped": ("Striped pattern", "Horizontal stripes"), "pinstriped": ("Pinstriped pattern", "Pinstripes"),
    "checked": ("Check pattern", "Checks"), "dotted": ("Polka dot pattern", "Dots"),
    "zigzag": ("Zigzag pattern", "Zigzags"), "diamond": ("Argyle pattern", "Diamonds"),
}  # fmt: skip
SLEEVES = {
    "sleeveless": [],
    "short": [(0.33, -0.56), (0.62, -0.27), (0.48, -0.12), (0.33, -0.26)],
    "long": [(0.33, -0.56), (0.66, 0.30), (0.50, 0.36), (0.33, -0.16)],
}
NECKS = {
    "crew": ("Crew neck", "Round neckline"), "v": ("V-neck", "V-neckline"),
    "spread": ("Spread collar", "Pointed collar"), "turtle": ("Turtleneck", "Rollneck collar"),
    "hood": ("Hood", "Drawstring hood"),
}  # fmt: skip
GRAPHICS = ("star", "heart", "circle", "triangle", "cross")
# Details a description may name: wordings, and the views that show them.
# `{…}` marks the words that the truth is about; COLOUR and SHAPE stand for the product's own.
DETAILS = {
    "pocket": (("{Patch pocket} at chest", "{Pocket} at breast"), ("front",)),
    "logo": (("{Logo patch} in {COLOUR} at front", "{COLOUR logo} at front"), ("front",)),
    "graphic": (("{SHAPE graphic} in {COLOUR} at back", "{COLOUR SHAPE print} at back"), ("back",)),
    "badge": (("{SHAPE badge} in {COLOUR} at front", "{COLOUR SHAPE appliqué} at front"), ("front",)),
    "belt": (("{Belt} in {COLOUR} at waist", "{COLOUR belt} at waist"), ("front", "back")),
    "buttons": (("{Button closure} at front", "{Buttons} in {COLOUR} at front"), ("front",)),
    "zip": (("{Zip closure} at front", "{Zip} in {COLOUR} at front"), ("front",)),
    "hem": (("{Contrast hem} in {COLOUR}", "{COLOUR trim} at hem"), ("front", "back")),
    "cuffs": (("{Ribbed cuffs} in {COLOUR}", "{COLOUR cuffs}"), ("front", "back")),
    "stripe": (("{Side stripe} in {COLOUR}", "{COLOUR band} at sides"), ("front", "back")),
    "knees": (("{Knee patches} in {COLOUR}", "{COLOUR panels} at knees"), ("front",)),
    "label": (("{Leather label} at back", "{Label} in {COLOUR} at back"), ("back",)),
}  # fmt: skip
UNSEEN = ("Tonal stitching", "Fully lined", "Cotton poplin", "Organic cotton", "Soft handle", "Dry clean")


@dataclass(frozen=True)
class Garment:
    """A sub-category: its outline and which attributes it can have. Heights (y) of waist and hem, chest centre."""

    category: str
    outline: tuple
    details: str  # keys of DETAILS
    sleeves: tuple = ()
    necks: tuple = ()
    waist: float = 0.0
    hem: float = 0.5
    chest: tuple = (0.0, -0.18)
    extras: tuple = ()  # more polygons of the same cloth: straps, handles, brims


def _pick(rng: np.random.Generator, options: tuple):
    return options[int(rng.integers(len(options)))]


def _torso(waist: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.16, -0.6), (0.38, -0.54), (0.36, -0.12), (waist, 0.08), (hem, bottom), (0, bottom))


def _legs(thigh: float, ankle: float, bottom: float) -> tuple:
    return ((0, -0.8), (0.27, -0.8), (thigh, -0.35), (ankle, bottom), (max(ankle - 0.24, 0.03), bottom), (0, -0.22))


def _skirt(hip: float, hem: float, bottom: float) -> tuple:
    return ((0, -0.6), (0.25, -0.6), (hip, -0.25), (hem, bottom), (0, bottom))


_LOW = {"waist": -0.54, "chest": (0.0, -0.15)}
_HIGH = {"waist": -0.74, "chest": (0.0, -0.5)}
_TOTE = ((0, -0.2), (0.5, -0.2), (0.42, 0.62), (0, 0.62))
_HANDLE = ((0.2, -0.2), (0.15, -0.72), (0, -0.72), (0, -0.65), (0.1, -0.65), (0.14, -0.2))
_PACK = ((0, -0.62), (0.26, -0.6), (0.4, -0.4), (0.44, 0.6), (0, 0.62))
_STRAP = ((0.34, -0.3), (0.56, -0.1), (0.56, 0.4), (0.5, 0.4), (0.48, -0.05), (0.36, -0.15))
_CROWN = ((0, -0.5), (0.22, -0.46), (0.42, -0.25), (0.48, 0.1), (0, 0.16))
_BRIM = ((0, 0.08), (0.46, 0.06), (0.62, 0.28), (0.3, 0.36), (0, 0.38))
_BEANIE = ((0, -0.6), (0.2, -0.56), (0.42, -0.3), (0.46, 0.3), (0, 0.3))
_POMPOM = ((0, -0.78), (0.1, -0.74), (0.12, -0.6), (0, -0.56))

_TOP = "pocket logo graphic badge hem cuffs"
_SHIRT = _TOP + " buttons"
_COAT = "pocket logo graphic belt buttons zip hem cuffs"
_LEG = "belt stripe label hem logo"
_ANY, _LONG, _ROUND = tuple(SLEEVES), ("long",), ("crew", "v")
GARMENTS = {
    "t-shirt": Garment("TOPS", _torso(0.36, 0.37, 0.5), _TOP, ("short",), _ROUND),
    "tank top": Garment("TOPS", _torso(0.33, 0.35, 0.5), _TOP, ("sleeveless",), _ROUND),
    "shirt": Garment("SHIRTS", _torso(0.34, 0.38, 0.58), _SHIRT, _ANY[1:], ("spread",), hem=0.58),
    "polo": Garment("SHIRTS", _torso(0.36, 0.37, 0.5), _SHIRT, _ANY[1:], ("spread",)),
    "sweater": Garment("KNITWEAR", _torso(0.38, 0.34, 0.48), _TOP, _LONG, ("crew", "v", "turtle"), hem=0.48),
    "cardigan": Garment("KNITWEAR", _torso(0.38, 0.36, 0.55), _SHIRT, _LONG, ("v",), hem=0.55),
    "hoodie": Garment("SWEATSHIRTS", _torso(0.4, 0.35, 0.52), _TOP + " zip", _LONG, ("hood",), hem=0.52),
    "bomber": Garment("JACKETS", _torso(0.42, 0.33, 0.4), "pocket logo graphic zip cuffs", _LONG, ("crew",), hem=0.4),
    "coat": Garment("COATS", _torso(0.36, 0.46, 0.86), _COAT, _LONG, ("spread", "turtle"), hem=0.86),
    "parka": Garment("COATS", _torso(0.42, 0.44, 0.72), _COAT, _LONG, ("hood",), hem=0.72),
    "mini dress": Garment("DRESSES", _torso(0.25, 0.44, 0.52), _COAT, _ANY, _ROUND, hem=0.52),
    "maxi dress": Garment("DRESSES", _torso(0.25, 0.56, 0.9), _COAT, _ANY, _ROUND, hem=0.9),
    "mini skirt": Garment("SKIRTS", _skirt(0.34, 0.44, 0.12), "belt buttons zip hem label logo", **_LOW, hem=0.12),
    "midi skirt": Garment("SKIRTS", _skirt(0.34, 0.5, 0.72), "belt buttons zip hem label badge", **_LOW, hem=0.72),
    "trousers": Garment("PANTS", _legs(0.33, 0.3, 0.88), _LEG + " knees", **_HIGH, hem=0.88),
    "flared pants": Garment("PANTS", _legs(0.31, 0.46, 0.9), _LEG + " knees", **_HIGH, hem=0.9),
    "shorts": Garment("SHORTS", _legs(0.36, 0.42, 0.08), _LEG, **_HIGH, hem=0.08),
    "tote bag": Garment("BAGS", _TOTE, "logo badge graphic hem zip", hem=0.62, chest=(0, 0.2), extras=(_HANDLE,)),
    "backpack": Garment("BAGS", _PACK, "logo badge graphic pocket zip", hem=0.6, chest=(0, 0.1), extras=(_STRAP,)),
    "cap": Garment("HATS", _CROWN, "logo badge label hem", hem=0.1, chest=(0, -0.2), extras=(_BRIM,)),
    "beanie": Garment("HATS", _BEANIE, "logo badge label hem", hem=0.3, chest=(0, -0.1), extras=(_POMPOM,)),
}


@dataclass(frozen=True)
class Product:
    """One synthetic product: what it is, and its description with `{key|words}` marking what words are about."""

    garment: str
    colour: str
    pattern: tuple[str, str] | None  # kind, colour
    sleeve: str | None
    neck: str | None
    details: tuple  # (key, colour, graphic shape)
    marked_caption: str = ""

    @staticmethod
    def draw(rng: np.random.Generator) -> "Product":
        """A random product and its wording."""
        name, colour = _pick(rng, tuple(GARMENTS)), _pick(rng, tuple(COLOURS))
        garment = GARMENTS[name]
        others = tuple(c for c in COLOURS if c != colour)
        pattern = (_pick(rng, tuple(PATTERNS)), _pick(rng, others)) if rng.random() < 0.5 else None
        sleeve = _pick(rng, garment.sleeves) if garment.sleeves else None
        neck = _pick(rng, garment.necks) if garment.necks else None
        options = [key for key in garment.details.split() if key != "cuffs" or sleeve == "long"]
        chosen = set(rng.permutation(options)[: int(rng.integers(2, 4))].tolist())
        if "buttons" in chosen:
            chosen.discard("zip")
        free = tuple(c for c in others if not pattern or c != pattern[1])
        shape = lambda key: _pick(rng, GRAPHICS) if key in ("graphic", "badge") else ""
        ink = lambda key: colour if key == "pocket" else _pick(rng, free)
        details = tuple((key, ink(key), shape(key)) for key in sorted(chosen))
        product = Product(name, colour, pattern, sleeve, neck, details)
        return replace(product, marked_caption=product._describe(rng))

    def attributes(self) -> dict[str, object]:
        """What is true of it: a value for every key it has."""
        named = {"garment": self.garment, "colour": self.colour}
        named |= {"pattern": self.pattern, "sleeve": self.sleeve, "neck": self.neck}
        return named | {key: (colour, shape) for key, colour, shape in self.details}

    def _describe(self, rng: np.random.Generator) -> str:
        tag = lambda key, words: f"{{{key}|{words}}}"
        garment, colour = tag("garment", self.garment), tag("colour", self.colour)
        title = _pick(rng, (f"{garment} in {colour}", f"{colour} {garment}"))
        if self.sleeve:
            sleeve = tag("sleeve", self.sleeve if self.sleeve == "sleeveless" else f"{self.sleeve} sleeve")
            title = _pick(rng, (f"{sleeve} {title}", f"{title}. {sleeve}"))
        sentences = []
        if self.pattern:
            (long, short), ink = PATTERNS[self.pattern[0]], self.pattern[1]
            sentences.append(
                _pick(rng, (f"{{{long}}} in {{{ink}}} throughout", f"{{{ink} {short.lower()}}} throughout"))
            )
            sentences[-1] = sentences[-1].replace("{", "{pattern|")
        parts = [tag("neck", _pick(rng, NECKS[self.neck]))] if self.neck else []
        for key, ink, shape in self.details:
            words = _pick(rng, DETAILS[key][0]).replace("COLOUR", ink).replace("SHAPE", shape)
            parts.append(words.replace("{", f"{{{key}|"))
        parts.append(tag("unseen", _pick(rng, UNSEEN)))
        return ". ".join([title, *sentences, *rng.permutation(parts).tolist()]) + "."

    def caption_and_spans(self) -> tuple[str, list[tuple[int, int, str]]]:
        """The description, and (start, end, key) of every stretch of it that names an attribute."""
        caption, spans = "", []
        for marked, key, words, plain in re.findall(r"(\{(\w+)\|([^}]*)\})|([^{]+)", self.marked_caption):
            if marked:
                if not caption or caption.endswith(". "):
                    words = words[0].upper() + words[1:]
                spans.append((len(caption), len(caption) + len(words), key))
            caption += words if marked else plain
        return caption, spans


# ------------------------------------------------------------------------------- synthetic: the camera


SUPERSAMPLING = 3
ZOOMS = {"close-up": (2.0, 2.6), "half": (1.4, 1.8)}  # other views show the whole garment


class Canvas:
    """A supersampled photo under way, and for every attribute the mask of where it was painted."""

    def __init__(self, size: int, view: str, rng: np.random.Generator, focus: tuple[float, float], fit: float):
        self.size = size
        angle = np.deg2rad(rng.uniform(-7, 7))
        zoom = rng.uniform(*ZOOMS[view]) if view in ZOOMS else fit * rng.uniform(0.78, 1.02)
        centre = np.array(focus) + rng.uniform(-0.08, 0.08, 2) / zoom
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.place = lambda points: ((np.asarray(points, float) - centre) @ turn * zoom + 1) * size / 2
        self.unit = zoom * size / 2  # pixels of one garment unit
        light = rng.uniform(196, 236) + rng.uniform(-8, 8, 3)
        self.image = Image.new("RGB", (size, size), tuple(int(c) for c in light))
        self.regions: dict[str, Image.Image] = {}

    def mask(self, polygons: list, mirrored: bool = True, clip: Image.Image | None = None) -> Image.Image:
        """What some polygons, and with `mirrored` their mirror images, cover of the photo, inside `clip`."""
        mask = Image.new("L", (self.size, self.size))
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            for side in (1, -1) if mirrored else (1,):
                draw.polygon([tuple(p) for p in self.place([(side * x, y) for x, y in polygon])], fill=255)
        return ImageChops.darker(mask, clip) if clip else mask

    def paint(self, key: str, mask: Image.Image, fill: tuple | Image.Image, edge: float = 0.72) -> None:
        """Fill `mask` with a colour or a cloth, with a darker edge, and remember it as the region of `key`."""
        rim = max(1, round(0.018 * self.unit))
        tone = fill if isinstance(fill, tuple) else fill.resize((1, 1)).getpixel((0, 0))
        dark = tuple(int(c * edge) for c in tone)
        self._fill(dark, ImageChops.lighter(mask, _shift(mask, rim)))
        self._fill(fill, ImageChops.darker(mask, _shift(mask, -rim)))
        known = self.regions.get(key)
        self.regions[key] = ImageChops.lighter(known, mask) if known else mask

    def colour_at(self, x: float, y: float) -> tuple:
        """The colour of the photo at a place of the garment, or at the nearest pixel inside."""
        at = self.place([(x, y)])[0].clip(0, self.size - 1).astype(int)
        return self.image.getpixel(tuple(at.tolist()))

    def _fill(self, fill: tuple | Image.Image, mask: Image.Image) -> None:
        if box := mask.getbbox():  # pasting is the costly part: only where there is something
            self.image.paste(fill if isinstance(fill, tuple) else fill.crop(box), box, mask.crop(box))

    def cloth(self, colour: tuple, pattern: tuple[str, tuple] | None) -> Image.Image:
        """A texture as large as the photo; the period of the pattern grows with the zoom."""
        image = Image.new("RGB", (self.size, self.size), colour)
        if pattern is None:
            return image
        draw, (kind, ink), size = ImageDraw.Draw(image), pattern, self.size
        step = 0.2 * self.unit
        for i in range(int(size / step) + 2):
            for j in range(int(size / step) + 2) if kind in ("dotted", "zigzag", "diamond") else (0,):
                a, b = i * step, j * step
                if kind in ("striped", "checked"):
                    draw.rectangle((0, a, size, a + step * 0.4), fill=ink)
                if kind == "checked":
                    draw.rectangle((a, 0, a + step * 0.3, size), fill=ink)
                if kind == "pinstriped":
                    draw.rectangle((a * 0.7, 0, a * 0.7 + step * 0.16, size), fill=ink)
                if kind == "dotted":
                    x = a + (j % 2) * step / 2
                    draw.ellipse((x, b, x + step * 0.45, b + step * 0.45), fill=ink)
                if kind == "zigzag":
                    corners = [(a, b), (a + step / 2, b + step / 2), (a + step, b)]
                    draw.line(corners, fill=ink, width=int(step * 0.22))
                if kind == "diamond":
                    r = step * 0.42
                    draw.polygon([(a, b - r), (a + r, b), (a, b + r), (a - r, b)], fill=ink)
        return image


def _shift(mask: Image.Image, by: int) -> Image.Image:
    """The mask moved right and down, black where it came from."""
    moved = Image.new("L", mask.size)
    moved.paste(mask, (by, by))
    return moved


def _disc(x: float, y: float, rx: float, ry: float | None = None, corners: int = 24, start: float = 0.0) -> list:
    angles = start + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return [(x + rx * np.cos(a), y + (ry or rx) * np.sin(a)) for a in angles]


def _box(x: float, y: float, half_width: float, half_height: float) -> list:
    return [(x + sx * half_width, y + sy * half_height) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def _shape(name: str, x: float, y: float, r: float) -> list[list]:
    """The polygons of one of GRAPHICS."""
    if name == "star":
        points = zip(_disc(x, y, r, corners=5, start=-np.pi / 2), _disc(x, y, r * 0.42, corners=5, start=-0.3 * np.pi))
        return [[p for pair in points for p in pair]]
    if name == "heart":
        lobes = [_disc(x + s * r * 0.45, y - r * 0.3, r * 0.5) for s in (1, -1)]
        return [*lobes, [(x - 0.9 * r, y - 0.08 * r), (x + 0.9 * r, y - 0.08 * r), (x, y + r)]]
    if name == "triangle":
        return [_disc(x, y + 0.15 * r, r, corners=3, start=-np.pi / 2)]
    if name == "cross":
        return [_box(x, y, r, r * 0.32), _box(x, y, r * 0.32, r)]
    return [_disc(x, y, r * 0.9)]


def _paint_neck(canvas: Canvas, neck: str, front: bool, tone: tuple, inside: tuple) -> None:
    dark = tuple(int(c * 0.62) if sum(tone) > 200 else int(c * 0.5 + 70) for c in tone)
    if neck == "hood":  # seen from both sides
        canvas.paint("neck", canvas.mask([_disc(0, -0.66, 0.27, 0.2)], False), dark)
        if front:
            canvas.paint("neck", canvas.mask([_disc(0, -0.64, 0.17, 0.13)], False), inside)
    elif neck == "turtle":
        canvas.paint("neck", canvas.mask([_box(0, -0.64, 0.17, 0.09)], False), dark)
    elif front and neck == "spread":
        canvas.paint("neck", canvas.mask([[(0.02, -0.52), (0.15, -0.66), (0.27, -0.46), (0.1, -0.34)]]), dark)
    elif front:
        corners = 12 if neck == "crew" else 3  # a half ellipse, or a triangle
        for width, depth, fill in ((0.21, 1.0, dark), (0.14, 0.66, inside)):
            depth *= {"crew": 0.17, "v": 0.36}[neck]
            angles = np.linspace(0, np.pi, corners)
            opening = [(width * np.cos(a), -0.61 + depth * np.sin(a)) for a in angles]
            canvas.paint("neck", canvas.mask([opening], False), fill)


def _detail(garment: Garment, key: str, shape: str) -> list:
    """The polygons of one of DETAILS."""
    x, y = garment.chest
    match key:
        case "pocket":
            return [_box(x + 0.18, y, 0.1, 0.11)]
        case "logo":
            return [_box(x - 0.17, y - 0.04, 0.085, 0.055)]
        case "label":
            return [_box(x + 0.1, y - 0.02, 0.11, 0.06)]
        case "badge":
            return _shape(shape, x, y + 0.2, 0.14)
        case "graphic":
            return _shape(shape, x, y + 0.1, 0.25)
        case "belt":
            return [_box(0, garment.waist, 1, 0.05)]
        case "hem":
            return [_box(0, garment.hem - 0.03, 1, 0.065)]
        case "cuffs":
            return [_box(0, 0.32, 1, 0.075)]
        case "knees":
            return [_box(0.2, 0.2, 0.09, 0.13)]
        case "stripe":
            side = list(garment.outline[1:4])
            return [side + [(px - 0.08, py) for px, py in side[::-1]]]
    top, bottom = garment.outline[0][1] + (0.24 if garment.necks else 0.1), garment.hem - 0.1
    if garment.waist < -0.5:  # the fly, or the front of a skirt
        top, bottom = garment.waist + 0.08, min(bottom, garment.waist + 0.6)
    if key == "buttons":
        return [_disc(0, h, 0.035) for h in np.linspace(top, bottom, 5)]
    return [_box(0, (top + bottom) / 2, 0.025, (bottom - top) / 2), _box(0, top, 0.05, 0.04)]  # zip


def render(product: Product, view: str, size: int, rng: np.random.Generator) -> tuple[Image.Image, dict]:
    """Photograph a product: (RGB image of `size` pixels, region masks by attribute at the supersampled size).

    view: "front", "back", "close-up" of something at the front, "half" of the front.
    """
    garment = GARMENTS[product.garment]
    front = view != "back"
    spots = [garment.chest, (0.12, garment.chest[1] + 0.1), (0.0, garment.waist), (0.2, garment.hem - 0.1)]
    if view == "half":
        spots = [(0.0, -0.4), (0.0, garment.hem - 0.3)]
    middle = (garment.outline[0][1] + garment.hem) / 2
    focus = spots[int(rng.integers(len(spots)))] if view in ZOOMS else (0.0, middle)
    canvas = Canvas(size * SUPERSAMPLING, view, rng, focus, fit=0.84 / max(0.55, garment.hem - middle))
    ink = lambda name: tuple(int(np.clip(c + rng.uniform(-9, 9), 0, 255)) for c in COLOURS[name])
    tone = ink(product.colour)
    pattern = product.pattern and (product.pattern[0], ink(product.pattern[1]))
    cloth = canvas.cloth(tone, pattern)
    inside = tuple(int(c * 0.45 + 20) for c in tone)

    if garment.extras:
        canvas.paint("garment", canvas.mask(list(garment.extras)), tone)
    sleeves = canvas.mask([SLEEVES[product.sleeve]]) if SLEEVES.get(product.sleeve) else Image.new("L", cloth.size)
    if product.sleeve not in (None, "sleeveless"):
        canvas.paint("sleeve", sleeves, cloth)
    body = canvas.mask([garment.outline])
    canvas.paint("garment", body, cloth)
    if product.neck:
        _paint_neck(canvas, product.neck, front, tone, inside)
    clips = {"cuffs": sleeves, **dict.fromkeys(("belt", "hem", "stripe", "knees"), body)}
    for key, colour, shape in product.details:
        if ("front" if front else "back") in DETAILS[key][1]:
            polygons, fill, pocket = _detail(garment, key, shape), ink(colour), key == "pocket"
            if pocket:  # of the cloth under it, but darker
                fill = tuple(int(c * 0.7) for c in canvas.colour_at(garment.chest[0] + 0.18, garment.chest[1]))
            mask = canvas.mask(polygons, mirrored=key in ("stripe", "knees"), clip=clips.get(key))
            canvas.paint(key, mask, fill, edge=0.4 if pocket else 0.72)
    canvas.regions["garment"] = ImageChops.lighter(canvas.regions["garment"], sleeves)
    canvas.regions["colour"] = canvas.regions["garment"]
    if pattern:
        canvas.regions["pattern"] = ImageChops.lighter(body, sleeves)
    if product.sleeve == "sleeveless":  # what shows it is the bare shoulder
        canvas.regions["sleeve"] = canvas.mask([_box(0.38, -0.42, 0.08, 0.15)])

    pixels = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)
    slope = np.linspace(*rng.uniform(0.9, 1.08, 2), size, dtype=np.float32)[:, None, None]
    pixels = pixels * slope + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), canvas.regions


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
        bar = tqdm(range(len(self.rows)), f"drawing {split} photos", unit=" photos", disable=not progress, leave=False)
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


@dataclass
class WordTruth:
    """`Synthetic.truth` of a batch, token by token. Letters: B, L, P patches."""

    attribute: Tensor  # (B, L): names an attribute, visible in this photo or not
    detail: Tensor  # (B, L): a small one, not the garment itself nor its colour or pattern
    regions: Tensor  # (B, L, P): where this photo shows it; nowhere where it does not

    @property
    def visible(self) -> Tensor:
        """(B, L): names an attribute that this photo shows."""
        return self.regions.any(dim=2)


def word_truth(dataset: Synthetic, rows: list[int], tokenizer: Tokenizer, grid: int) -> WordTruth:
    """The truth about every token of the descriptions of `rows`, tokenised together; frames and prompts have none."""
    encodings = encode(tokenizer, [dataset.text(row) for row in rows])
    attribute = torch.zeros(len(rows), len(encodings[0].ids), dtype=torch.bool)
    detail, regions = attribute.clone(), torch.zeros(*attribute.shape, grid**2, dtype=torch.bool)
    for b, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
        spans, seen = dataset.truth(row, grid)
        for token, (piece, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            for first, last, key in spans:
                if piece == 1 and first <= start < end <= last:
                    attribute[b, token], detail[b, token] = True, key not in ("garment", "colour", "pattern")
                    if key in seen:
                        regions[b, token] = torch.from_numpy(seen[key])
    return WordTruth(attribute, detail, regions)


# ----------------------------------------------------------------------------------- photos from files


SEASONS = {"SS": "spring summer ", "FW": "fall winter "}


class FashionGen(PhotoDataset):
    """FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row a photo.

    Each process opens the file for itself, on its first photo: HDF5 handles do not survive a fork.
    Text is iso-8859-1, in which every byte is a character, so there are no undecodable bytes.
    """

    FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
    TEXT_KEYS = ("input_description", "input_category", "input_subcategory")
    PROMPT_KEYS = {name: f"input_{name}" for name in ("composition", "gender", "name", "season")}  # if there at all

    def __init__(self, folder: Path, split: Split, image_size: int):
        self.path = folder / self.FILES[split]
        self._handle: tuple[int, h5py.File] | None = None
        with self._open() as file:
            rows = self._check(file)
            captions, categories, subcategories = (self._text(file, key) for key in self.TEXT_KEYS)
            products = file["input_productID"][:].reshape(rows).tolist()
        self.source = [row for row in range(rows) if captions[row]]
        if not self.source:
            raise DataError(f"{self.path}: key input_description: every row is empty")
        chosen = lambda values: [values[row] for row in self.source]
        super().__init__(chosen(captions), chosen(products), chosen(categories), chosen(subcategories), image_size)
        self.problems = [f"row {row}: empty input_description" for row in range(rows) if not captions[row]]

    def report(self) -> str:
        """Also whether the file is packed in a way that makes single photos slow to read."""
        with self._open() as file:
            images = file["input_image"]
            together, shape = images.chunks[0] if images.chunks else 1, "x".join(map(str, (1, *images.shape[1:])))
        if together == 1:
            return super().report()
        slow = f"an HDF5 chunk is {together} photos, and for one all are read; repack the file once:"
        return f"{super().report()}\n  {slow} h5repack -l input_image:CHUNK={shape} {self.path} NEW"

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; --root must be the folder that holds {self.path.name}")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: not a whole HDF5 file ({error}); copy it again") from None

    def _check(self, file: h5py.File) -> int:
        for key in ("input_image", "input_productID", *self.TEXT_KEYS):
            if not isinstance(file.get(key), h5py.Dataset):
                raise DataError(f"{self.path}: no key {key}; is it a FashionGen file?")
        images = file["input_image"]
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            found = f"{images.dtype} {images.shape}"
            raise DataError(f"{self.path}: key input_image: expected uint8 (rows, height, width, 3), found {found}")
        if not len(images):
            raise DataError(f"{self.path}: key input_image: zero rows")
        for key in ("input_productID", *self.TEXT_KEYS, *(key for key in self.PROMPT_KEYS.values() if key in file)):
            if file[key].shape not in ((len(images),), (len(images), 1)):
                raise DataError(f"{self.path}: key {key}: shape {file[key].shape} beside {len(images)} images")
        return len(images)

    def _text(self, file: h5py.File, key: str) -> list[str]:
        try:
            values = np.asarray(file[key][:]).reshape(-1)
        except OSError as error:
            raise DataError(f"{self.path}: key {key}: cannot be read ({error}); copy the file again") from None
        if values.dtype.kind not in "SO" or not all(isinstance(v, bytes) for v in values[:1].tolist()):
            raise DataError(f"{self.path}: key {key} row 0: {values.dtype} where byte strings are expected")
        return [" ".join(value.decode("iso-8859-1").split()) for value in values.tolist()]

    @functools.cached_property
    def _prompted(self) -> dict[str, list[str]]:
        with self._open() as file:
            found = {name: self._text(file, key) for name, key in self.PROMPT_KEYS.items() if key in file}
        return {name: [values[row] for row in self.source] for name, values in found.items()}

    def attributes(self, row: int) -> dict[str, str]:
        """Category and sub-category, and of composition, gender, name and season what the file has."""
        known = super().attributes(row) | {name: values[row] for name, values in self._prompted.items()}
        season = re.sub(r"^(SS|FW)(?=\d)", lambda half: SEASONS[half[0]], known.get("season", ""))
        return known | {"season": season}

    def versions(self) -> list[str]:
        return [_version(self.path)]

    def photo(self, row: int) -> Image.Image:
        """The photo of a row of the file, at the size it has there."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self._open())
        return Image.fromarray(self._handle[1]["input_image"][self.source[row]])

    def name_of(self, row: int) -> str:
        return f"{self.path.name} row {self.source[row]}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(value) -> str:
    """An optional field: words or a number, those of a list joined; "" for anything else."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(_value, value)))
    known = isinstance(value, str | int | float) and not isinstance(value, bool) and value == value
    return " ".join(str(value).split()) if known else ""


class Jsonl(PhotoDataset):
    """Photos listed one JSON object a line: `image` (relative to the folder), `caption`, `product_id`, and if you
    have them `category` and `subcategory`, and for prompts any other of ATTRIBUTES (`title` serves as `name`). Files
    `train.jsonl` and `val.jsonl`; without the latter a tenth of the products, chosen by hash, is held out.

    A malformed line, or a path that leaves the folder, refuses the file: it is not what it seems. A missing
    photo or an empty caption leaves out that line only, and is reported.
    """

    def __init__(self, folder: Path, split: Split, image_size: int, seed: int = 0):
        self.folder = folder
        own_split = (folder / "val.jsonl").is_file()
        path = folder / (f"{split}.jsonl" if own_split else "train.jsonl")
        records, problems = self._read(path)
        if not own_split:
            products = {str(record["product_id"]) for record in records}
            by_hash = sorted(products, key=lambda product: hashlib.sha256(f"{seed}:{product}".encode()).digest())
            if len(products) == 1:
                raise DataError(f"{path}: one product cannot be split; add more, or a val.jsonl")
            held_out = set(by_hash[: max(1, len(products) // 10)])
            records = [record for record in records if (str(record["product_id"]) in held_out) == (split == "val")]
        if not records:
            raise DataError(f"{path}: no usable line for the {split} split; {'; '.join(problems[:3]) or 'it is empty'}")
        self.images = [record["image"] for record in records]
        self.known = {name: [_value(record.get(name)) for record in records] for name in ATTRIBUTES}
        self.known["name"] = [_value(record.get("name")) or _value(record.get("title")) for record in records]
        kinds = self.known["category"], self.known["subcategory"]
        captions, products = ([str(record[key]) for record in records] for key in ("caption", "product_id"))
        super().__init__(captions, products, *kinds, image_size)
        self.problems = problems

    def _read(self, path: Path) -> tuple[list[dict], list[str]]:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # a caption may hold other line separators
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; one JSON object a line with image, caption, product_id") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        records, problems = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = self._parse(f"{path} line {number}", line)
            if not (self.folder / record["image"]).is_file():
                problems.append(f"line {number}: no photo {record['image']}")
            elif not record["caption"].strip():
                problems.append(f"line {number}: empty caption")
            else:
                records.append(record)
        return records, problems

    @staticmethod
    def _parse(where: str, line: str) -> dict:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with image, caption, product_id")
        for key in ("image", "caption"):
            if not isinstance(record.get(key), str):
                raise DataError(f"{where}: field {key} is missing or not text")
        if not isinstance(record.get("product_id"), str | int) or isinstance(record["product_id"], bool):
            raise DataError(f"{where}: field product_id is missing, or neither text nor a whole number")
        if not record["image"].isprintable() or len(record["image"]) > 1000:
            raise DataError(f"{where}: field image is not a path")
        for key in ("caption", "product_id", *(key for key in (*ATTRIBUTES, "title") if key in record)):
            if not _is_text(str(record[key])):
                raise DataError(f"{where}: field {key} holds half a character (a lone surrogate)")
        if os.path.isabs(record["image"]) or os.path.normpath(record["image"]).startswith(".."):
            raise DataError(f"{where}: image {record['image']!r} leaves the folder; use a path relative to it")
        return record

    def attributes(self, row: int) -> dict[str, str]:
        """What the line says of them."""
        return {name: values[row] for name, values in self.known.items()}

    def photo(self, row: int) -> Image.Image:
        """The photo of a line."""
        return open_photo(self.folder / self.images[row], self.image_size)

    def versions(self) -> list[str]:
        return [_version(self.folder / image) for image in self.images]

    def name_of(self, row: int) -> str:
        return self.images[row]


# ------------------------------------------------------------------------------------------- triplets

Galleries = dict[str, dict[str, np.ndarray]]  # subset -> protocol -> rows of the photos to search among


class Triplets(PhotoDataset):
    """Reference photo + text about what differs → target photo, for text-guided retrieval. A row is a triplet.

    photos: all photos there are · references, targets (T,): rows of these; targets −1 where they are not published
    captions: the texts · product_ids: the targets · families (T,): triplets that may share photos
    subsets: what figures are averaged over, such as FashionIQ's dress, shirt, toptee
    galleries: for each subset the candidates, by protocol: `original`, all photos of its split; `union`, those that
    occur in its pairs
    """

    def __init__(
        self, photos: PhotoDataset, references: list[int], targets: list[int], texts: list[str], subsets: list[str],
        families: list, originals: dict[str, list[int]] | None = None, lead: str = "",
    ):  # fmt: skip
        super().__init__(texts, targets, subsets, subsets, photos.image_size)
        self.photos, self.subsets, self.families, self.lead = photos, subsets, numbered(families), lead
        self.references, self.targets = np.array(references, np.int64), np.array(targets, np.int64)
        self.caption_ids = np.arange(len(texts))  # the same text about other references is another query
        self.galleries: Galleries = {}
        for subset in dict.fromkeys(subsets):
            rows = np.array([named == subset for named in subsets])
            pairs = np.concatenate([self.references[rows], self.targets[rows]])
            self.galleries[subset] = {"union": np.unique(pairs[pairs >= 0])}
            if originals:
                self.galleries[subset]["original"] = np.array(originals[subset], np.int64)

    def part(self, rows: np.ndarray) -> "Triplets":
        """Some of the triplets, over the same photos; their gallery is the union of their pairs."""
        chosen = lambda values: [values[row] for row in rows.tolist()]
        return Triplets(
            self.photos, chosen(self.references.tolist()), chosen(self.targets.tolist()), chosen(self.captions),
            chosen(self.subsets), chosen(self.families.tolist()), lead=self.lead,
        )  # fmt: skip

    def queries(self) -> PhotoDataset:
        """The reference photos with the texts, without the targets."""
        queries = self.photos.part(self.references)
        queries.captions, queries.lead = self.captions, self.lead
        return queries

    def photo(self, row: int) -> Image.Image:
        """The reference photo of a triplet."""
        return self.photos.photo(self.references[row])

    def __getitem__(self, row: int) -> dict | Unreadable:
        item, target = super().__getitem__(row), int(self.targets[row])
        if target < 0 or isinstance(item, Unreadable):
            return item
        shown = self.photos[target]
        return shown if isinstance(shown, Unreadable) else item | {"target_image": shown["image"]}

    def name_of(self, row: int) -> str:
        return self.photos.name_of(int(self.references[row]))

    def report(self) -> str:
        """One line for the user: triplets, sizes of the galleries, what was left out and why."""
        line = f"{len(self):,} triplets"
        for subset, galleries in self.galleries.items():
            sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in galleries.items())
            line += f"; {subset}: {self.subsets.count(subset):,} (photos to search: {sizes})"
        return line + self._left_out()


def build_triplets(
    name: TripletName,
    root: str | Path | None,
    split: Literal["train", "val", "test"],
    image_size: int,
    seed: int = 0,
    products: int = 2500,
    progress: bool = True,
) -> Triplets:
    """Open a split of a set of triplets; arguments and errors as `build_dataset`. test: of `fashioniq` alone."""
    if name == "synthetic":
        return synthetic_triplets(split, products if split == "train" else 2 * VAL_PRODUCTS, image_size, seed, progress)
    folder = Path(root or f"data/{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; say with --root where the {name} files are")
    return fashioniq(folder, split, image_size)


FAMILY = 5  # a product, three that differ from it in one or two attributes, and one that is no kin


class SyntheticFamilies(Synthetic):
    """Fronts alone, of products that come in families of FAMILY; a family belongs to one split."""

    def _product(self, index: int) -> Product:
        member = index % FAMILY
        if member in (0, FAMILY - 1):
            return super()._product(index)
        family, rng = [super()._product(index - member)], self._rng(3, index - member)
        while len(family) <= member:
            product = vary(family[0], rng)
            if self._owns(product) and product.attributes() not in [kin.attributes() for kin in family]:
                family.append(product)
        return family[member]

    def _views(self, index: int) -> list[str]:
        return ["front"]


def vary(product: Product, rng: np.random.Generator) -> Product:
    """A product that differs in one or two attributes, of those that a photo of the front shows."""
    garment, kinds = GARMENTS[product.garment], ["colour", "pattern", "detail"]
    kinds += ["sleeve"] * (len(garment.sleeves) > 1) + ["neck"] * (len(garment.necks) > 1)
    for kind in rng.permutation(kinds)[: int(rng.integers(1, 3))].tolist():
        product = _changed(product, kind, rng)
    return replace(product, marked_caption=product._describe(rng))


def _changed(product: Product, kind: str, rng: np.random.Generator) -> Product:
    garment, details = GARMENTS[product.garment], product.details
    used = {product.colour, *(product.pattern or ())[1:], *(colour for _, colour, _ in details)}
    free = tuple(colour for colour in COLOURS if colour not in used)
    if kind == "colour":
        colour = _pick(rng, free)
        repainted = tuple((key, colour if key == "pocket" else ink, shape) for key, ink, shape in details)
        return replace(product, colour=colour, details=repainted)
    if kind == "pattern":
        others = tuple(name for name in PATTERNS if not product.pattern or name != product.pattern[0])
        plain = product.pattern is not None and rng.random() < 0.5
        return replace(product, pattern=None if plain else (_pick(rng, others), _pick(rng, free)))
    if kind == "neck":
        return replace(product, neck=_pick(rng, tuple(neck for neck in garment.necks if neck != product.neck)))
    if kind == "sleeve":
        sleeve = _pick(rng, tuple(sleeve for sleeve in garment.sleeves if sleeve != product.sleeve))
        return replace(product, sleeve=sleeve, details=tuple(d for d in details if d[0] != "cuffs" or sleeve == "long"))
    there = {key for key, _, _ in details}
    barred = there | ({"cuffs"} if product.sleeve != "long" else set())
    barred |= {"buttons", "zip"} if there & {"buttons", "zip"} else set()
    gone = tuple(key for key in sorted(there) if "front" in DETAILS[key][1])
    new = tuple(key for key in garment.details.split() if "front" in DETAILS[key][1] and key not in barred)
    if gone and (not new or rng.random() < 0.5):
        lost = _pick(rng, gone)
        return replace(product, details=tuple(detail for detail in details if detail[0] != lost))
    if not new:
        return product
    key = _pick(rng, new)
    ink = product.colour if key == "pocket" else _pick(rng, free)
    return replace(
        product, details=tuple(sorted((*details, (key, ink, _pick(rng, GRAPHICS) if key == "badge" else ""))))
    )


def difference(product: Product, other: Product, rng: np.random.Generator) -> str:
    """What to say to get from one product of a family to another: "is red instead of navy and has long sleeves"."""
    said = []
    if other.colour != product.colour:
        said.append(_pick(rng, (f"is {other.colour} instead of {product.colour}", f"is {other.colour}")))
    if other.pattern != product.pattern:
        kind, ink = other.pattern or product.pattern
        said.append(f"has {'' if other.pattern else 'no '}{ink} {PATTERNS[kind][1].lower()}")
    if other.sleeve != product.sleeve:
        said.append("is sleeveless" if other.sleeve == "sleeveless" else f"has {other.sleeve} sleeves")
    if other.neck != product.neck:
        said.append(f"has {NECKS[other.neck][0].lower()}")
    mine, theirs = ({key: (ink, shape) for key, ink, shape in p.details} for p in (product, other))
    for key in sorted(mine.keys() ^ theirs.keys()):
        ink, shape = theirs.get(key) or mine[key]
        words = DETAILS[key][0][1].replace("COLOUR", ink).replace("SHAPE", shape)
        said.append(f"has {'' if key in theirs else 'no '}{words.replace('{', '').replace('}', '').lower()}")
    return " and ".join(rng.permutation(said).tolist())


def synthetic_triplets(split: Split, products: int, image_size: int, seed: int = 0, progress: bool = True) -> Triplets:
    """From the first product of each family to its variants and back."""
    photos = SyntheticFamilies(split, products, image_size, seed, progress)
    pairs = []
    for first in range(0, products - FAMILY + 1, FAMILY):
        pairs += [pair for v in range(first + 1, first + FAMILY - 1) for pair in ((first, v), (v, first))]
    if not pairs:
        raise DataError(f"--products {products}: no whole family of {FAMILY} products; give more")
    texts = [
        difference(photos.products[a], photos.products[b], photos._rng(4, number))
        for number, (a, b) in enumerate(pairs)
    ]
    references, targets = zip(*pairs, strict=True)
    return Triplets(
        photos, references, targets, texts, ["synthetic"] * len(pairs), [a // FAMILY for a in references],
        {"synthetic": list(range(products))},
    )  # fmt: skip


class PhotoFiles(PhotoDataset):
    """Photos by name, without text."""

    def __init__(self, paths: dict[str, Path], image_size: int):
        self.names, self.paths = list(paths), list(paths.values())
        blank = [""] * len(paths)
        super().__init__(blank, self.names, blank, blank, image_size)

    def versions(self) -> list[str]:
        return [_version(path) for path in self.paths]

    def photo(self, row: int) -> Image.Image:
        """The photo of a name."""
        return open_photo(self.paths[row], self.image_size)

    def name_of(self, row: int) -> str:
        return self.names[row]


FASHIONIQ = ("dress", "shirt", "toptee")


def fashioniq(folder: Path, split: Literal["train", "val", "test"], image_size: int) -> Triplets:
    """FashionIQ (Wu et al. 2021) as distributed: `captions/cap.{dress,shirt,toptee}.{split}.json`,
    `image_splits/split.….json`, `images/{id}.jpg` or `.png`.

    Both captions of a pair are joined by "and" (choice: in their order). Photos that are not there are named and
    counted, with the queries that need them. The test split has no targets.
    """
    files = {path.stem: path for path in sorted((folder / "images").glob("*")) if path.suffix in (".jpg", ".png")}
    listed, pairs, subsets = {}, [], []
    for subset in FASHIONIQ:
        records = _read_list(folder / "captions" / f"cap.{subset}.{split}.json", "one object a pair")
        ids = _read_list(folder / "image_splits" / f"split.{subset}.{split}.json", "one image id an entry")
        keys = ("candidate",) if split == "test" else ("candidate", "target")
        for number, record in enumerate(records):
            fine = isinstance(record, dict) and isinstance(record.get("captions"), list) and record["captions"]
            if not fine or not all(
                isinstance(text, str) for text in [record.get(k) for k in keys] + record["captions"]
            ):
                where = f"{folder}/captions/cap.{subset}.{split}.json entry {number}"
                raise DataError(f"{where}: expected {', '.join(keys)} and captions, a list of texts")
            pairs.append([record[key] for key in keys] + [" and ".join(text.strip() for text in record["captions"])])
            subsets.append(subset)
        if not all(isinstance(name, str) for name in ids):
            raise DataError(f"{folder}/image_splits/split.{subset}.{split}.json: expected a list of image ids")
        listed[subset] = list(dict.fromkeys(ids))
    wanted = dict.fromkeys([name for names in listed.values() for name in names])
    wanted |= dict.fromkeys(name for pair in pairs for name in pair[:-1])
    known = {name: files[name] for name in wanted if name in files}
    row_of = {name: row for row, name in enumerate(known)}
    kept = [number for number, pair in enumerate(pairs) if all(name in known for name in pair[:-1])]
    for subset in FASHIONIQ:
        if not any(subsets[number] == subset for number in kept):
            example = pairs[subsets.index(subset)][0]
            raise DataError(
                f"{folder}/images: no photos of any {split} pair of {subset}; expected {example}.jpg or .png"
            )
    triplets = Triplets(
        PhotoFiles(known, image_size),
        references=[row_of[pairs[number][0]] for number in kept],
        targets=[-1 if split == "test" else row_of[pairs[number][1]] for number in kept],
        texts=[pairs[number][-1] for number in kept],
        subsets=[subsets[number] for number in kept],
        families=[pairs[number][0] for number in kept],
        originals={subset: [row_of[name] for name in names if name in known] for subset, names in listed.items()},
    )
    triplets.problems = [f"no photo {name}" for name in wanted if name not in known]
    if len(kept) < len(pairs):
        triplets.problems.append(f"{len(pairs) - len(kept):,} pairs of photos that are not there")
    return triplets


def _read_list(path: Path, what: str) -> list:
    """A JSON list that is not empty."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; --root must hold FashionIQ's captions, image_splits, images") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: expected a JSON list, {what}")
    return values


# --------------------------------------------------------------------------------- tokenizer and batches

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_tokenizer(
    captions: list[str], vocab_size: int, max_length: int, vocab: str | Path | None = None, frames: bool = False
) -> Tokenizer:
    """A lower-casing WordPiece tokenizer, the same as BERT's: from `vocab` (a BERT `vocab.txt`), otherwise trained
    on `captions`. It adds [CLS] and [SEP], cuts at `max_length` tokens and pads to the longest of a batch.

    frames: the category symbols are tokens too, the last ones, and the words of prompts are whole in the vocabulary.
    """
    if vocab is None:
        prompts = " ".join([DESCRIPTION, DIFFERENCE, "sub", *ATTRIBUTES]).split() if frames else []
        words = _train_vocabulary(captions, vocab_size, list(dict.fromkeys(prompts)))
    else:
        try:
            words = [word.rstrip("\r") for word in Path(vocab).read_text(encoding="utf-8").rstrip("\n").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{vocab}: cannot be read as a vocab.txt ({error})") from None
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise DataError(f"{vocab}: not a BERT vocab.txt, it lacks {', '.join(missing)}")
    if len(set(words)) < len(words):
        raise DataError(f"{vocab}: the same word stands on two lines, {_repeated(words)!r}")
    tokenizer = _bert_style(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    cls, sep, pad = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *(f"[{symbol}]" for symbol in SYMBOLS if frames)])
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=pad, pad_token="[PAD]")
    return tokenizer


def _repeated(words: list[str]) -> str:
    return next(word for i, word in enumerate(words) if word in words[:i])


def word_ids(tokenizer: Tokenizer) -> Tensor:
    """The ids of everything but the special tokens, for random replacements. -> (V',)."""
    special = tokenizer.get_added_tokens_decoder()
    return torch.tensor([i for i in range(tokenizer.get_vocab_size()) if i not in special])


# choice: a few words instead of WordNet, which FashionSAP looks them up in
ANTONYMS = (
    "long short, black white, light dark, wide slim, loose fitted, high low, front back, top bottom, upper lower, "
    "inner outer, left right, full half, round square, thick thin, soft hard, warm cool, matte glossy, single double, "
    "open closed, mini maxi, men women, boys girls, male female, summer winter, spring fall, formal casual, day night"
)
SYNONYMS = (
    "pants trousers, sweater jumper, jacket coat, pattern print, logo emblem, crew round, zip zipper, trim border, "
    "dotted spotted, checked plaid, tee tshirt, grey gray, fall autumn, sneakers trainers, bag purse, shoes footwear, "
    "collar neckline"
)


def word_pairs(tokenizer: Tokenizer, pairs: str) -> Tensor:
    """For each token the one that it forms a pair with in a list such as ANTONYMS, −1 where there is none. -> (V,).

    Only words that are one token count (also where a longer word begins with it); of several pairs the first."""
    table = torch.full((tokenizer.get_vocab_size(),), -1)
    for pair in pairs.split(", "):
        one, other = (tokenizer.token_to_id(word) for word in pair.split())
        for a, b in ((one, other), (other, one)):
            if a is not None and b is not None and table[a] < 0:
                table[a] = b
    return table


def _bert_style(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _train_vocabulary(captions: list[str], size: int, whole: list[str]) -> list[str]:
    """The WordPiece vocabulary of some captions, and of `whole` words, in order of id; the same one every time."""
    tokenizer, texts = _bert_style(WordPiece({"[UNK]": 0}, unk_token="[UNK]")), sorted(set(captions))
    letters = sorted(set("".join(map(tokenizer.normalizer.normalize_str, texts))) - set(" "))
    # The trainer numbers letters inside words in the order of a randomly seeded hash map, and breaks ties between
    # merges by number: listing those letters first, as special tokens, is what makes it reproducible.
    inner = ["##" + letter for letter in letters]
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[*SPECIAL_TOKENS, *inner, *whole], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def encode(tokenizer: Tokenizer, texts: list[Text]) -> list[Encoding]:
    """Token by token, padded to the longest: `word_ids` says of which piece of its text, `offsets` where in it."""
    return tokenizer.encode_batch([list(text) for text in texts], is_pretokenized=True)


TOKEN_KEYS = ("token_ids", "attention_mask", "words")  # what `tokenize` gives, each (B, L), padded with 0


def tokenize(tokenizer: Tokenizer, texts: list[Text]) -> dict[str, Tensor]:
    """-> token_ids, attention_mask (1 = keep) and words (True = may be masked), each (B, L)."""
    encodings = encode(tokenizer, texts)
    return {
        "token_ids": torch.tensor([e.ids for e in encodings]),
        "attention_mask": torch.tensor([e.attention_mask for e in encodings]),
        "words": torch.tensor([[piece is not None and piece % 2 == 1 for piece in e.word_ids] for e in encodings]),
    }


@dataclass
class Collate:
    """Makes a batch of dataset items: `images` uint8 (B, 3, S, S), of triplets also `target_images`, the tokenised
    texts padded to the longest, `product_ids`, `caption_ids`, `rows` (B,), and `unreadable`, the reasons for photos
    left out. Where none is left there are just these last two."""

    tokenizer: Tokenizer

    def __call__(self, items: list[dict | Unreadable]) -> dict:
        good = [item for item in items if isinstance(item, dict)]
        unreadable = [item.reason for item in items if isinstance(item, Unreadable)]
        if not good:
            return {"rows": torch.zeros(0, dtype=torch.long), "unreadable": unreadable}
        targets = [item["target_image"] for item in good if "target_image" in item]
        return {
            "images": torch.stack([item["image"] for item in good]),
            **({"target_images": torch.stack(targets)} if targets else {}),
            **tokenize(self.tokenizer, [item["text"] for item in good]),
            "product_ids": torch.tensor([int(item["product_id"]) for item in good]),
            "caption_ids": torch.tensor([int(item["caption_id"]) for item in good]),
            "rows": torch.tensor([item["row"] for item in good]),
            "unreadable": unreadable,
        }


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on `device`, copied without waiting where memory is pinned."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


# ------------------------------------------------------------------------------------------ augmentation


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), or float in [0, 1] -> float, minus ImageNet's mean and over its deviation."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (images.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def augment(
    images: Tensor,
    min_scale: float = 0.5,
    jitter: float = 0.0,
    generator: torch.Generator | None = None,
    distort: float = 0.0,
) -> Tensor:
    """Random resized crop (area share min_scale … 1, aspect 3/4 … 4/3) and flip of a whole batch, each photo its own.

    images uint8 (B, 3, S, S) -> normalised float (B, 3, S, S), on the same device.
    jitter: strength of random brightness, contrast and saturation; 0 by default, since captions name colours.
    distort: strength of random rotation (30° at 1), shear, blur and noise, which leave colours as they are.
    """
    count, device = len(images), images.device
    draw = lambda low, high: torch.rand(count, device=device, generator=generator) * (high - low) + low
    area, aspect = draw(min_scale, 1.0), torch.exp(draw(np.log(3 / 4), np.log(4 / 3)))
    aspect = aspect.clamp(area, 1 / area)  # or a side would be longer than the photo
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    x, y = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)  # centre of the crop; the photo is [−1, 1]²
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)  # (B, 2, 3)
    if distort > 0:
        angle, shear = draw(-1, 1) * distort * np.pi / 6, draw(-1, 1) * distort / 4
        turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        theta = torch.cat([turn @ theta[:, :, :2], theta[:, :, 2:]], 2)
    points = F.affine_grid(theta, list(images.shape), align_corners=False)
    pixels = F.grid_sample(images.float() / 255, points, mode="bilinear", padding_mode="border", align_corners=False)
    if jitter > 0:
        factor = lambda: draw(1 - jitter, 1 + jitter)[:, None, None, None]
        pixels = pixels * factor()
        pixels = torch.lerp(pixels.mean(dim=(1, 2, 3), keepdim=True), pixels, factor())  # contrast
        pixels = torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, factor())  # saturation
        pixels = pixels.clamp(0, 1)
    if distort > 0:
        share = lambda: draw(0, distort)[:, None, None, None]
        pixels = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1), share())  # blur
        noise = torch.randn(pixels.shape, device=device, generator=generator)
        pixels = (pixels + 0.1 * share() * noise).clamp(0, 1)
    return normalise(pixels)


# ---------------------------------------------------------------------------------- FashionGen's own layout


def export_fashiongen(
    folder: Path, items: int, image_size: int = 256, seed: int = 0, together: int = 1, gzip: int | None = None
) -> None:
    """Write `items` synthetic products a split in FashionGen's HDF5 layout (validation: a tenth, at least 8).

    together, gzip: photos in an HDF5 chunk, and the level it is packed with, for trying what that costs to read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, products in (("train", items), ("val", max(8, items // 10))):
        path = folder / FashionGen.FILES[split]
        if path.exists():
            raise DataError(f"{path} exists; give an empty folder")
        dataset = Synthetic(split, products, image_size, seed)
        rows = [(dataset.products[i], i, view) for i, view in dataset.rows]
        text = {
            "input_brand": ["SYNTHETIC"] * len(rows),
            "input_category": dataset.categories,
            "input_composition": ["100% cotton."] * len(rows),
            "input_concat_description": dataset.captions,
            "input_department": ["CLOTHING"] * len(rows),
            "input_description": dataset.captions,
            "input_gender": ["Women" if i % 2 else "Men" for _, i, _ in rows],
            "input_name": [f"{p.colour} {p.garment}".title() for p, _, _ in rows],
            "input_pose": [f"id_gridfs_{dataset._views(i).index(view) + 1}" for _, i, view in rows],
            "input_season": ["SS2018"] * len(rows),
            "input_subcategory": dataset.subcategories,
        }
        with h5py.File(path, "w") as file:
            images = np.stack([np.asarray(photo) for photo in dataset.photos])
            chunk = (min(together, len(images)), image_size, image_size, 3)
            file.create_dataset("input_image", data=images, chunks=chunk, compression=gzip)
            for key, values in text.items():
                file.create_dataset(key, data=np.array([v.encode("iso-8859-1") for v in values])[:, None])
            numbers = {"index": range(len(rows)), "index_2": range(len(rows)), "input_msrpUSD": [100] * len(rows)}
            numbers["input_productID"] = [i for _, i, _ in rows]
            for key, values in numbers.items():
                dtype = np.float64 if key == "input_msrpUSD" else np.int32
                file.create_dataset(key, data=np.array(values, dtype)[:, None])
        print(f"{path}: {dataset.report()}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("data.py", description="Write synthetic items in FashionGen's HDF5 layout.")
    parser.add_argument("command", choices=["export-fashiongen"])
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--items", type=int, default=200, help="training products (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn products (default 0)")
    parser.add_argument("--chunk", type=int, default=1, help="photos in an HDF5 chunk (default 1)")
    parser.add_argument("--gzip", type=int, choices=range(10), help="pack photos, at this level (default: not packed)")
    args = parser.parse_args(argv)
    if min(args.items, args.chunk) < 1:
        parser.error("--items and --chunk: at least 1")
    try:
        export_fashiongen(args.folder, args.items, seed=args.seed, together=args.chunk, gzip=args.gzip)
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
