"""FashionGen's two HDF5 files, read as distributed."""

import os
from functools import cache
from pathlib import Path

import h5py
from PIL import Image

from readers.dataset import DataError, PairDataset, Split, printable

FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
OPTIONAL_COLUMNS = ("composition", "gender", "name", "season")  # `input_…`, for prompts


def fashiongen(folder: Path, split: Split, image_size: int) -> PairDataset:
    """Open FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row an image.

    Rows without a caption are left out and reported.
    Raises DataError where the file is missing or damaged, lacks a key, or has columns of unequal length.
    """
    path = folder / FILES[split]
    if not path.is_file():
        raise DataError(f"{path}: no such file; --root must be the folder that holds {path.name}")
    try:
        with h5py.File(path, "r") as file:
            image_count = len(file["input_image"])
            products = file["input_productID"][:].reshape(-1).tolist()
            captions = _read_texts(file["input_description"])
            names = ["category", "subcategory"]
            names += [name for name in OPTIONAL_COLUMNS if f"input_{name}" in file]
            attributes = {name: _read_texts(file[f"input_{name}"]) for name in names}
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; give FashionGen's own file") from None
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a whole HDF5 file ({error}); copy it again") from None
    for name, column in {"productID": products, "description": captions, **attributes}.items():
        if len(column) != image_count:
            raise DataError(f"{path}: key input_{name}: {len(column)} rows, but {image_count} images; copy it again")
    if "season" in attributes:
        attributes["season"] = [_spell_out_season(season) for season in attributes["season"]]
    rows = [row for row, caption in enumerate(captions) if caption]
    if not rows:
        raise DataError(f"{path}: key input_description: every row is empty; give FashionGen's own file")
    dataset = PairDataset(
        captions=[captions[row] for row in rows],
        products=[products[row] for row in rows],
        images=Hdf5Images(path),
        image_size=image_size,
        attributes={name: [values[row] for row in rows] for name, values in attributes.items()},
        image_names=[f"{path.name} row {row}" for row in range(image_count)],
        image_index=rows,
    )
    dataset.problems = [f"row {row}: empty input_description" for row, caption in enumerate(captions) if not caption]
    return dataset


def _read_texts(column: h5py.Dataset) -> list[str]:
    texts = []
    for value in column[:].reshape(-1).tolist():
        text = printable(value.decode("iso-8859-1"))  # FashionGen's encoding; every byte is a character in it
        texts.append(" ".join(text.split()))
    return texts


def _spell_out_season(season: str) -> str:
    """Replace FashionGen's abbreviations by words: SS2018, FW2018."""
    return season.replace("SS", "spring summer ").replace("FW", "fall winter ")


class Hdf5Images:
    """A sequence of the images of a FashionGen file: `[row]` reads one, in the size that it has in the file."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, row: int) -> Image.Image:
        file = _open_in_process(self.path, os.getpid())
        return Image.fromarray(file["input_image"][row])


@cache
def _open_in_process(path: Path, _process_id: int) -> h5py.File:
    """Open a file once in each process, since HDF5 handles do not survive a fork."""
    return h5py.File(path, "r")
