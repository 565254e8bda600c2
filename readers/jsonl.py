"""Your own photos: one JSON object a line."""

import contextlib
import hashlib
import unicodedata
from pathlib import Path

from readers.dataset import DataError, PairDataset, Split, clean_text, note_shared_products
from readers.files import ImageFiles, find_image, read_json_lines
from readers.prompts import ATTRIBUTES


def jsonl(folder: Path, split: Split, image_size: int, seed: int = 0) -> PairDataset:
    """Open images that are listed one JSON object a line, in `train.jsonl` and `val.jsonl`.

    Required fields: `image` (a path relative to the folder), `caption`, `product_id`. Optional fields: any of
    ATTRIBUTES; `title` serves as `name`. Without `val.jsonl` a tenth of the products is held out.

    A line whose image is missing or whose caption is empty is left out and reported. Products that are in both files
    are reported.
    Raises OSError where the file cannot be read, DataError where a line is malformed or the split has no usable line.
    """
    has_val = (folder / "val.jsonl").is_file()
    path = folder / (f"{split}.jsonl" if has_val else "train.jsonl")
    records, problems = _read_records(path)
    if not has_val:
        held_out = choose_held_out([record["product_id"] for record in records], seed)
        records = [record for record in records if (record["product_id"] in held_out) == (split == "val")]
    if not records:
        reason = "; ".join(problems[:3]) or "it has too few products, list more"
        raise DataError(f"{path}: no usable line for the {split} split; {reason}")
    image_names = [record["image"] for record in records]
    attributes = {name: [_optional_text(record, name) for record in records] for name in ATTRIBUTES}
    attributes["name"] = [_optional_text(record, "name") or _optional_text(record, "title") for record in records]
    dataset = PairDataset(
        captions=[record["caption"] for record in records],
        products=[record["product_id"] for record in records],
        images=ImageFiles([record["path"] for record in records], image_size),
        image_size=image_size,
        attributes=attributes,
        image_names=image_names,
    )
    dataset.problems = problems
    if has_val and split == "val":
        products = [record["product_id"] for record in records]
        # errors in the training file are reported when training opens it
        with contextlib.suppress(OSError, DataError):
            lines = read_json_lines(folder / "train.jsonl")
            train_products = {clean_text(record.get("product_id")) for _, record in lines}
            dataset.notes = note_shared_products(products, train_products, "train.jsonl")
    return dataset


def _read_records(path: Path) -> tuple[list[dict], list[str]]:
    """Read the lines of a file. Raises as `jsonl`. -> usable records with a `path`, a problem for each other line"""
    records = []
    problems = []
    for location, record in read_json_lines(path):
        for field in ("image", "caption", "product_id"):
            text = clean_text(record.get(field))
            if text is None or (field == "product_id" and not text):
                reason = f"field {field} is missing, empty, or neither text nor a whole number"
                raise DataError(f"{location}: {reason}; correct the line")
            record[field] = str(record[field]) if field == "image" else text
        if any(unicodedata.category(letter) == "Cc" for letter in record["image"]):
            raise DataError(f"{location}: field image has a control character; rename the file")
        record["path"] = find_image(path.parent, record["image"])
        line = location.removeprefix(f"{path} ")
        if not record["path"]:
            problems.append(f"{line}: image {record['image']} is missing")
        elif not record["caption"]:
            problems.append(f"{line}: the caption is empty")
        else:
            records.append(record)
    return records, problems


def choose_held_out(products: list[str], seed: int, share: float = 0.1) -> set[str]:
    """Choose a share of the products for validation, one at least, by a hash of the seed and the product."""
    hashes = {product: hashlib.sha256(f"{seed}:{product}".encode()).digest() for product in products}
    by_hash = sorted(hashes, key=hashes.get)
    return set(by_hash[: max(1, int(len(by_hash) * share))])


def _optional_text(record: dict, field: str) -> str:
    """Read a field that is text or a whole number; "" for anything else."""
    return clean_text(record.get(field)) or ""
