"""Photos with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PhotoDataset
from readers.files import ImageFiles, parse_json, read_text

CaptionedName = Literal["flickr30k", "coco"]


def karpathy(
    folder: Path, name: CaptionedName, split: Literal["train", "val", "test"], image_size: int
) -> PhotoDataset:
    """A row is a photo with one of its captions; what is a product elsewhere is a photo here.

    `dataset_{name}.json`: `images`, each with `filename`, for COCO `filepath` (train2014, val2014), `split` (train and
    restval are trained on, val, test) and `sentences`, whose `raw` is read. Photos lie in `filepath`, or in `images`.
    Photos that are not there and captions without words are left out, and reported.
    """
    path = folder / f"dataset_{name}.json"
    paths, captions, photos, problems = [], [], [], []
    empty = 0
    for file, texts in _read(path, split):
        if not (folder / file).is_file():
            problems.append(f"no photo {file}")
            continue
        for text in texts:
            if text:
                captions.append(text)
                photos.append(len(paths))
            else:
                empty += 1
        paths.append(folder / file)
    if not captions:
        raise DataError(f"{path}: no usable photo of the {split} split; {'; '.join(problems[:3]) or 'it has none'}")
    images = ImageFiles(paths, image_size)
    dataset = PhotoDataset(captions, photos, images, image_size, names=[path.name for path in paths], source=photos)
    dataset.several = True
    dataset.what = "captions"
    dataset.group = "photos"
    dataset.problems = problems
    if empty:
        dataset.dropped = [f"{empty:,} captions without words"]
    return dataset


def _read(path: Path, split: str) -> list[tuple[str, list[str]]]:
    """The photos of a split: file and captions."""
    content = parse_json(read_text(path, "--root must hold it, and the photos"), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: expected a list `images`")
    found = []
    for number, image in enumerate(content["images"]):
        try:
            file = f"{image.get('filepath', 'images')}/{image['filename']}"
            texts = [" ".join(sentence["raw"].split()) for sentence in image["sentences"]]
            own_split = image["split"]
        except (AttributeError, KeyError, TypeError):
            expected = "filename, split, and sentences with a text `raw`"
            raise DataError(f"{path} image {number}: expected {expected}") from None
        if own_split == "restval":
            own_split = "train"
        if own_split == split:
            found.append((file, texts))
    return found
