"""A .csv file: a sample in each row, its class in one column, numbers in the others."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.inputs import arranged
from revdistill.outer.roles import TRAIN
from revdistill.outer.source import Origin, Part, Read, Source, joined

DELIMITERS = ",;\t"
Row = tuple[int, list[str]]  # the line where it ends, and its cells


def load_csv(path: Path, column: str | None = None) -> Source:
    """The samples of a table.

    The first line is a header where no cell of it is a number.

    Args:
        path: of the file: UTF-8, with commas, semicolons or tabs between the cells.
        column: that holds the class, by its name in the header, or by its number, from 1 on; None for the last one.

    Raises:
        ArtifactError: names the file, and the line and column of what is wrong with it.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise ArtifactError(f"{path}: has no rows")
    at, names = _header(path, first, column)
    values, labels = array("d"), []
    for line, cells in _data_rows(first, rows, is_header=bool(names)):
        if len(cells) != len(first[1]):
            raise ArtifactError(f"{path}: line {line} has {len(cells)} cells, but line {first[0]} has {len(first[1])}")
        label = cells.pop(at).strip()
        if not label:
            raise ArtifactError(f"{path}: line {line} has no class in column {_named(at, names)}")
        labels.append(label)
        try:
            numbers = [float(cell) for cell in cells]
            fine = all(map(math.isfinite, numbers))
        except ValueError:
            fine = False
        if not fine:
            raise _not_a_number(path, line, cells, at, names)
        values.extend(numbers)
    if not labels:
        raise ArtifactError(f"{path}: has a header, but no rows after it")
    x = np.frombuffer(values, np.float64).reshape(len(labels), -1)
    label_name = f"column {_named(at, names)}"
    part = Part(arranged(str(path), x, ""), np.array(labels), str(path), label_name)
    read = (
        Read("the other columns", "training inputs", x.shape, "numbers"),
        Read(label_name, "training labels", (len(labels),), "texts"),
    )
    header = "the first line is a header" if names else "there is no header: the first line is a sample"
    return joined(path, {TRAIN: part}, Origin(read, (), (f"the class is in {label_name}; {header}",)))


def _rows(path: Path) -> Iterator[Row]:
    """Rows that are not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.readline()
            delimiter = max(DELIMITERS, key=start.count)  # a comma where there is none
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path}: cannot be read as a table ({error})") from error


def _data_rows(first: Row, rows: Iterator[Row], *, is_header: bool) -> Iterator[Row]:
    if not is_header:
        yield first[0], list(first[1])
    yield from rows


def _header(path: Path, first: Row, column: str | None) -> tuple[int, list[str]]:
    """The position of the class's column, and the columns' names; none where the first row is a sample."""
    cells = [cell.strip() for cell in first[1]]
    if len(cells) < 2:
        raise ArtifactError(f"{path}: has one column; accepted are at least two, one of them the class")
    names = [] if any(map(_is_number, cells)) else _checked_names(path, cells)
    if column is None:
        return len(cells) - 1, names
    if column in names:
        return names.index(column), names
    if column.isdecimal() and 1 <= int(column) <= len(cells):
        return int(column) - 1, names
    accepted = ", ".join(names) if names else "no names, as the first line has numbers in it and so is no header"
    raise ArtifactError(f"{path}: has no column {column!r}; accepted are {accepted}, or 1 to {len(cells)}")


def _checked_names(path: Path, names: list[str]) -> list[str]:
    for i, name in enumerate(names):
        if not name:
            raise ArtifactError(
                f"{path}: the header has no name for column {i + 1}; where pandas wrote its index there, leave it out "
                "(to_csv(..., index=False)): it is no feature"
            )
        if names.index(name) != i:
            raise ArtifactError(f"{path}: the header has two columns {name!r}")
    return names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _named(at: int, names: Sequence[str]) -> str:
    return repr(names[at]) if names else str(at + 1)


def _not_a_number(path: Path, line: int, cells: list[str], at: int, names: Sequence[str]) -> ArtifactError:
    for i, cell in enumerate(cells):
        if not _is_number(cell) or not math.isfinite(float(cell)):
            where = _named(i + (i >= at), names)
            what = f"is {cell.strip()[:40]!r}, which is no finite number" if cell.strip() else "is missing"
            header = " (a header has no numbers in it)" if line == 1 else ""
            return ArtifactError(
                f"{path}: line {line}, column {where} {what}; accepted are numbers in every column but the class's, "
                f"which is column {_named(at, names)}{header}"
            )
    raise AssertionError("unreachable")
