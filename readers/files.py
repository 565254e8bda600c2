"""What is read from files: JSON and images."""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from readers.dataset import DataError


def read_json(path: Path) -> object:
    """Read the value in a JSON file. Raises OSError where the file cannot be read, DataError where it is not JSON."""
    return _parse(path.read_bytes(), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Read a file of one JSON object a line. Raises OSError and DataError as `read_json`.

    -> for each line that is not empty: where it is, "PATH line NUMBER", for messages; the object
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        record = _parse(line, location)
        if not isinstance(record, dict):
            raise DataError(f"{location}: expected a JSON object in braces; correct the line or delete it")
        yield location, record


def _parse(text: bytes, location: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); correct it, or copy the file again") from None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # decoding others may start another program


def open_image(path: Path, size: int) -> Image.Image:
    """Decode an image file to RGB: upright, and on white where it is transparent.

    size: a JPEG is decoded at a lower resolution, but no side of it gets shorter than `size` pixels
    Raises OSError where the file cannot be decoded, is none of FORMATS, or has pixels of more than 8 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.draft("RGB", (size, size))
            if file.mode.startswith(("I", "F")):  # Pillow would clip the values at 255
                raise OSError("its pixels have more than 8 bits; convert it to 8 bits")
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = " ".join(str(error).split())
        raise OSError(f"cannot be decoded: {reason}") from None


class ImageFiles:
    """A sequence of image files: `[i]` decodes the file `paths[i]` by `open_image`."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths = paths
        self.image_size = image_size

    def __getitem__(self, number: int) -> Image.Image:
        return open_image(self.paths[number], self.image_size)
