"""One's own photos: one JSON object a line."""

import contextlib
import hashlib
from pathlib import Path

from PIL import Image

from readers.dataset import DataError, PhotoDataset, Split, legible
from readers.files import open_photo, parse_json, read_text
from readers.prompts import ATTRIBUTES


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
            held_out = _tenth({record["product_id"] for record in records}, seed, path)
            records = [record for record in records if (record["product_id"] in held_out) == (split == "val")]
        if not records:
            raise DataError(f"{path}: no usable line for the {split} split; {'; '.join(problems[:3]) or 'it is empty'}")
        self.images = [record["image"] for record in records]
        self.known = {name: [_value(record.get(name)) for record in records] for name in ATTRIBUTES}
        self.known["name"] = [_value(record.get("name")) or _value(record.get("title")) for record in records]
        captions = [record["caption"] for record in records]
        products = [record["product_id"] for record in records]
        super().__init__(captions, products, self.known["category"], self.known["subcategory"], image_size)
        self.problems = problems
        self.both = []  # products that are to be held out and are trained on
        if own_split and split == "val" and (folder / "train.jsonl").is_file():
            trained = set()
            for line in read_text(folder / "train.jsonl", "").split("\n"):
                with contextlib.suppress(DataError, AttributeError):  # of a line that is wrong training will say so
                    trained.add(str(parse_json(line, "").get("product_id")))
            self.both = [product for product in dict.fromkeys(products) if product in trained]

    def report(self) -> str:
        """Also which held-out products are trained on."""
        if not self.both:
            return super().report()
        named = ", ".join(self.both[:3]) + (", …" if len(self.both) > 3 else "")
        return f"{super().report()}\n  {len(self.both):,} of these products are in train.jsonl too: {legible(named)}"

    def _read(self, path: Path) -> tuple[list[dict], list[str]]:
        hint = "one JSON object a line with image, caption, product_id"
        records, problems = [], []
        for number, line in enumerate(read_text(path, hint).split("\n"), 1):  # a caption may hold other separators
            if not line.strip():
                continue
            record = _parse(f"{path} line {number}", line)
            if not (self.folder / record["image"]).is_file():
                problems.append(f"line {number}: no photo {record['image']}")
            elif not legible(record["caption"]).strip():
                problems.append(f"line {number}: empty caption")
            else:
                records.append(record)
        return records, problems

    def attributes(self, row: int) -> dict[str, str]:
        """What the line says of them."""
        return {name: values[row] for name, values in self.known.items()}

    def photo(self, row: int) -> Image.Image:
        """The photo of a line."""
        return open_photo(self.folder / self.images[row], self.image_size)

    def name_of(self, row: int) -> str:
        return self.images[row]


def _parse(where: str, line: str) -> dict:
    """A line's object; its product_id as text."""
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with image, caption, product_id")
    for key in ("image", "caption"):
        if not isinstance(record.get(key), str):
            raise DataError(f"{where}: field {key} is missing or not text")
    if not isinstance(record.get("product_id"), str | int):
        raise DataError(f"{where}: field product_id is missing, or neither text nor a whole number")
    image = Path(record["image"])
    if image.is_absolute() or ".." in image.parts:
        raise DataError(f"{where}: image {record['image']!r} leaves the folder; use a path relative to it")
    return record | {"product_id": str(record["product_id"])}


def _tenth(products: set[str], seed: int, path: Path) -> set[str]:
    """The products that are held out, chosen by hash."""
    if len(products) == 1:
        raise DataError(f"{path}: one product cannot be split; add more, or a val.jsonl")
    by_hash = sorted(products, key=lambda product: hashlib.sha256(f"{seed}:{product}".encode()).digest())
    return set(by_hash[: max(1, len(products) // 10)])
