"""Photos with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from PIL import Image

from photos.dataset import DataError, PhotoDataset
from photos.files import open_photo, parse_json, read_text

CaptionedName = Literal["flickr30k", "coco"]


class Karpathy(PhotoDataset):
    """A row is a photo with one of its captions; what is a product elsewhere is a photo here.

    `dataset_{name}.json`: `images`, each with `filename`, for COCO `filepath` (train2014, val2014), `split` (train and
    restval are trained on, val, test) and `sentences`, whose `raw` is read. Photos lie in `filepath`, or in `images`.
    Photos that are not there and captions without words are left out, and reported.
    """

    several, what = True, "captions"

    def __init__(self, folder: Path, name: CaptionedName, split: Literal["train", "val", "test"], image_size: int):
        path = folder / f"dataset_{name}.json"
        records = [(number, image) for number, image in enumerate(_read(path)) if _split(path, number, image) == split]
        self.paths, captions, photos, problems, empty = [], [], [], [], 0
        for number, image in records:
            file, said = _photo_and_captions(f"{path} image {number}", folder, image)
            if not file.is_file():
                problems.append(f"no photo {file.relative_to(folder)}")
                continue
            empty += sum(not text for text in said)
            self.paths += [file for text in said if text]
            captions += [text for text in said if text]
            photos += [number for text in said if text]
        if not captions:
            raise DataError(f"{path}: no usable photo of the {split} split; {'; '.join(problems[:3]) or 'it has none'}")
        blank = [""] * len(captions)
        super().__init__(captions, photos, blank, blank, image_size)
        self.problems, self.dropped = problems, [f"{empty:,} captions without words"] if empty else []

    def photo(self, row: int) -> Image.Image:
        """The photo of a caption."""
        return open_photo(self.paths[row], self.image_size)

    def name_of(self, row: int) -> str:
        return self.paths[row].name

    def report(self) -> str:
        """One line for the user: captions, photos, what was left out and why."""
        return f"{len(self):,} captions of {self.product_ids.max() + 1:,} photos{self._left_out()}"


def _read(path: Path) -> list:
    whole = parse_json(read_text(path, "--root must hold it, and the photos"), str(path))
    images = whole.get("images") if isinstance(whole, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(f"{path}: expected a list `images`")
    return images


def _split(path: Path, number: int, image: object) -> str:
    split = image.get("split") if isinstance(image, dict) else None
    if split not in ("train", "restval", "val", "test"):
        raise DataError(f"{path} image {number}: split is none of train, restval, val, test")
    return "train" if split == "restval" else split


def _photo_and_captions(where: str, folder: Path, image: dict) -> tuple[Path, list[str]]:
    names, sentences = (image.get("filepath", "images"), image.get("filename")), image.get("sentences")
    if not all(isinstance(name, str) and name.isprintable() and Path(name).name == name != ".." for name in names):
        raise DataError(f"{where}: filename, or filepath, is not a plain name")
    texts = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
    if not texts or len(texts) < len(sentences) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: expected sentences, a list of objects with a text `raw`")
    return folder.joinpath(*names), [" ".join(text.split()) for text in texts]
