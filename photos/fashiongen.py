"""FashionGen's two HDF5 files, read as distributed; and synthetic photos written in the same layout."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from photos.dataset import DataError, PhotoDataset, Split, legible
from photos.synthetic import Synthetic

SEASONS = {"SS": "spring summer ", "FW": "fall winter "}


class FashionGen(PhotoDataset):
    """FashionGen (Rostamzadeh et al. 2018) as distributed: one HDF5 file a split, one row a photo.

    Each process opens the file for itself, on its first photo: HDF5 handles do not survive a fork.
    Text is iso-8859-1, in which every byte is a character, so there are no undecodable bytes.
    """

    FILES = {"train": "fashiongen_256_256_train.h5", "val": "fashiongen_256_256_validation.h5"}
    TEXT_KEYS = ("input_description", "input_category", "input_subcategory")
    PROMPT_KEYS = {name: f"input_{name}" for name in ("composition", "gender", "name", "season")}  # if there at all

    def __init__(self, folder: Path, split: Split, image_size: int):
        self.path = folder / self.FILES[split]
        self._handle: tuple[int, h5py.File] | None = None
        with self._reading() as file:
            rows = self._check(file)
            captions, categories, subcategories = (self._text(file, key) for key in self.TEXT_KEYS)
            products = self._read(file["input_productID"]).tolist()
        self.source = [row for row in range(rows) if captions[row]]
        if not self.source:
            raise DataError(f"{self.path}: key input_description: every row is empty")
        chosen = lambda values: [values[row] for row in self.source]
        super().__init__(chosen(captions), chosen(products), chosen(categories), chosen(subcategories), image_size)
        self.problems = [f"row {row}: empty input_description" for row in range(rows) if not captions[row]]

    def report(self) -> str:
        """Also whether the file is packed in a way that makes single photos slow to read."""
        with self._reading() as file:
            images = file["input_image"]
            together, shape = images.chunks[0] if images.chunks else 1, "x".join(map(str, (1, *images.shape[1:])))
        if together == 1:
            return super().report()
        slow = f"an HDF5 chunk is {together} photos, and for one all are read; repack the file once:"
        return f"{super().report()}\n  {slow} h5repack -l input_image:CHUNK={shape} {self.path} NEW"

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file; --root must be the folder that holds {self.path.name}")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise DataError(f"{self.path}: not a whole HDF5 file ({error}); copy it again") from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[h5py.File]:
        """The file, for reading what is beside its photos."""
        with self._open() as file:
            try:
                yield file
            except DataError:
                raise
            except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # h5py's, of a damaged file
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise DataError(f"{self.path}: damaged ({reason}); copy it again") from None

    def _check(self, file: h5py.File) -> int:
        """Count the rows. Raises DataError for a missing key, or a column of another type or length."""
        columns = ["input_productID", *self.TEXT_KEYS]
        for key in ("input_image", *columns):
            if not isinstance(file.get(key), h5py.Dataset):
                raise DataError(f"{self.path}: no key {key} with a column; is it a FashionGen file?")
        images = file["input_image"]
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            found = f"{images.dtype} {images.shape}"
            raise DataError(f"{self.path}: key input_image: expected uint8 (rows, height, width, 3), found {found}")
        if 0 in images.shape:
            raise DataError(f"{self.path}: key input_image: nothing in it, {images.shape}")
        columns += [key for key in self.PROMPT_KEYS.values() if key in file]
        for key in columns:
            if file[key].shape not in ((len(images),), (len(images), 1)):
                raise DataError(f"{self.path}: key {key}: shape {file[key].shape} beside {len(images)} images")
        return len(images)

    def _read(self, column: h5py.Dataset) -> np.ndarray:
        """All values (rows,) of a column."""
        try:
            return np.asarray(column[:]).reshape(-1)
        except (OSError, TypeError, ValueError) as error:
            raise DataError(f"{self.path}: key {column.name}: cannot be read ({error}); copy the file again") from None

    def _text(self, file: h5py.File, key: str) -> list[str]:
        values = self._read(file[key])
        if values.dtype.kind not in "SO" or not all(isinstance(v, bytes) for v in values[:1].tolist()):
            raise DataError(f"{self.path}: key {key} row 0: {values.dtype} where byte strings are expected")
        return [" ".join(legible(value.decode("iso-8859-1")).split()) for value in values.tolist()]

    @functools.cached_property
    def _prompted(self) -> dict[str, list[str]]:
        with self._reading() as file:
            found = {name: self._text(file, key) for name, key in self.PROMPT_KEYS.items() if key in file}
        return {name: [values[row] for row in self.source] for name, values in found.items()}

    def attributes(self, row: int) -> dict[str, str]:
        """Category and sub-category, and of composition, gender, name and season what the file has."""
        known = super().attributes(row) | {name: values[row] for name, values in self._prompted.items()}
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


def export_fashiongen(folder: Path, items: int, image_size: int = 256, seed: int = 0) -> None:
    """Write `items` synthetic products a split in FashionGen's HDF5 layout (validation: a tenth, at least 8)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, products in (("train", items), ("val", max(8, items // 10))):
        path = folder / FashionGen.FILES[split]
        if path.exists():
            raise DataError(f"{path} exists; give an empty folder")
        dataset = Synthetic(split, products, image_size, seed)
        rows = [(dataset.products[i], i, view) for i, view in dataset.rows]
        text = {
            "input_brand": ["SYNTHETIC"] * len(rows),
            "input_category": dataset.categories,
            "input_composition": ["100% cotton."] * len(rows),
            "input_concat_description": dataset.captions,
            "input_department": ["CLOTHING"] * len(rows),
            "input_description": dataset.captions,
            "input_gender": ["Women" if i % 2 else "Men" for _, i, _ in rows],
            "input_name": [f"{p.colour} {p.garment}".title() for p, _, _ in rows],
            "input_pose": [f"id_gridfs_{dataset._views(i).index(view) + 1}" for _, i, view in rows],
            "input_season": ["SS2018"] * len(rows),
            "input_subcategory": dataset.subcategories,
        }
        with h5py.File(path, "w") as file:
            images = np.stack([np.asarray(photo) for photo in dataset.photos])
            file.create_dataset("input_image", data=images, chunks=(1, image_size, image_size, 3))
            for key, values in text.items():
                file.create_dataset(key, data=np.array([v.encode("iso-8859-1") for v in values])[:, None])
            numbers = {"index": range(len(rows)), "index_2": range(len(rows)), "input_msrpUSD": [100] * len(rows)}
            numbers["input_productID"] = [i for _, i, _ in rows]
            for key, values in numbers.items():
                dtype = np.float64 if key == "input_msrpUSD" else np.int32
                file.create_dataset(key, data=np.array(values, dtype)[:, None])
        print(f"{path}: {dataset.report()}")
