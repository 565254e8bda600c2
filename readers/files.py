"""What is read from files: text, JSON, photos."""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from readers.dataset import DataError


def read_json(path: Path) -> object:
    """The value in a JSON file. Raises DataError or OSError."""
    return _parse(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a file with one a line, each with the file and line to name in messages. Raises as `read_json`."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            record = _parse(line, where)
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object")
            yield where, record


def _parse(text: bytes, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # of others, decoding may start another program


def open_image(path: Path, size: int) -> Image.Image:
    """The RGB photo of a file, upright, on white where it is transparent; a JPEG is decoded no larger than needed.
    Raises OSError when it cannot be decoded, is none of FORMATS, or has pixels of more than 8 bits."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.draft("RGB", (size, size))
            if file.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                raise OSError("pixels of more than 8 bits")
            photo = ImageOps.exif_transpose(file)
            if photo.has_transparency_data:
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
            return photo.convert("RGB")
    except Exception as error:  # decoders raise many kinds for damaged files
        raise OSError(f"cannot be decoded: {' '.join(str(error).split())}") from None


class ImageFiles:
    """Image files: `[i]` decodes one of them, see `open_image`."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths = paths
        self.image_size = image_size

    def __getitem__(self, number: int) -> Image.Image:
        return open_image(self.paths[number], self.image_size)
