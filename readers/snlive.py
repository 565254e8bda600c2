"""SNLI-VE's statements about photos of Flickr30k, read as distributed."""

from collections import Counter
from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PhotoDataset
from readers.files import ImageFiles, parse_json, read_text
from readers.statements import LABELS


def snlive(folder: Path, split: Literal["train", "val", "test"], image_size: int) -> PhotoDataset:
    """SNLI-VE (Xie et al. 2019) as distributed: `snli_ve_{train,dev,test}.jsonl`, of whose lines `Flickr30K_ID`,
    `sentence2` and `gold_label` are read; photos `images/{Flickr30K_ID}.jpg`. A row is a statement; its category is
    its label.

    Statements without a gold label (`-`), empty ones, and photos that are not there are counted and left out.
    """
    path = folder / f"snli_ve_{'dev' if split == 'val' else split}.jsonl"
    records, left_out = [], Counter()
    text = read_text(path, "--root must hold SNLI-VE's files and Flickr30k's photos")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        photo, statement, label = _parse(f"{path} line {number}", line)
        if label == "-":
            left_out["without a gold label"] += 1
        elif not statement:
            left_out["without words"] += 1
        else:
            records.append((photo, statement, label))
    if not records:
        raise DataError(f"{path}: no usable line")

    row_of, paths, problems = {}, [], []
    for photo in dict.fromkeys(photo for photo, _, _ in records):
        file = folder / "images" / f"{photo}.jpg"
        if file.is_file():
            row_of[photo] = len(paths)
            paths.append(file)
        else:
            problems.append(f"no photo {photo}.jpg")
    if not paths:
        raise DataError(f"{folder}/images/{records[0][0]}.jpg: no photo of any statement is there")
    kept = [record for record in records if record[0] in row_of]
    if len(kept) < len(records):
        left_out["of photos that are not there"] = len(records) - len(kept)

    rows = [row_of[photo] for photo, _, _ in kept]
    dataset = PhotoDataset(
        captions=[statement for _, statement, _ in kept],
        products=rows,
        images=ImageFiles(paths, image_size),
        image_size=image_size,
        known={"category": [label for _, _, label in kept]},
        names=list(row_of),
        source=rows,
    )
    dataset.what = "statements"
    dataset.group = "photos"
    dataset.problems = problems
    dataset.dropped = [f"{count:,} {why}" for why, count in left_out.items()]
    return dataset


def _parse(where: str, line: str) -> tuple[str, str, str]:
    """-> photo, statement, label."""
    record = parse_json(line, where)
    keys = ("Flickr30K_ID", "sentence2", "gold_label")
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise DataError(f"{where}: expected an object with {', '.join(keys)}, all of them text")
    photo, statement, label = [record[key].strip() for key in keys]
    if label not in (*LABELS, "-"):
        raise DataError(f"{where}: gold_label {label!r} is none of {', '.join(LABELS)}, -")
    return photo, statement, label
