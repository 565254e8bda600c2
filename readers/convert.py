r"""From a table of products to a folder that `--data jsonl` reads. The command line is `python data.py convert`.

Templates name the columns of a table (`readers/tables.py`) in braces:

    {id}            the value of the column `id`
    {id[:3]}        a part of the value, as in Python
    {name~id_\d+}   what a regular expression finds in the value: its first group, or all of it if it has no group
"""

import argparse
import filecmp
import hashlib
import json
import os
import re
import shutil
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from readers.dataset import DataError, printable
from readers.jsonl import choose_held_out
from readers.prompts import ATTRIBUTES
from readers.tables import RowError, Table, as_text, read_csv, read_json_table, read_parquet

SPLIT_FILES = ("train.jsonl", "val.jsonl")
WILDCARD = "\0"  # stands for the `*` of a pattern, since a value may hold a `*` of its own
SIGNATURES = {  # first bytes of an image file -> its suffix
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


# ---------------------------------------------------------------- templates

# a column in braces; a regular expression in it may have braces of its own
PLACEHOLDER = re.compile(r"\{((?:[^{}]|\{[^{}]*\})+)\}")
SELECTION = re.compile(r"(?P<column>.+?)(?:\[(?P<start>-?\d*):(?P<stop>-?\d*)\]|~(?P<regex>.+))?", re.DOTALL)


@dataclass
class Column:
    """A column in a template, and the part of its value that is taken."""

    name: str
    part: slice
    regex: re.Pattern | None

    def select(self, value: object) -> str:
        """Return the part of a value that the template takes; "" where the regular expression finds nothing."""
        text = as_text(value)
        if self.regex:
            match = self.regex.search(text)
            if not match:
                return ""
            text = match[1] if self.regex.groups else match[0]
        return (text or "")[self.part]


class Template:
    """A text with columns in braces, as the head of this file explains them.

    flag: the flag that gave it, for messages
    Raises DataError for a text without a column, a brace without its partner, or a malformed regular expression.
    """

    def __init__(self, flag: str, text: str):
        self.flag = flag
        self.text = text
        self.parts: list[str | Column] = []
        for index, piece in enumerate(PLACEHOLDER.split(text)):
            if index % 2:
                self.parts.append(self._parse_column(piece))
            elif "{" in piece or "}" in piece:
                raise DataError(f"{flag} {text}: a brace lacks its partner; write a column as {{name}}")
            elif piece:
                self.parts.append(piece)
        if not self.columns:
            raise DataError(f"{flag} {text}: names no column; write a column in braces, such as {{name}}")

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return [part.name for part in self.parts if isinstance(part, Column)]

    def _parse_column(self, text: str) -> Column:
        selection = SELECTION.fullmatch(text)
        start, stop, regex = selection["start"], selection["stop"], selection["regex"]
        try:
            pattern = re.compile(regex) if regex else None
        except re.error as error:
            raise DataError(f"{self.flag} {self.text}: {regex} is not a regular expression ({error})") from None
        part = slice(int(start) if start else None, int(stop) if stop else None)
        return Column(selection["column"].strip(), part, pattern)

    def fill(self, record: dict) -> str:
        """Replace the columns by the values of a record, in one line; "" where all of them are empty."""
        text = ""
        is_empty = True
        for part in self.parts:
            if isinstance(part, Column):
                value = printable(part.select(record[part.name]))
                is_empty = is_empty and not value.strip()
                text += value
            else:
                text += part
        return "" if is_empty else " ".join(text.split())

    def fill_patterns(self, record: dict) -> list[str]:
        """Fill in the pattern of image files, with WILDCARD for `*`.

        -> several patterns where a column holds a list; none where all columns are empty
        """
        records = [record]
        for name in self.columns:
            if isinstance(record[name], list):
                records = [earlier | {name: item} for earlier in records for item in record[name]]
        patterns = []
        for single in records:
            if not self.fill(single):
                continue
            pattern = ""
            for part in self.parts:
                if isinstance(part, Column):
                    pattern += part.select(single[part.name]).strip().replace(WILDCARD, "")
                else:
                    pattern += part.replace("*", WILDCARD)
            patterns.append(pattern)
        return patterns


# ---------------------------------------------------------------- images


def find_paths(pattern: str) -> list[str]:
    """List the existing paths that a pattern fits, sorted. WILDCARD stands for any characters within a name."""
    if WILDCARD not in pattern:
        return [pattern] if os.path.exists(pattern) else []
    folder, _, name = pattern.rpartition("/")
    paths = []
    for parent in find_paths(folder):
        paths += [f"{parent}/{entry}" for entry in _fitting_names(parent, name)]
    return paths


def _fitting_names(folder: str, name: str) -> list[str]:
    if WILDCARD not in name:
        return [name] if os.path.exists(f"{folder}/{name}") else []
    prefix, *others = name.split(WILDCARD)
    regex = re.compile(".*".join(map(re.escape, [prefix, *others])), re.DOTALL)
    names = _sorted_names(folder)
    fitting = []
    for index in range(bisect_left(names, prefix), len(names)):
        if not names[index].startswith(prefix):
            break
        if regex.fullmatch(names[index]):
            fitting.append(names[index])
    return fitting


@cache
def _sorted_names(folder: str) -> list[str]:
    """List a folder without its hidden files, and keep the list for the next rows."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@dataclass
class Output:
    """The folder that a table is converted to.

    table_folder: the folder of the table; an image keeps its path relative to this folder
    copy: copy image files, instead of linking them where the file system can
    """

    folder: Path
    table_folder: Path
    copy: bool

    def place(self, source: str) -> str:
        """Link or copy an image file to the folder. -> its path in the folder

        Raises DataError where another file has this path, OSError where the file cannot be written.
        """
        path_in_folder = re.sub(r"^(\.\./)+", "", os.path.relpath(source, self.table_folder))
        target = self.folder / path_in_folder
        if target.exists():
            if not target.samefile(source) and not filecmp.cmp(source, target, shallow=False):
                raise DataError(f"{target}: exists already and is not {source}; delete it, or give another --out")
            return path_in_folder
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            try:
                os.link(os.path.realpath(source), target)
                return path_in_folder
            except OSError:  # another file system, or one without hard links
                pass
        shutil.copyfile(source, target)
        return path_in_folder

    def write(self, content: bytes) -> str:
        """Write an image that was in a column, named after a hash of its content. -> its path in the folder

        Raises RowError where it has none of the formats that can be read, OSError where it cannot be written.
        """
        suffix = next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), None)
        if not suffix:
            raise RowError("the column of --image holds no JPEG, PNG, WebP, GIF, BMP or TIFF")
        target = self.folder / "images" / f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_bytes(content)
        return f"images/{target.name}"

    def add_images(self, template: Template, record: dict) -> tuple[list[str], list[str]]:
        """Put the images of a record into the folder. Raises as `place` and `write`.

        template: of --image
        -> their paths in the folder, the patterns that no file fits
        """
        value = record[template.columns[0]]
        contents = value if isinstance(value, list) else [value]
        if len(template.parts) == 1 and any(isinstance(content, bytes) for content in contents):
            return [self.write(content) for content in contents if content], []
        images = []
        missing = []
        for pattern in template.fill_patterns(record):
            if pattern.startswith(("http://", "https://")):
                raise DataError(f"--image: {pattern} is a web address; download the images, and give their files")
            files = [path for path in find_paths(os.path.join(self.table_folder, pattern)) if os.path.isfile(path)]
            images += [self.place(path) for path in files]
            if not files:
                missing.append(pattern.replace(WILDCARD, "*"))
        return images, missing


# ---------------------------------------------------------------- conversion


def convert(table: Table, templates: dict[str, Template], output: Output, val_share: float | None = None) -> str:
    """Write `train.jsonl`, perhaps `val.jsonl`, and the images, which are not decoded.

    A row without an image, a caption or a product is left out. All reasons are written to `left_out.txt`.
    templates: by field, `image`, `caption` and perhaps `product_id` and attributes; without `product_id` every row is
        a product of its own
    val_share: share of the products in `val.jsonl`; None writes no such file
    -> a report of one line
    Raises DataError where a template names an unknown column, no row is usable, or the folder is in use.
    Raises OSError where a file cannot be read or written.
    """
    for name in SPLIT_FILES:
        if (output.folder / name).exists():
            raise DataError(f"{output.folder / name} exists already; give another folder with --out")
    for template in templates.values():
        for name in template.columns:
            if table.columns.count(name) != 1:
                problem = "has no column" if name not in table.columns else "has several columns"
                names = ", ".join(table.columns[:20])
                raise DataError(f"{template.flag}: {table.path} {problem} {name}; its columns are {names}")
    records = []
    problems = list(table.problems)
    _sorted_names.cache_clear()
    for location, values in tqdm(table.rows, "converting", unit=" rows", leave=False, disable=None):
        try:
            fields = {field: template.fill(values) for field, template in templates.items() if field != "image"}
            fields.setdefault("product_id", location)
            for field in ("caption", "product_id"):
                if not fields[field]:
                    raise RowError(f"the {field.removesuffix('_id')} is empty")
            images, missing = output.add_images(templates["image"], values)
        except RowError as error:
            problems.append(f"{location}: {error}")
            continue
        problems += [f"{location}: image {pattern} is missing" for pattern in missing]
        records += [{"image": image} | fields for image in images]
        if not images and not missing:
            problems.append(f"{location}: the image is empty")
    if not records:
        reasons = "; ".join(problems[:3]) or "it has none"
        raise DataError(f"{table.path}: no usable row ({reasons}); check the file, --image and --caption")
    return _write_splits(records, problems, output.folder, val_share)


def _write_splits(records: list[dict], problems: list[str], folder: Path, val_share: float | None) -> str:
    """Write the files of `convert`. -> its report"""
    products = [record["product_id"] for record in records]
    splits = {"train.jsonl": records}
    if val_share is not None:
        held_out = choose_held_out(products, seed=0, share=val_share)
        if len(held_out) == len(set(products)):
            raise DataError(f"--val-share {val_share}: leaves no product for training; give a lower one")
        splits["val.jsonl"] = [record for record in records if record["product_id"] in held_out]
        splits["train.jsonl"] = [record for record in records if record["product_id"] not in held_out]
    for name, part in splits.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in part]
        (folder / name).write_text("".join(lines), encoding="utf-8", errors="replace")
    counts = " and ".join(f"{len(part):,} in {name}" for name, part in splits.items())
    report = f"{folder}: {len(records):,} images of {len(set(products)):,} products, {counts}"
    if problems:
        (folder / "left_out.txt").write_text("".join(f"{printable(problem)}\n" for problem in problems), "utf-8")
        report += f", {len(problems):,} left out ({'; '.join(problems[:3])}), all listed in {folder / 'left_out.txt'}"
    return printable(report)


# ---------------------------------------------------------------- the command line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python data.py convert` to a parser, in place."""
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--csv", type=Path, metavar="FILE", help="table separated by commas, semicolons, tabs or bars")
    table.add_argument("--json", type=Path, metavar="FILE", help="list of objects, object of captions, or JSON lines")
    table.add_argument("--parquet", type=Path, nargs="+", metavar="FILE", help="Parquet files; needs pyarrow")
    template = dict(metavar="TEMPLATE", default=argparse.SUPPRESS)
    help = "image files, relative to the table's folder, such as images/{id}_*.jpg; or a column that holds the images"
    parser.add_argument("--image", required=True, help=help, **template)
    parser.add_argument("--caption", required=True, help="caption, such as {name}. {description}", **template)
    parser.add_argument("--product", help="what views of a product share, such as {id} (default: the row)", **template)
    for name in ATTRIBUTES:
        parser.add_argument(f"--{name}", help=f"{name} of the product, optional", **template)
    default = Path("data/jsonl")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=default, help=f"to write (default {default})")
    parser.add_argument(
        "--val-share", type=float, metavar="SHARE", help="share of the products in val.jsonl (default: no such file)"
    )
    parser.add_argument("--copy", action="store_true", help="copy image files instead of linking them")


def convert_command(flags: argparse.Namespace) -> str:
    """Convert the table that the flags name. -> a report. Raises as `convert` and the readers of tables."""
    if flags.val_share is not None and not 0 < flags.val_share < 1:
        raise DataError(f"--val-share {flags.val_share}: must be between 0 and 1")
    templates = {}
    for name in ("image", "caption", "product", *ATTRIBUTES):
        if name in flags:
            field = "product_id" if name == "product" else name
            templates[field] = Template(f"--{name}", getattr(flags, name))
    columns = {name for template in templates.values() for name in template.columns}
    if flags.csv:
        table = read_csv(flags.csv, columns)
    elif flags.json:
        table = read_json_table(flags.json, columns)
    else:
        table = read_parquet(flags.parquet, columns)
    output = Output(flags.out, table.path.parent, flags.copy)
    report = convert(table, templates, output, flags.val_share)
    return f"{table.note}\n{report}" if table.note else report
