"""Tables of products: CSV and TSV, JSON, and Parquet files, read as rows of values by column."""

import codecs
import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from readers.dataset import DataError
from readers.files import read_json, read_json_lines


class RowError(ValueError):
    """A row that is left out. The message names the reason."""


@dataclass
class Table:
    """The rows of one or several files.

    path: the file, or the first one; image patterns are relative to its folder
    columns: names of the columns
    rows: for each row where it is, such as "line 7", and its values by column
    problems: a message for each row that could not be read
    note: how the file was read, where this is not certain
    """

    path: Path
    columns: list[str]
    rows: Iterable[tuple[str, dict]]
    problems: list[str] = field(default_factory=list)
    note: str = ""


def read_csv(path: Path, columns: set[str]) -> Table:
    """Read a table whose values are separated by commas, semicolons, tabs or bars, and perhaps quoted.

    A row that has more or fewer values than the header is a problem, and is left out.
    columns: names that the templates use; the separator is the one with which the header holds most of them
    Raises OSError where the file cannot be read, DataError where it is not text or a quote is not closed.
    """
    text, note = _decode(path)
    separator = max(",;\t|", key=lambda candidate: _fit_of_header(text, candidate, columns))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    header: list[str] = []
    table = Table(path, header, [], note=note)
    while True:
        first_line = lines.line_num + 1
        problem = ""
        try:
            values = next(lines)
        except StopIteration:
            break
        except csv.Error as error:
            problem = str(error)
        else:
            if not header:
                header += [name.strip() for name in values]
                continue
            if values and len(values) != len(header):
                problem = f"{len(values)} values, the header has {len(header)}"
        if problem and lines.line_num > first_line:
            reason = f"the row ends in line {lines.line_num} ({problem})"
            raise DataError(f"{path} line {first_line}: {reason}; close the quote that is open, or remove it")
        if problem:
            table.problems.append(f"line {first_line}: {problem}")
        elif values:
            table.rows.append((f"line {first_line}", dict(zip(header, values))))
    return table


def _fit_of_header(text: str, separator: str, columns: set[str]) -> tuple[int, int]:
    """Count the columns of the templates, and all columns, that the first line has with this separator."""
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return 0, 0
    names = {name.strip() for name in header}
    return len(columns & names), len(names)


def _decode(path: Path) -> tuple[str, str]:
    """Read a text file in UTF-8, UTF-16 with a byte order mark, or Windows-1252, which extends latin-1.

    -> the text, a note where the encoding is a guess
    """
    content = path.read_bytes()
    note = ""
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        if encoding == "utf-16" or not content.decode("utf-8", errors="ignore").isascii():
            raise DataError(f"{path} line {line}: a damaged character; save the file as UTF-8") from None
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {line}: neither UTF-8 nor latin-1; save the file as UTF-8") from None
        note = f"{path}: read as latin-1 (Windows-1252), since it is not UTF-8"
    if "\0" in text:
        raise DataError(f"{path}: holds zero bytes, so it is no text file; save it as CSV in UTF-8")
    return text, note


def read_json_table(path: Path, columns: set[str]) -> Table:
    """Read a list of objects, JSON lines, or an object of objects or texts.

    The members of an object become rows with a column `key`; texts stand in a column `value`.
    columns: names that the templates use
    Raises OSError where the file cannot be read, DataError where it is malformed.
    """
    try:
        content = read_json(path)
    except DataError:
        if path.read_bytes().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise
        rows = [(location.removeprefix(f"{path} "), record) for location, record in read_json_lines(path)]
    else:
        if isinstance(content, dict) and not columns <= content.keys():
            members = []
            for key, value in content.items():
                members.append({"key": key} | (value if isinstance(value, dict) else {"value": value}))
            content = members
        elif isinstance(content, dict):  # JSON lines, but a single one
            content = [content]
        if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
            raise DataError(f"{path}: expected a list of objects, an object of captions, or an object a line")
        rows = [(f"item {number}", record) for number, record in enumerate(content, 1)]
    names = {name: None for _, record in rows for name in record}
    empty = dict.fromkeys(names)
    return Table(path, list(names), [(location, empty | record) for location, record in rows])


def read_parquet(paths: list[Path], columns: set[str]) -> Table:
    """Open Parquet files. Rows are read one part after the other, since their images may need much memory.

    columns: names that the templates use; others are not read
    Raises DataError where a file is missing or damaged, or the package pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("--parquet needs the package pyarrow; install it: pip install pyarrow") from None

    def read_rows() -> Iterator[tuple[str, dict]]:
        """Read the rows of all files in order. Raises DataError for a damaged file."""
        for path, file in files.items():
            number = 0
            try:
                for part in file.iter_batches(batch_size=64, columns=sorted(columns)):
                    for record in part.to_pylist():
                        number += 1
                        yield f"{path.name} row {number}", {name: unwrap(value) for name, value in record.items()}
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise _damaged(path, error) from None

    files = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --parquet")
        try:
            files[path] = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from None
    schemas = [file.schema_arrow.names for file in files.values()]
    in_all_files = [name for name in schemas[0] if all(name in names for names in schemas)]
    return Table(paths[0], in_all_files, read_rows())


def unwrap(value: object) -> object:
    """Return the bytes of an image in Hugging Face's form, {"bytes": …, "path": …}, or its path where it has none."""
    if isinstance(value, list):
        return [unwrap(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or value["path"]
    return value


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path}: not a whole Parquet file ({reason}); copy it again")


def as_text(value: object) -> str:
    """Write a value of a table as text; None and NaN are empty, the items of a list are joined by blanks.

    Raises RowError for bytes and objects.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # tables with missing values often hold whole numbers as floats
    if isinstance(value, list):
        return " ".join(as_text(item) for item in value)
    if isinstance(value, bytes | dict):
        raise RowError("a column of the templates holds bytes or an object, not text")
    return str(value)
