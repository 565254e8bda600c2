r"""From a table of products to a folder that `--data jsonl` reads. The command line is `python data.py convert`.

A template is a text with columns of the table in braces, and perhaps a format of Python behind a colon:

    {id}            the value of the column `id`
    {id:.3}         its first three characters
    {id:0>10}       the value with zeros in front, ten characters long
    {name:~id_\d+}  what a regular expression finds in the value: its first group, or all of it if it has no group
"""

import argparse
import contextlib
import csv
import filecmp
import fnmatch
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter

from PIL import Image
from tqdm import tqdm

from readers.dataset import DataError, clean_text, printable
from readers.files import FORMATS, explain_failure, find_image, read_json, read_json_lines, read_text
from readers.prompts import ATTRIBUTES

# ---------------------------------------------------------------- tables
# Every reader returns the rows of a table: where a row is, such as "line 7", and its values by column.


def read_csv(path: Path, problems: list[str]) -> Iterator[tuple[str, dict]]:
    """Read a table whose values are separated by commas, semicolons, tabs or bars, and perhaps quoted.

    problems: a message is added for each row that is left out, since it lacks values, has too many, or a stray quote
    Raises OSError where the file cannot be read, DataError where it is not text or a quote is not closed.
    """
    text = _decode(path)
    first_line = text.lstrip("\n ").partition("\n")[0]
    separator = max(",;\t|", key=first_line.count)
    # unless it is strict, a quote that is never closed swallows all further rows without an error
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
    columns: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            if reader.line_num > start:
                reason = f"the row ends in line {reader.line_num} ({error})"
                raise DataError(f"{path} line {start}: {reason}; close the quote that is open, or remove it") from None
            problems.append(f"line {start}: {error}")
            continue
        if values is None:
            return
        if not columns:
            columns = [name.strip() for name in values]
        elif len(values) == len(columns):
            yield f"line {start}", dict(zip(columns, values))
        elif values:
            problems.append(f"line {start}: {len(values)} values, the header has {len(columns)}")


def _decode(path: Path) -> str:
    """Read a text file as `read_text` does, or in Windows-1252, which extends latin-1. Raises as `read_text`."""
    try:
        return read_text(path)
    except DataError as error:
        content = path.read_bytes()
        letters = content.decode("utf-8", errors="replace")  # U+FFFD where it is not UTF-8
        num_broken = letters.count("\ufffd")
        num_accented = sum(not letter.isascii() for letter in letters) - num_broken
        if num_accented >= num_broken or b"\0" in content:  # damaged UTF-8, a Git LFS pointer, or no text file
            raise
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise error from None
    tqdm.write(f"{path}: read as latin-1 (Windows-1252), since it is not UTF-8")
    return text


def read_json_table(path: Path) -> list[tuple[str, dict]]:
    """Read a list of objects, an object per line, or an object of objects or texts.

    The members of an object become rows with a column `key`; texts stand in a column `value`.
    Raises OSError where the file cannot be read, DataError where it is malformed.
    """
    content = None
    with contextlib.suppress(DataError):  # an object per line, or damaged, which `read_json_lines` reports
        content = None if path.suffix == ".jsonl" else read_json(path)
    if isinstance(content, dict):
        rows = []
        for key, value in content.items():
            columns = value if isinstance(value, dict) else {"value": value}
            rows.append((f"key {key}", {"key": key} | columns))
    else:
        rows = [(location.removeprefix(f"{path} "), record) for location, record in read_json_lines(path)]
    empty_row = {column: None for _, row in rows for column in row}
    return [(location, empty_row | row) for location, row in rows]


def read_parquet(paths: list[Path]) -> Iterator[tuple[str, dict]]:
    """Read Parquet files one part after the other, since their images may need much memory.

    Raises DataError where a file is missing or damaged, or the package pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError("--parquet needs the package pyarrow; install it: pip install pyarrow") from None
    for path in paths:
        number = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
        except (ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            damage = f"not a whole Parquet file ({reason}); check --parquet, or copy it again"
            raise DataError(f"{path}: {explain_failure(path, error, damage)}") from None


# ---------------------------------------------------------------- templates


class Template:
    """A text with columns in braces, as the head of this file explains them.

    Raises DataError for a text without a column, a brace without its partner, or a malformed format.
    """

    def __init__(self, text: str):
        self.text = text
        advice = "write a column in braces, such as {name}"
        try:
            self.parts = list(Formatter().parse(text))  # of each: text before the column, column, its format, _
            self.columns = [column for _, column, _, _ in self.parts if column]
            for _, _, form, _ in self.parts:
                apply_format("x", form or "")
        except (ValueError, re.error) as error:
            raise DataError(f"template {text}: {error}; {advice}") from None
        if not self.columns or any(column == "" for _, column, _, _ in self.parts):
            raise DataError(f"template {text}: names no column; {advice}")

    def fill(self, row: dict, is_pattern: bool = False) -> str:
        """Replace the columns by the values of a row; "" where all of them are empty.

        is_pattern: the text is a pattern of file names, in which a `*` of a value stands for itself
        Raises DataError where a column holds no text.
        """
        filled = ""
        is_empty = True
        for text, column, form, _ in self.parts:
            filled += text
            if column:
                value = as_text(row[column], column)
                value = apply_format(value, form) if value else ""
                filled += glob.escape(value) if is_pattern else value
                is_empty = is_empty and not value
        return "" if is_empty else filled


def apply_format(value: str, form: str) -> str:
    """Apply the format of a template to a value. Raises ValueError or re.error where the format is malformed."""
    if not form.startswith("~"):
        return format(value, form)
    match = re.search(form.removeprefix("~"), value)
    if not match:
        return ""
    return match[1] or "" if match.re.groups else match[0]


def as_text(value: object, column: str) -> str:
    """Write a value of a table in one line; None and NaN are empty, the items of a list are joined by blanks.

    Raises DataError for bytes, objects and lists of lists.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return " ".join(as_text(item, column) for item in value)
    if isinstance(value, bytes | dict | list):
        raise DataError(f"column {column} holds bytes or an object where text is expected; give another column")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables with missing values often hold whole numbers as floats
    return " ".join(printable(str(value)).split())


