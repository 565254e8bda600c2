"""FashionGen's two HDF5 files, read as distributed."""

import contextlib
import os
import re
from functools import cache
from pathlib import Path

import h5py
from PIL import Image

from readers.dataset import DataError, PairDataset, Split, clean_text, note_shared_products
from readers.files import explain_failure

FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
# keys, without their prefix `input_`; prompts use the optional ones
COLUMNS = ("productID", "description", "category", "subcategory")
OPTIONAL_COLUMNS = ("composition", "gender", "name", "season")


def fashiongen(folder: Path, split: Split, image_size: int) -> PairDataset:
    """Open FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file per split, one row per image.

    Rows without a caption are left out and reported. Products that are in both files are reported.
    Raises DataError where the file is missing, damaged or locked, lacks a key, or has columns of unequal length.
    """
    path = folder / FILES[split]
    if not path.is_file():
        raise DataError(f"{path}: no such file; --root must be the folder that holds {path.name}")
    attributes = _read_columns(path, (*COLUMNS, *OPTIONAL_COLUMNS))
    products = attributes.pop("productID")
    captions = attributes.pop("description")
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
        image_names=[f"{path.name} row {row}" for row in range(len(captions))],
        image_index=rows,
    )
    dataset.problems = [f"row {row}: empty input_description" for row, caption in enumerate(captions) if not caption]
    if split == "val":
        # errors in the training file are reported when training opens it
        with contextlib.suppress(DataError):
            train_products = _read_columns(folder / FILES["train"], ("productID",))["productID"]
            dataset.notes = note_shared_products(products, train_products, FILES["train"])
    return dataset


def _read_columns(path: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Read columns as texts, without those optional ones that are missing. Raises as `fashiongen`."""
    columns = {}
    try:
        with h5py.File(path, "r") as file:
            image_count = len(file["input_image"])
            for name in names:
                key = f"input_{name}"
                if name in OPTIONAL_COLUMNS and key not in file:
                    continue
                rows = getattr(file[key], "size", None) or "no"  # a group has no size
                if rows != image_count:
                    raise DataError(f"{path}: key {key}: {rows} rows, but {image_count} images; copy it again")
                columns[name] = [clean_text(_decode(value)) for value in file[key][...].reshape(-1).tolist()]
                for row, text in enumerate(columns[name]):
                    if text is None or (name == "productID" and not text):
                        reason = f"row {row} is empty, or neither text nor a whole number"
                        raise DataError(f"{path}: key {key}: {reason}; give FashionGen's own file")
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; give FashionGen's own file") from None
    except (OSError, RuntimeError, TypeError) as error:
        reason = explain_failure(path, error, f"not a whole HDF5 file ({error}); copy it again")
        if "unable to lock" in str(error):
            reason = "locked by another process; wait for it, or set HDF5_USE_FILE_LOCKING=FALSE to read without a lock"
        raise DataError(f"{path}: {reason}") from None
    return columns


def _decode(value: object) -> object:
    """Decode bytes: UTF-8, or else cp1252, which FashionGen's own files are in. Other values stay."""
    if not isinstance(value, bytes):
        return value
    text = value.decode(errors="replace")
    damaged = text.count("\ufffd")
    letters = sum(not letter.isascii() for letter in text) - damaged
    if damaged > letters:  # letters of cp1252 beyond ASCII are hardly ever valid UTF-8
        return value.decode("cp1252", errors="replace")
    return text


def _spell_out_season(season: str) -> str:
    """Replace FashionGen's abbreviations by words: SS2018, FW2018."""
    return re.sub("^FW", "fall winter ", re.sub("^SS", "spring summer ", season))


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
