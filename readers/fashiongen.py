"""FashionGen's two HDF5 files, read as distributed; and synthetic photos written in the same layout."""

import os
import re
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from readers.dataset import DataError, PhotoDataset, Split, legible
from readers.synthetic import Synthetic

SEASONS = {"SS": "spring summer ", "FW": "fall winter "}


class FashionGen(PhotoDataset):
    """FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row a photo.

    Each process opens the file for itself, on its first photo: HDF5 handles do not survive a fork.
    """

    FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
    TEXT_KEYS = ("input_description", "input_category", "input_subcategory")
    PROMPT_KEYS = {name: f"input_{name}" for name in ("composition", "gender", "name", "season")}  # if there at all

    def __init__(self, folder: Path, split: Split, image_size: int):
        self.path = folder / self.FILES[split]
        self._handle: tuple[int, h5py.File] | None = None
        with self._open() as file:
            try:
                rows = self._count_rows(file)
                captions, categories, subcategories = (_text(file[key]) for key in self.TEXT_KEYS)
                products = file["input_productID"][:].reshape(-1).tolist()
                known = {name: _text(file[key]) for name, key in self.PROMPT_KEYS.items() if key in file}
            except DataError:
                raise
            except Exception as error:  # h5py raises many kinds for a damaged file
                reason = " ".join(str(error).split())
                raise DataError(f"{self.path}: damaged ({reason}); copy it again") from None
        self.source = [row for row in range(rows) if captions[row]]
        if not self.source:
            raise DataError(f"{self.path}: key input_description: every row is empty")
        super().__init__(*map(self._described, (captions, products, categories, subcategories)), image_size)
        self.known = {name: self._described(values) for name, values in known.items()}
        self.problems = [f"row {row}: empty input_description" for row in range(rows) if not captions[row]]

    def _described(self, values: list) -> list:
        """Of the values of a column, the ones in rows that have a description."""
        return [values[row] for row in self.source]

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; --root must be the folder that holds {self.path.name}")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: not a whole HDF5 file ({error}); copy it again") from None

    def _count_rows(self, file: h5py.File) -> int:
        """Raises DataError for a missing key, or a column of another type or length."""
        for key in ("input_image", "input_productID", *self.TEXT_KEYS):
            if not isinstance(file.get(key), h5py.Dataset):
                raise DataError(f"{self.path}: no key {key} with a column; is it a FashionGen file?")
        images = file["input_image"]
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or 0 in images.shape:
            found = f"{images.dtype} {images.shape}"
            raise DataError(f"{self.path}: key input_image: expected uint8 (rows, height, width, 3), found {found}")
        texts = [*self.TEXT_KEYS, *(key for key in self.PROMPT_KEYS.values() if key in file)]
        for key in ("input_productID", *texts):
            column = file[key]
            if column.shape not in ((len(images),), (len(images), 1)):
                raise DataError(f"{self.path}: key {key}: shape {column.shape} beside {len(images)} images")
            if key in texts and column.dtype.kind not in "SO":
                raise DataError(f"{self.path}: key {key}: {column.dtype} where byte strings are expected")
        return len(images)

    def attributes(self, row: int) -> dict[str, str]:
        """Category and sub-category, and of composition, gender, name and season what the file has."""
        known = super().attributes(row) | {name: values[row] for name, values in self.known.items()}
        season = re.sub(r"^(SS|FW)(?=\d)", lambda half: SEASONS[half[0]], known.get("season", ""))
        return known | {"season": season}

    def photo(self, row: int) -> Image.Image:
        """The photo of a row of the file, at the size it has there."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self._open())
        return Image.fromarray(self._handle[1]["input_image"][self.source[row]])

    def name_of(self, row: int) -> str:
        return f"{self.path.name} row {self.source[row]}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}


def _text(column: h5py.Dataset) -> list[str]:
    """The texts of a column. FashionGen's are iso-8859-1, in which every byte is a character."""
    return [" ".join(legible(value.decode("iso-8859-1")).split()) for value in column[:].reshape(-1).tolist()]


def export_fashiongen(folder: Path, items: int, image_size: int = 256, seed: int = 0) -> None:
    """Write `items` synthetic products a split in FashionGen's HDF5 layout (validation: a tenth, at least 8)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, products in (("train", items), ("val", max(8, items // 10))):
        path = folder / FashionGen.FILES[split]
        if path.exists():
            raise DataError(f"{path} exists; give an empty folder")
        dataset = Synthetic(split, products, image_size, seed)
        rows = [(dataset.products[i], i, view) for i, view in dataset.rows]
        columns = {
            "index": np.arange(len(rows), dtype=np.int32),
            "index_2": np.arange(len(rows), dtype=np.int32),
            "input_brand": ["SYNTHETIC"] * len(rows),
            "input_category": dataset.categories,
            "input_composition": ["100% cotton."] * len(rows),
            "input_concat_description": dataset.captions,
            "input_department": ["CLOTHING"] * len(rows),
            "input_description": dataset.captions,
            "input_gender": ["Women" if i % 2 else "Men" for _, i, _ in rows],
            "input_msrpUSD": np.full(len(rows), 100.0),
            "input_name": [f"{product.colour} {product.garment}".title() for product, _, _ in rows],
            "input_pose": [f"id_gridfs_{dataset._views(i).index(view) + 1}" for _, i, view in rows],
            "input_productID": np.array([i for _, i, _ in rows], dtype=np.int32),
            "input_season": ["SS2018"] * len(rows),
            "input_subcategory": dataset.subcategories,
        }
        with h5py.File(path, "w") as file:
            images = np.stack([np.asarray(photo) for photo in dataset.photos])
            file.create_dataset("input_image", data=images, chunks=(1, image_size, image_size, 3))
            for key, values in columns.items():
                column = np.array([text.encode() for text in values]) if isinstance(values, list) else values
                file.create_dataset(key, data=column[:, None])
        print(f"{path}: {dataset.report()}")
