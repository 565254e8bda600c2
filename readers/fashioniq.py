"""FashionIQ's captions, image splits and photos, read as distributed."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PhotoDataset
from readers.files import ImageFiles, parse_json, read_text
from readers.triplets import Triplets

FASHIONIQ = ("dress", "shirt", "toptee")


def fashioniq(folder: Path, split: Literal["train", "val", "test"], image_size: int) -> Triplets:
    """FashionIQ (Wu et al. 2021) as distributed: `captions/cap.{dress,shirt,toptee}.{split}.json`,
    `image_splits/split.….json`, `images/{id}.jpg` or `.png`.

    Both captions of a pair are joined by "and" (choice: in their order). Photos that are not there are named and
    counted, with the queries that need them. The test split has no targets.
    """
    pairs, listed, wanted = [], {}, []
    for subset in FASHIONIQ:
        path = folder / "captions" / f"cap.{subset}.{split}.json"
        for number, record in enumerate(_read_list(path, "one object a pair")):
            names, text = _parse(f"{path} entry {number}", record, split)
            pairs.append((subset, names, text))
        path = folder / "image_splits" / f"split.{subset}.{split}.json"
        listed[subset] = [str(name) for name in _read_list(path, "one image id an entry")]
        wanted += listed[subset]
    wanted = list(dict.fromkeys(wanted))

    files = {}
    for path in sorted((folder / "images").glob("*")):
        if path.suffix in (".jpg", ".png"):
            files[path.stem] = path
    found = [name for name in wanted if name in files]
    row_of = {name: row for row, name in enumerate(found)}
    images = ImageFiles([files[name] for name in found], image_size)
    photos = PhotoDataset([""] * len(found), found, images, image_size, names=found)

    subsets, references, targets, texts = [], [], [], []
    for subset, names, text in pairs:
        rows = [row_of.get(name) for name in names]
        if None in rows:
            continue
        subsets.append(subset)
        references.append(rows[0])
        targets.append(-1 if split == "test" else rows[1])
        texts.append(text)
    originals = {}
    for subset, names in listed.items():
        if subset not in subsets:
            missing = f"no photos of any {split} pair of {subset}; expected {names[0]}.jpg or .png"
            raise DataError(f"{folder}/images: {missing}")
        originals[subset] = [row_of[name] for name in names if name in row_of]

    triplets = Triplets(photos, references, targets, texts, subsets, references, originals)
    triplets.problems = [f"no photo {name}" for name in wanted if name not in files]
    if len(texts) < len(pairs):
        triplets.dropped = [f"{len(pairs) - len(texts):,} pairs of photos that are not there"]
    return triplets


def _parse(where: str, record: object, split: str) -> tuple[list[str], str]:
    """-> candidate and, unless it is the test split's, target; text."""
    keys = ["candidate"] if split == "test" else ["candidate", "target"]
    try:
        names = [record[key] for key in keys]
        texts = [text.strip() for text in record["captions"]]
    except (AttributeError, KeyError, TypeError):
        names, texts = [], []
    if not texts or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: expected {', '.join(keys)} and captions, a list of texts")
    return names, " and ".join(text for text in texts if text)


def _read_list(path: Path, what: str) -> list:
    """A JSON list that is not empty."""
    values = parse_json(read_text(path, "--root must hold FashionIQ's captions, image_splits, images"), str(path))
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: expected a JSON list, {what}")
    return values
