"""FashionGen's two HDF5 files, read as distributed; and synthetic photos written in the same layout."""

import os
import re
from functools import cache
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from readers.dataset import DataError, PhotoDataset, Split, legible
from readers.synthetic import Synthetic

FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
TEXTS = ("input_description", "input_category", "input_subcategory")
PROMPTS = ("composition", "gender", "name", "season")  # columns `input_…`, read where they are there


def fashiongen(folder: Path, split: Split, image_size: int) -> PhotoDataset:
    """FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row a photo. Rows without a
    description are left out, and reported."""
    path = folder / FILES[split]
    if not path.is_file():
        raise DataError(f"{path}: no such file; --root must be the folder that holds {path.name}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a whole HDF5 file ({error}); copy it again") from None
    with file:
        try:
            prompts = [name for name in PROMPTS if f"input_{name}" in file]
            _check_columns(path, file, [*TEXTS, *(f"input_{name}" for name in prompts)])
            captions = _text(file["input_description"])
            products = file["input_productID"][:].reshape(-1).tolist()
            known = {name: _text(file[f"input_{name}"]) for name in ("category", "subcategory", *prompts)}
        except DataError:
            raise
        except Exception as error:  # h5py raises many kinds for a damaged file
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: damaged ({reason}); copy it again") from None
    rows = [row for row, caption in enumerate(captions) if caption]
    if not rows:
        raise DataError(f"{path}: key input_description: every row is empty")
    if "season" in known:
        known["season"] = [_season(season) for season in known["season"]]
    dataset = PhotoDataset(
        captions=[captions[row] for row in rows],
        products=[products[row] for row in rows],
        images=Hdf5Images(path),
        image_size=image_size,
        known={name: [values[row] for row in rows] for name, values in known.items()},
        names=[f"{path.name} row {row}" for row in range(len(captions))],
        source=rows,
    )
    dataset.problems = [f"row {row}: empty input_description" for row, caption in enumerate(captions) if not caption]
    return dataset


def _check_columns(path: Path, file: h5py.File, texts: list[str]) -> None:
    """Raises DataError for a missing key, or a column of another type or length."""
    for key in ("input_image", "input_productID", *texts):
        if not isinstance(file.get(key), h5py.Dataset):
            raise DataError(f"{path}: no key {key} with a column; is it a FashionGen file?")
    images = file["input_image"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        found = f"{images.dtype} {images.shape}"
        raise DataError(f"{path}: key input_image: expected uint8 (rows, height, width, 3), found {found}")
    for key in ("input_productID", *texts):
        column = file[key]
        if column.shape not in ((len(images),), (len(images), 1)):
            raise DataError(f"{path}: key {key}: shape {column.shape} beside {len(images)} images")
        if key in texts and column.dtype.kind not in "SO":
            raise DataError(f"{path}: key {key}: {column.dtype} where byte strings are expected")


def _text(column: h5py.Dataset) -> list[str]:
    """The texts of a column. FashionGen's are iso-8859-1, in which every byte is a character."""
    return [" ".join(legible(value.decode("iso-8859-1")).split()) for value in column[:].reshape(-1).tolist()]


def _season(season: str) -> str:
    """SS2018 -> spring summer 2018, FW2018 -> fall winter 2018."""
    season = re.sub(r"^SS(?=\d)", "spring summer ", season)
    return re.sub(r"^FW(?=\d)", "fall winter ", season)


class Hdf5Images:
    """The images of a FashionGen file: `[row]` is one of them, at the size it has there."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, row: int) -> Image.Image:
        return Image.fromarray(_opened(self.path, os.getpid())["input_image"][row])


@cache
def _opened(path: Path, _process: int) -> h5py.File:
    """The file, opened by each process for itself: HDF5 handles do not survive a fork."""
    return h5py.File(path, "r")


def export_fashiongen(folder: str | Path, items: int, image_size: int = 256, seed: int = 0) -> None:
    """Write `items` synthetic products a split in FashionGen's HDF5 layout, those of its columns that are read
    (validation: a tenth, at least 8)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, products in (("train", items), ("val", max(8, items // 10))):
        path = folder / FILES[split]
        if path.exists():
            raise DataError(f"{path} exists; give an empty folder")
        dataset = Synthetic(split, products, image_size, seed)
        drawn = [dataset.products[i] for i in dataset.product_ids]
        texts = {
            "input_description": dataset.captions,
            "input_category": dataset.categories,
            "input_subcategory": dataset.subcategories,
            "input_name": [f"{product.colour} {product.garment}".title() for product in drawn],
            "input_gender": ["Women" if i % 2 else "Men" for i in dataset.product_ids],
            "input_composition": ["100% cotton."] * len(dataset),
            "input_season": ["SS2018"] * len(dataset),
        }
        with h5py.File(path, "w") as file:
            images = np.stack([np.asarray(photo) for photo in dataset.photos])
            file.create_dataset("input_image", data=images, chunks=(1, *images.shape[1:]))
            file.create_dataset("input_productID", data=dataset.product_ids.astype(np.int32)[:, None])
            for key, values in texts.items():
                file.create_dataset(key, data=np.array([text.encode() for text in values])[:, None])
        print(f"{path}: {dataset.report()}")
