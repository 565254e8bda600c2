"""Photos with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from PIL import Image

from readers.dataset import DataError, PhotoDataset
from readers.files import open_photo, parse_json, read_text

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
        self.paths, captions, photos, problems, empty = [], [], [], [], 0
        for number, (file, texts) in enumerate(_read(path, split)):
            if not (folder / file).is_file():
                problems.append(f"no photo {file}")
                continue
            for text in texts:
                if not text:
                    empty += 1
                    continue
                self.paths.append(folder / file)
                captions.append(text)
                photos.append(number)
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
            raise DataError(
                f"{path} image {number}: expected filename, split, and sentences with a text `raw`"
            ) from None
        if own_split == split or (own_split, split) == ("restval", "train"):
            found.append((file, texts))
    return found
