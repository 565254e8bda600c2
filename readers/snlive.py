"""SNLI-VE's statements about photos of Flickr30k, read as distributed."""

from collections import Counter
from pathlib import Path
from typing import Literal

from readers.dataset import DataError
from readers.files import PhotoFiles, parse_json, read_text
from readers.statements import LABELS, Statements


def snlive(folder: Path, split: Literal["train", "val", "test"], image_size: int) -> Statements:
    """SNLI-VE (Xie et al. 2019) as distributed: `snli_ve_{train,dev,test}.jsonl`, of whose lines `Flickr30K_ID`,
    `sentence2` and `gold_label` are read; photos `images/{Flickr30K_ID}.jpg`.

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
    wanted = {photo: folder / "images" / f"{photo}.jpg" for photo, _, _ in records}
    known = {photo: file for photo, file in wanted.items() if file.is_file()}
    if not known:
        example = next(iter(wanted.values()), None)
        raise DataError(f"{example}: no photo of any statement is there" if example else f"{path}: no usable line")
    kept = [record for record in records if record[0] in known]
    if len(kept) < len(records):
        left_out["of photos that are not there"] = len(records) - len(kept)
    ids, statements, labels = map(list, zip(*kept, strict=True))
    row_of = {photo: row for row, photo in enumerate(known)}
    rows = [row_of[photo] for photo in ids]
    dataset = Statements(PhotoFiles(known, image_size), rows, statements, labels, [""] * len(kept), ids)
    dataset.problems = [f"no photo {photo}.jpg" for photo in wanted if photo not in known]
    dataset.dropped = [f"{count:,} {why}" for why, count in left_out.items()]
    return dataset


def _parse(where: str, line: str) -> tuple[str, str, str]:
    """Photo, statement, label."""
    record = parse_json(line, where)
    keys = "Flickr30K_ID", "sentence2", "gold_label"
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
        raise DataError(f"{where}: expected an object with {', '.join(keys)}, all of them text")
    photo, statement, label = (record[key].strip() for key in keys)
    if label not in (*LABELS, "-"):
        raise DataError(f"{where}: gold_label {label!r} is none of {', '.join(LABELS)}, -")
    return photo, statement, label
