"""One's own photos: one JSON object a line."""

import hashlib
from pathlib import Path

from readers.dataset import DataError, PairDataset, Split, printable
from readers.files import ImageFiles, read_json_lines
from readers.prompts import ATTRIBUTES


def jsonl(folder: Path, split: Split, image_size: int, seed: int = 0) -> PairDataset:
    """Photos listed one JSON object a line: `image` (relative to the folder), `caption`, `product_id`, and if you
    have them `category` and `subcategory`, and for prompts any other of ATTRIBUTES (`title` serves as `name`). Files
    `train.jsonl` and `val.jsonl`; without the latter a tenth of the products, chosen by hash, is held out.

    A malformed line refuses the file. A missing photo or an empty caption leaves out that line, and is reported.
    """
    has_val = (folder / "val.jsonl").is_file()
    path = folder / (f"{split}.jsonl" if has_val else "train.jsonl")
    records, problems = [], []
    for where, record in read_json_lines(path):
        for key in ("image", "caption", "product_id"):
            if not isinstance(record.get(key), str | int):
                raise DataError(f"{where}: field {key} is missing, or neither text nor a whole number")
            record[key] = str(record[key])
        line = where.removeprefix(f"{path} ")
        if not (folder / record["image"]).is_file():
            problems.append(f"{line}: no photo {record['image']}")
        elif not printable(record["caption"]).strip():
            problems.append(f"{line}: empty caption")
        else:
            records.append(record)
    if not has_val:
        products = {record["product_id"] for record in records}
        by_hash = sorted(products, key=lambda product: hashlib.sha256(f"{seed}:{product}".encode()).digest())
        held_out = set(by_hash[: max(1, len(products) // 10)])
        records = [record for record in records if (record["product_id"] in held_out) == (split == "val")]
    if not records:
        why = "; ".join(problems[:3]) or "it has too few products"
        raise DataError(f"{path}: no usable line for the {split} split; {why}")
    names = [record["image"] for record in records]
    known = {name: [_value(record.get(name)) for record in records] for name in ATTRIBUTES}
    known["name"] = [_value(record.get("name")) or _value(record.get("title")) for record in records]
    dataset = PairDataset(
        captions=[record["caption"] for record in records],
        products=[record["product_id"] for record in records],
        images=ImageFiles([folder / name for name in names], image_size),
        image_size=image_size,
        attributes=known,
        names=names,
    )
    dataset.problems = problems
    return dataset


def _value(value: object) -> str:
    """An optional field: text or a whole number; "" for anything else."""
    return " ".join(printable(str(value)).split()) if isinstance(value, str | int) else ""
