"""What is read from files: text, JSON and images."""

import errno
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from readers.dataset import DataError

LFS_START = b"version https://git-lfs.github.com/spec/"  # first bytes of a Git LFS pointer
LFS_ADVICE = "a Git LFS pointer instead of the file; get the file by git lfs pull"


def explain_failure(path: str | Path, error: Exception, damage: str) -> str:
    """Return why a file, other than text, cannot be read, and what to do.

    damage: what to return where the file was read, but its contents are not as expected
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek in a damaged archive
        return f"cannot be read ({os.strerror(error.errno)}); check the path and its permissions"
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_START)) == LFS_START
    return LFS_ADVICE if is_pointer else damage


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Line ends become newlines.

    Raises OSError where the file cannot be read, DataError where it is in another encoding or a Git LFS pointer.
    """
    content = path.read_bytes()
    if content.startswith(LFS_START):
        raise DataError(f"{path}: {LFS_ADVICE}")
    try:
        text = content.decode(json.detect_encoding(content))  # it recognises byte order marks
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> object:
    """Read the value in a JSON file. Raises as `read_text`, and DataError where the file is not JSON."""
    return _parse(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Read a file of one JSON object a line, or a JSON list of such objects. Raises as `read_json`.

    -> for each object: where it is, "PATH line NUMBER" or "PATH item NUMBER", for messages; the object
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, record in enumerate(_parse(text, str(path)), 1):
            yield _check_object(f"{path} item {number}", record)
        return
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip("\ufeff \t")  # files with byte order marks may have been joined
        if line:
            location = f"{path} line {number}"
            yield _check_object(location, _parse(line, location))


def _check_object(location: str, record: object) -> tuple[str, dict]:
    if not isinstance(record, dict):
        raise DataError(f"{location}: expected a JSON object in braces; correct it or delete it")
    return location, record


def _parse(text: str, location: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); correct it, or copy the file again") from None


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_key(name: str | int) -> str:
    """Return the key in `list_images` of an image that a file names. Raises TypeError for another kind of name."""
    if not isinstance(name, str | int):
        raise TypeError("the name of an image must be text or a whole number")
    return unicodedata.normalize("NFC", str(name))  # a Mac writes é as two characters, e and an accent


def list_images(folder: Path) -> dict[str, Path]:
    """List the image files in a folder and up to two levels of folders in it. -> name without suffix -> file"""
    files = {}
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(folder.glob(pattern)):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                files.setdefault(image_key(path.stem), path)
    return files


def find_image(folder: Path, name: str) -> Path | None:
    """Find the image file of this name, with accents as they are written in the name or on the disk.

    -> None where there is none, or where the system refuses the name
    """
    if os.path.isfile(folder / name):  # False also for a name that is too long, or that cannot be encoded
        return folder / name
    path = folder
    for part in Path(name).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        present = [form for form in forms if os.path.exists(path / form)]
        if not present:
            return None
        path = path / present[0]
    return path if path.is_file() else None


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # decoding others may start another program


def open_image(path: Path, size: int) -> Image.Image:
    """Decode an image file to RGB: upright, and on white where it is transparent.

    size: a JPEG is decoded at a lower resolution, but no side of it gets shorter than `size` pixels
    Raises OSError where the file cannot be decoded, is none of FORMATS, or has pixels of more than 8 bits.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("no such image file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            file.draft("RGB", (size, size))
            if file.mode.startswith(("I", "F")):  # Pillow would clip the values at 255
                raise OSError("its pixels have more than 8 bits; convert it to 8 bits")
            try:
                image = ImageOps.exif_transpose(file)
            except Exception:  # a broken EXIF block raises many kinds; the pixels are then read as they are
                image = file
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = " ".join(str(error).split())
        raise OSError(explain_failure(path, error, f"cannot be decoded: {reason}")) from None


class ImageFiles:
    """A sequence of image files: `[i]` decodes the file `paths[i]` by `open_image`."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths = paths
        self.image_size = image_size

    def __getitem__(self, number: int) -> Image.Image:
        return open_image(self.paths[number], self.image_size)
