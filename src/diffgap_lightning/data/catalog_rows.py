"""Rows of CSV and JSONL files, each with its place, so that a mistake is reported with file, line and field."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Where:
    """A place in a catalog, for error messages."""

    def __init__(self, path: Path, line: int) -> None:
        self.path, self.line = path, line

    def error(self, field: str, message: str) -> ValueError:
        """`file, line 7, field caption: message`."""
        return ValueError(f"{self.path}, line {self.line}, field {field}: {message}")

    def seconds(self, field: str, value: object) -> float:
        """A time in s."""
        try:
            seconds = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            seconds = math.nan
        if not (seconds >= 0 and math.isfinite(seconds)) or isinstance(value, bool):
            raise self.error(field, f"got {value!r}, expected seconds, a number >= 0")
        return seconds

    def word(self, field: str, value: object) -> str:
        """A non-empty string."""
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise self.error(field, f"got {value!r}, expected a non-empty string")
        word = str(value).strip()
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            raise self.error(field, f"got {value!r}, expected text; lone surrogates are no characters")
        return word


def csv_rows(path: Path) -> Iterator[tuple[Where, list[str]]]:
    """Rows that are not blank, with the line each ends on."""
    reader = csv.reader(_text_lines(path))
    try:
        for row in reader:
            if any(value.strip() for value in row):
                yield Where(path, reader.line_num), row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _text_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert it") from error


def csv_objects(
    path: Path, required: tuple[str, ...], any_of: tuple[str, ...] = ()
) -> Iterator[tuple[Where, dict[str, Any]]]:
    """Rows as header name -> value.

    Args:
        path: The CSV file.
        required: Columns that the header must have.
        any_of: Columns of which it must have at least one.
    """
    rows = csv_rows(path)
    where, header = next(rows, (Where(path, 1), []))
    names = [name.strip() for name in header]
    for field in required:
        if field not in names:
            raise where.error(field, f"missing in the header {','.join(names)[:120]!r}")
    if any_of and not set(any_of) & set(names):
        raise where.error(", ".join(any_of), f"none of them in the header {','.join(names)[:120]!r}")
    for where, row in rows:
        if len(row) != len(names):
            field = names[min(len(row), len(names) - 1)]
            raise where.error(field, f"got {len(row)} columns, expected {len(names)}; quote values that hold commas")
        yield where, dict(zip(names, row, strict=True))


def jsonl_objects(path: Path) -> Iterator[tuple[Where, dict[str, Any]]]:
    """JSON objects, one a line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = Where(path, number)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise where.error("(line)", f"not JSON ({error})") from error
            if not isinstance(row, dict):
                raise where.error("(line)", f"got a {type(row).__name__}, expected an object with an id")
            yield where, row
