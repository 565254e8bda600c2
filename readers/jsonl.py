"""One's own photos: one JSON object a line."""

import hashlib
from pathlib import Path

from readers.dataset import DataError, PhotoDataset, Split, first_three, legible
from readers.files import ImageFiles, parse_json, read_text
from readers.prompts import ATTRIBUTES


def jsonl(folder: Path, split: Split, image_size: int, seed: int = 0) -> PhotoDataset:
    """Photos listed one JSON object a line: `image` (relative to the folder), `caption`, `product_id`, and if you
    have them `category` and `subcategory`, and for prompts any other of ATTRIBUTES (`title` serves as `name`). Files
    `train.jsonl` and `val.jsonl`; without the latter a tenth of the products, chosen by hash, is held out.

    A malformed line, or a path that leaves the folder, refuses the file: it is not what it seems. A missing
    photo or an empty caption leaves out that line only, and is reported.
    """
    has_val = (folder / "val.jsonl").is_file()
    path = folder / (f"{split}.jsonl" if has_val else "train.jsonl")
    records, problems = _read(path)
    products = [record["product_id"] for record in records]
    if not has_val:
        held_out = _tenth(set(products), seed, path)
        records = [record for record in records if (record["product_id"] in held_out) == (split == "val")]
    if not records:
        raise DataError(f"{path}: no usable line for the {split} split; {'; '.join(problems[:3]) or 'it is empty'}")
    names = [record["image"] for record in records]
    products = [record["product_id"] for record in records]
    known = {name: [_value(record.get(name)) for record in records] for name in ATTRIBUTES}
    known["name"] = [_value(record.get("name")) or _value(record.get("title")) for record in records]
    dataset = PhotoDataset(
        captions=[record["caption"] for record in records],
        products=products,
        images=ImageFiles([folder / name for name in names], image_size),
        image_size=image_size,
        known=known,
        names=names,
    )
    dataset.problems = problems
    train_path = folder / "train.jsonl"
    if has_val and split == "val" and train_path.is_file():
        trained = {record["product_id"] for record in _read(train_path)[0]}
        both = [product for product in dict.fromkeys(products) if product in trained]
        if both:
            named = legible(first_three(both))
            dataset.notes.append(f"{len(both):,} of these products are in train.jsonl too: {named}")
    return dataset


def _read(path: Path) -> tuple[list[dict], list[str]]:
    """-> the usable lines, the reasons why others are not."""
    records, problems = [], []
    text = read_text(path, "one JSON object a line with image, caption, product_id")
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a caption may hold other separators
        if not line.strip():
            continue
        record = _parse(f"{path} line {number}", line)
        if not (path.parent / record["image"]).is_file():
            problems.append(f"line {number}: no photo {record['image']}")
        elif not legible(record["caption"]).strip():
            problems.append(f"line {number}: empty caption")
        else:
            records.append(record)
    return records, problems


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


def _value(value: object) -> str:
    """An optional field: words or a number, those of a list joined; "" for anything else."""
    if isinstance(value, list):
        values = [_value(part) for part in value]
        return ", ".join(part for part in values if part)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # true, null, NaN
        return ""
    return " ".join(str(value).split())


def _tenth(products: set[str], seed: int, path: Path) -> set[str]:
    """The products that are held out, chosen by hash."""
    if len(products) == 1:
        raise DataError(f"{path}: one product cannot be split; add more, or a val.jsonl")
    by_hash = sorted(products, key=lambda product: hashlib.sha256(f"{seed}:{product}".encode()).digest())
    return set(by_hash[: max(1, len(products) // 10)])
