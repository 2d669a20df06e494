"""A .csv file: a sample in each row, its class in one column, numbers in the others."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from revdistill.engine import ArtifactError
from revdistill.outer.inputs import arranged
from revdistill.outer.labels import is_missing
from revdistill.outer.roles import KINDS, LABELS, TRAIN
from revdistill.outer.source import Origin, Part, Read, Source, joined

DELIMITERS = ";\t,"  # where there are as many commas as others, commas are decimal
FEW = 10  # rows that may be in any order by chance
_PADDED = re.compile(r"-?0\d+")  # 09 may well be another class than 9
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
        if is_missing(label):
            raise ArtifactError(
                f"{path}: line {line} has no class in column {_named(at, names)}"
                + (f", but {label!r}" if label else "")
            )
        labels.append(label)
        try:
            numbers = [_number(cell) for cell in cells]
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
    features = [i for i in range(len(first[1])) if i != at]
    for i, own in zip(features, x.T, strict=True):
        _check_no_index(path, _named(i, names), own)
    _check_classes(f"{path}: {label_name}", set(labels))
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
            start = next((line for line in iter(file.readline, "") if line.strip()), "")
            delimiter = max(DELIMITERS, key=start.count)
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
    if not names and len(cells) > 2 and cells in _counted(len(cells)):
        raise ArtifactError(
            f"{path}: the first line is {cells[0]}, {cells[1]}, ..., {cells[-1]}, where pandas writes its columns' "
            "numbers; leave it out (to_csv(..., header=False, index=False)), or give the columns names"
        )
    if column is None:
        _check_last(path, names)
        return len(cells) - 1, names
    if column in names:
        return names.index(column), names
    if column.isdecimal() and 1 <= int(column) <= len(cells):
        return int(column) - 1, names
    accepted = ", ".join(names) if names else "no names, as the first line has numbers in it and so is no header"
    raise ArtifactError(f"{path}: has no column {column!r}; accepted are {accepted}, or 1 to {len(cells)}")


def _counted(count: int) -> tuple[list[str], list[str]]:
    return [str(i) for i in range(count)], [str(i) for i in range(1, count + 1)]


def _check_last(path: Path, names: list[str]) -> None:
    """ArtifactError where another column than the last has the name of a class's."""
    called = [name for name in names if name.lower() == "class" or KINDS.get(name.lower()) == LABELS]
    if "x" in map(str.lower, names):  # x and y are coordinates
        called = [name for name in called if name.lower() != "y"]
    if called and called[-1] != names[-1]:
        raise ArtifactError(
            f"{path}: has a column {called[-1]!r}, but the last one is {names[-1]!r}; say which the class is: "
            f"{path}:{called[-1]} or {path}:{names[-1]}"
        )


def _check_no_index(path: Path, name: str, values: np.ndarray) -> None:
    """ArtifactError where a column counts the rows: of a table sorted by class, it would give the class away."""
    if len(values) >= FEW and values[0] in (0, 1) and np.array_equal(values, values[0] + np.arange(len(values))):
        raise ArtifactError(
            f"{path}: column {name} counts the rows, from {values[0]:.0f} to {values[-1]:.0f}, and so is no feature; "
            "leave it out, or, where it is one, shuffle the rows"
        )


def _check_classes(where: str, labels: set[str]) -> None:
    """ArtifactError where they are measurements instead, or one number in two spellings."""
    if not all(_is_number(label) and math.isfinite(_number(label)) for label in labels):
        return
    fractions = sorted(label for label in labels if _number(label) % 1)
    if fractions:
        raise ArtifactError(
            f"{where} has {fractions[0]!r}; accepted are classes: whole numbers or texts. Another column may be the "
            "class (FILE.csv:COLUMN)"
        )
    spelt: dict[float, str] = {}
    for label in sorted(labels):
        other = spelt.setdefault(_number(label), label)
        if other != label and not any(map(_PADDED.fullmatch, (other, label))):
            raise ArtifactError(f"{where} has {other!r} and {label!r}, which are one number; write it in one way")


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
        _number(cell)
    except ValueError:
        return False
    return True


def _number(cell: str) -> float:
    """float(cell), but for 2019_1, which Python takes for 20191."""
    if "_" in cell:
        raise ValueError(cell)
    return float(cell)


def _named(at: int, names: Sequence[str]) -> str:
    return repr(names[at]) if names else str(at + 1)


def _not_a_number(path: Path, line: int, cells: list[str], at: int, names: Sequence[str]) -> ArtifactError:
    for i, cell in enumerate(cells):
        if not _is_number(cell) or not math.isfinite(_number(cell)):
            where = _named(i + (i >= at), names)
            what = f"is {cell.strip()[:40]!r}, which is no finite number" if cell.strip() else "is missing"
            header = " (a header has no numbers in it)" if line == 1 else ""
            return ArtifactError(
                f"{path}: line {line}, column {where} {what}; accepted are numbers in every column but the class's, "
                f"which is column {_named(at, names)}{header}"
            )
    raise AssertionError("unreachable")
