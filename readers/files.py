"""What is read from files: text, JSON, photos. Whatever is wrong with one is said in one line."""

import json
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from readers.dataset import DataError


def parse_json(text: str, where: str) -> object:
    """The value that a JSON text holds. Raises DataError, in one line, also for what Python will not read: nested
    ten thousand deep, or numbers of thousands of digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def read_text(path: Path, hint: str) -> str:
    """The text of a file. Raises DataError, with a hint when it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # of others, decoding may start another program


def open_photo(path: Path, size: int) -> Image.Image:
    """The RGB photo of a file, upright, on white where it is transparent; a JPEG is decoded no larger than needed.

    Raises OSError when it cannot be decoded, is none of FORMATS, or has pixels of more than 8 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.draft("RGB", (size, size))
            if file.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                raise OSError("pixels of more than 8 bits")
            photo = ImageOps.exif_transpose(file)
            if photo.has_transparency_data:
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
            return photo.convert("RGB")
    except UnidentifiedImageError:
        raise OSError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(reason.splitlines()[0]) from None


class ImageFiles:
    """Image files: `[i]` decodes one of them, see `open_photo`."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths = paths
        self.image_size = image_size

    def __getitem__(self, number: int) -> Image.Image:
        return open_photo(self.paths[number], self.image_size)
