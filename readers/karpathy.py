"""Images with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PairDataset, ReportedSplit
from readers.files import ImageFiles, read_json

CaptionedName = Literal["flickr30k", "coco"]


def karpathy(folder: Path, name: CaptionedName, split: ReportedSplit, image_size: int) -> PairDataset:
    """Open Flickr30k or COCO. A row is an image with one of its captions; each image counts as a product.

    `dataset_{name}.json` holds `images`, each with `filename`, for COCO `filepath` (train2014, val2014), `split`, and
    `sentences`, whose `raw` is read. The train split includes `restval`. Images lie in `filepath`, or in `images`.

    Images that are missing are left out and reported.
    Raises OSError where the file cannot be read, DataError where it is malformed or the split has no usable image.
    """
    path = folder / f"dataset_{name}.json"
    content = read_json(path)
    image_paths = []
    captions = []
    image_index = []  # of each caption
    problems = []
    try:
        for image in content["images"]:
            image_split = "train" if image["split"] == "restval" else image["split"]
            if image_split != split:
                continue
            image_path = folder / image.get("filepath", "images") / image["filename"]
            if not image_path.is_file():
                problems.append(f"image {image_path.relative_to(folder)} is missing")
                continue
            for sentence in image["sentences"]:
                caption = " ".join(sentence["raw"].split())
                if caption:
                    captions.append(caption)
                    image_index.append(len(image_paths))
            image_paths.append(image_path)
    except (AttributeError, KeyError, TypeError):
        fields = "filename, split, and sentences with a text raw"
        raise DataError(f"{path}: expected images with {fields}; give the file as distributed") from None
    if not captions:
        reason = "; ".join(problems[:3]) or "the file lists none"
        raise DataError(f"{path}: no usable image of the {split} split; {reason}")
    dataset = PairDataset(
        captions,
        products=image_index,
        images=ImageFiles(image_paths, image_size),
        image_size=image_size,
        image_names=[image_path.name for image_path in image_paths],
        image_index=image_index,
    )
    dataset.several_captions = True
    dataset.row_noun = "captions"
    dataset.product_noun = "images"
    dataset.problems = problems
    return dataset
