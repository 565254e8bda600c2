"""Images with several captions each: Flickr30k and COCO in the splits of Karpathy & Fei-Fei (2015)."""

from pathlib import Path
from typing import Literal

from readers.dataset import DataError, PairDataset, ReportedSplit, clean_text
from readers.files import ImageFiles, find_image, read_json

CaptionedName = Literal["flickr30k", "coco"]


def karpathy(folder: Path, name: CaptionedName, split: ReportedSplit, image_size: int) -> PairDataset:
    """Open Flickr30k or COCO. A row is an image with one of its captions; each image counts as a product.

    `dataset_{name}.json` holds `images`, each with `filename`, for COCO `filepath` (train2014, val2014), `split`, and
    `sentences`, whose `raw` is read. The train split includes `restval`. Images lie in `filepath`, or in `images`.

    Images that are missing are left out and reported, empty captions are counted.
    Raises OSError where the file cannot be read, DataError where it is malformed or the split has no usable image.
    """
    path = folder / f"dataset_{name}.json"
    content = read_json(path)
    image_paths = []
    captions = []
    image_index = []  # of each caption
    problems = []
    empty_captions = 0
    try:
        for image in content["images"]:
            image_split = "train" if image["split"] == "restval" else image["split"]
            if image_split != split:
                continue
            image_name = Path(image.get("filepath", "images")) / image["filename"]
            image_path = find_image(folder, str(image_name))
            if not image_path:
                problems.append(f"image {image_name} is missing")
                continue
            for sentence in image["sentences"]:
                caption = clean_text(sentence["raw"])
                if caption:
                    captions.append(caption)
                    image_index.append(len(image_paths))
                else:
                    empty_captions += 1
            image_paths.append(image_path)
    except (AttributeError, KeyError, TypeError):
        fields = "filename, split, and sentences with a text raw"
        raise DataError(f"{path}: expected images with {fields}; give the file as distributed") from None
    if not captions:
        reason = "; ".join(problems[:3]) or ("all captions are empty" if empty_captions else "the file lists none")
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
    if empty_captions:
        dataset.notes = [f"empty captions: {empty_captions:,}"]
    return dataset
