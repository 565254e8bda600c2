"""FashionIQ's captions, image splits and photos, read as distributed."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError
from readers.files import PhotoFiles, parse_json, read_text
from readers.triplets import Triplets

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
        captions = folder / "captions" / f"cap.{subset}.{split}.json"
        for number, record in enumerate(_read_list(captions, "one object a pair")):
            pairs.append(_parse(f"{captions} entry {number}", record, split))
            subsets.append(subset)
        names = folder / "image_splits" / f"split.{subset}.{split}.json"
        listed[subset] = list(dict.fromkeys(map(str, _read_list(names, "one image id an entry"))))
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
        triplets.dropped = [f"{len(pairs) - len(kept):,} pairs of photos that are not there"]
    return triplets


def _parse(where: str, record: object, split: str) -> list[str]:
    """Candidate, target unless it is the test split's, text."""
    keys = ["candidate"] if split == "test" else ["candidate", "target"]
    try:
        names = [record[key] for key in keys]
        texts = [text.strip() for text in record["captions"]]
    except (AttributeError, KeyError, TypeError):
        names, texts = [], []
    if not texts or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: expected {', '.join(keys)} and captions, a list of texts")
    return [*names, " and ".join(filter(None, texts))]


def _read_list(path: Path, what: str) -> list:
    """A JSON list that is not empty."""
    values = parse_json(read_text(path, "--root must hold FashionIQ's captions, image_splits, images"), str(path))
    if not isinstance(values, list) or not values:
        raise DataError(f"{path}: expected a JSON list, {what}")
    return values
