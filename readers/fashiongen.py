"""FashionGen's two HDF5 files, read as distributed."""

import os
from functools import cache
from pathlib import Path

import h5py
from PIL import Image

from readers.dataset import DataError, PairDataset, Split, printable

FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
PROMPTS = ("composition", "gender", "name", "season")  # columns `input_…`, read where they are there


def fashiongen(folder: Path, split: Split, image_size: int) -> PairDataset:
    """FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row a photo. Rows without a
    description are left out, and reported."""
    path = folder / FILES[split]
    if not path.is_file():
        raise DataError(f"{path}: no such file; --root must be the folder that holds {path.name}")
    try:
        with h5py.File(path, "r") as file:
            count = len(file["input_image"])
            products = file["input_productID"][:].reshape(-1).tolist()
            captions = _text(file["input_description"])
            names = ["category", "subcategory", *(name for name in PROMPTS if f"input_{name}" in file)]
            known = {name: _text(file[f"input_{name}"]) for name in names}
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; is it a FashionGen file?") from None
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a whole HDF5 file ({error}); copy it again") from None
    for name, column in {"productID": products, "description": captions, **known}.items():
        if len(column) != count:
            raise DataError(f"{path}: key input_{name}: {len(column)} rows beside {count} images")
    if "season" in known:  # SS2018, FW2018
        known["season"] = [s.replace("SS", "spring summer ").replace("FW", "fall winter ") for s in known["season"]]
    rows = [row for row, caption in enumerate(captions) if caption]
    if not rows:
        raise DataError(f"{path}: key input_description: every row is empty")
    dataset = PairDataset(
        captions=[captions[row] for row in rows],
        products=[products[row] for row in rows],
        images=Hdf5Images(path),
        image_size=image_size,
        attributes={name: [values[row] for row in rows] for name, values in known.items()},
        names=[f"{path.name} row {row}" for row in range(count)],
        source=rows,
    )
    dataset.problems = [f"row {row}: empty input_description" for row, caption in enumerate(captions) if not caption]
    return dataset


def _text(column: h5py.Dataset) -> list[str]:
    """The texts of a column. FashionGen's are iso-8859-1, in which every byte is a character."""
    return [" ".join(printable(value.decode("iso-8859-1")).split()) for value in column[:].reshape(-1).tolist()]


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