# ---------------------------------------------------------------- images


class ImageError(ValueError):
    """An image that is left out. The message names the reason."""


@dataclass
class ImageFolder:
    """The folder into which images are put.

    table_folder: the folder of the table; an image keeps its path relative to this folder
    copy: copy image files, instead of linking them where the file system can
    """

    folder: Path
    table_folder: Path
    copy: bool

    def add(self, template: Template, row: dict) -> list[str]:
        """Put the image of a row, or all that a `*` stands for, into the folder. -> their paths in it

        template: of --image
        Raises ImageError where there is none, DataError and OSError as `add_file`.
        """
        content = row[template.columns[0]]
        if isinstance(content, bytes):
            return [self.add_bytes(content)]
        name = template.fill(row)
        if not name:
            raise ImageError("the image is empty")
        if name.startswith(("http://", "https://")):
            raise DataError(f"--image: {name} is a web address; download the images, and give their files")
        files = find_files(template, row, self.table_folder)
        if not files:
            raise ImageError(f"image {name} is missing")
        return [self.add_file(file) for file in files]

    def add_file(self, source: Path) -> str:
        """Link or copy an image file. -> its path in the folder

        Raises DataError where another file has this path, OSError where the file cannot be written.
        """
        path_in_folder = re.sub(r"^(\.\./)+", "", os.path.relpath(source, self.table_folder))
        target = self.folder / path_in_folder
        if target.exists():
            if not filecmp.cmp(source, target, shallow=False):
                raise DataError(f"{target}: exists already and is not {source}; delete it, or give another --out")
            return path_in_folder
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            try:
                target.hardlink_to(source.resolve())  # a link to a symbolic link may lead nowhere
                return path_in_folder
            except OSError:  # another file system, or one without hard links
                pass
        shutil.copyfile(source, target)
        return path_in_folder

    def add_bytes(self, content: bytes) -> str:
        """Write an image that was in a column, named after a hash of its content. -> its path in the folder

        Raises ImageError where it has none of the formats that can be read, OSError where it cannot be written.
        """
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the head, decodes nothing
                suffix = image.format.lower()
        except Exception:  # decoders raise many kinds for damaged files
            raise ImageError(f"the image is none of {', '.join(FORMATS)}") from None
        path_in_folder = f"images/{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
        target = self.folder / path_in_folder
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return path_in_folder


def split_lists(row: dict, columns: list[str]) -> Iterator[dict]:
    """Split a row, in which a column may hold a list of images, into rows of one image.

    An image in the form of Hugging Face, {"bytes": …, "path": …}, becomes its bytes, or its path if it has none.
    """
    choices = []
    for column in columns:
        images = row[column] if isinstance(row[column], list) else [row[column]]
        choices.append([unwrap(image) for image in images or [None]])
    for values in itertools.product(*choices):
        yield dict(zip(columns, values))


def unwrap(image: object) -> object:
    """Return the bytes or the path of an image in the form of Hugging Face; anything else as it is."""
    if isinstance(image, dict) and image.keys() == {"bytes", "path"}:
        return image["bytes"] or image["path"]
    return image


def find_files(template: Template, row: dict, folder: Path) -> list[Path]:
    """Find the file that --image names in a row, or all that a `*` stands for, sorted by name."""
    if "*" not in template.text:
        file = find_image(folder, template.fill(row))
        return [file] if file else []
    pattern = os.path.join(glob.escape(str(folder)), template.fill(row, is_pattern=True))
    parent, name_pattern = os.path.split(pattern)
    files = list_files(parent)
    # a folder may hold 100,000 files: only those are compared that begin as the pattern does
    prefix = re.split(r"[*?[]", name_pattern)[0]
    start = bisect_left(files, (prefix,))
    end = bisect_left(files, (prefix + "\U0010ffff",))
    return [Path(path) for name, path in files[start:end] if fnmatch.fnmatchcase(name, name_pattern)]


