"""Photos with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PairDataset, ReportedSplit
from readers.files import ImageFiles, read_json

CaptionedName = Literal["flickr30k", "coco"]


def karpathy(folder: Path, name: CaptionedName, split: ReportedSplit, image_size: int) -> PairDataset:
    """A row is a photo with one of its captions; what is a product elsewhere is a photo here.

    `dataset_{name}.json`: `images`, each with `filename`, for COCO `filepath` (train2014, val2014), `split` (train and
    restval are trained on, val, test) and `sentences`, whose `raw` is read. Photos lie in `filepath`, or in `images`.
    Photos that are not there are left out, and reported.
    """
    path = folder / f"dataset_{name}.json"
    content = read_json(path)
    paths, captions, photos, problems = [], [], [], []
    try:
        for image in content["images"]:
            own_split = "train" if image["split"] == "restval" else image["split"]
            if own_split != split:
                continue
            file = folder / image.get("filepath", "images") / image["filename"]
            if not file.is_file():
                problems.append(f"no photo {file.relative_to(folder)}")
                continue
            texts = [" ".join(sentence["raw"].split()) for sentence in image["sentences"]]
            texts = [text for text in texts if text]
            captions += texts
            photos += [len(paths)] * len(texts)
            paths.append(file)
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: expected images with filename, split, and sentences with a text raw") from None
    if not captions:
        raise DataError(f"{path}: no usable photo of the {split} split; {'; '.join(problems[:3]) or 'it has none'}")
    images = ImageFiles(paths, image_size)
    dataset = PairDataset(captions, photos, images, image_size, names=[path.name for path in paths], source=photos)
    dataset.several_captions = True
    dataset.row_noun = "captions"
    dataset.product_noun = "photos"
    dataset.problems = problems
    return dataset