@cache
def list_files(parent: str) -> list[tuple[str, str]]:
    """List the files in all folders that a pattern fits, as sorted (name, path); the list serves all rows."""
    paths = glob.glob(os.path.join(parent, "*"))
    return sorted((os.path.basename(path), path) for path in paths if os.path.isfile(path))


# ---------------------------------------------------------------- the command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python data.py convert` to a parser, in place."""
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--csv", type=Path, metavar="FILE", help="table separated by commas, semicolons, tabs or bars")
    table.add_argument("--json", type=Path, metavar="FILE", help="list of objects, object of captions, or JSON lines")
    table.add_argument("--parquet", type=Path, nargs="+", metavar="FILE", help="Parquet files; needs pyarrow")
    help = "image files, relative to the table's folder, such as images/{id}_*.jpg; or a column that holds the images"
    parser.add_argument("--image", required=True, help=help, metavar="TEMPLATE")
    parser.add_argument("--caption", required=True, help="caption, such as {name}. {description}", metavar="TEMPLATE")
    help = "what views of a product share, such as {id} (default: the row)"
    parser.add_argument("--product", dest="product_id", help=help, metavar="TEMPLATE")
    for name in ATTRIBUTES:
        parser.add_argument(f"--{name}", help=f"{name} of the product, optional", metavar="TEMPLATE")
    default = Path("data/jsonl")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=default, help=f"to write (default {default})")
    parser.add_argument("--copy", action="store_true", help="copy image files instead of making hard links")


def convert_command(flags: argparse.Namespace) -> str:
    """Convert the table that the flags name to `train.jsonl` and images, which are not decoded. -> a report of one line

    Rows without an image, a caption or a product are left out, and listed in `left_out.txt`.
    Raises DataError where the table or a template cannot be used, no row is usable, or the folder is in use.
    Raises OSError where a file cannot be read or written.
    """
    target = flags.out / "train.jsonl"
    if target.exists():
        raise DataError(f"{target} exists already; give another folder with --out")
    templates = {}
    for field in ("image", "caption", "product_id", *ATTRIBUTES):
        text = getattr(flags, field)
        if text is not None:
            templates[field] = Template(text)
    columns = {column for template in templates.values() for column in template.columns}
    problems: list[str] = []
    if flags.csv:
        table, rows = flags.csv, read_csv(flags.csv, problems)
    elif flags.json:
        table, rows = flags.json, read_json_table(flags.json)
    else:
        table, rows = flags.parquet[0], read_parquet(flags.parquet)
    images = ImageFolder(flags.out, table.parent, flags.copy)
    records = []
    for location, row in tqdm(rows, "converting", unit=" rows", leave=False, disable=None):
        unknown = ", ".join(sorted(columns - row.keys()))
        if unknown:
            raise DataError(f"{table} {location}: there is no column {unknown}; the columns are {', '.join(row)[:300]}")
        records += convert_row(location, row, templates, images, problems)
    if not records:
        reasons = "; ".join(problems[:3]) or "it has none"
        raise DataError(f"{table}: no usable row ({reasons}); check the file, --image and --caption")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    target.write_text("".join(lines), encoding="utf-8", errors="replace")
    products = {record["product_id"] for record in records}
    report = f"{target}: {len(records):,} images of {len(products):,} products"
    if problems:
        left_out = flags.out / "left_out.txt"
        left_out.write_text("".join(f"{printable(problem)}\n" for problem in problems), encoding="utf-8")
        report += f", {len(problems):,} left out ({'; '.join(problems[:3])}), all listed in {left_out}"
    return printable(report)


def convert_row(
    location: str,
    row: dict,
    templates: dict[str, Template],
    images: ImageFolder,
    problems: list[str],
) -> list[dict]:
    """Convert a row of a table. -> a record for each of its images, which are put into the folder

    templates: by field, `image`, `caption` and perhaps `product_id` and attributes; without `product_id` every row is
        a product of its own
    problems: a message is added for a row or an image that is left out
    Raises as `ImageFolder.add_file`, and DataError where a column holds no text.
    """
    fields = {field: clean_text(template.fill(row)) for field, template in templates.items() if field != "image"}
    fields.setdefault("product_id", location)
    for field in ("caption", "product_id"):
        if not fields[field]:
            problems.append(f"{location}: the {field.removesuffix('_id')} is empty")
            return []
    records = []
    for image_row in split_lists(row, templates["image"].columns):
        try:
            paths = images.add(templates["image"], image_row)
        except ImageError as error:
            problems.append(f"{location}: {error}")
        else:
            records += [{"image": path} | fields for path in paths]
    return records
