"""Tables: with and without a header, the class in any column, and every mistake with its line and column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import revdistill as rd
from revdistill.outer.data import Dataset, load, short_name

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(40, 2)).round(3)
NAMES = np.array(["cat", "dog"])[np.arange(40) % 2]
ROWS = [f"{a},{b},{name}" for (a, b), name in zip(X.tolist(), NAMES, strict=True)]
HEADER = "width,height,animal"


def write(folder: Path, lines: list[str], encoding: str = "utf-8", end: str = "\n") -> str:
    path = folder / "animals.csv"
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    return str(path)


def samples(data: Dataset) -> set[tuple[float, float, str]]:
    mean, std = np.array(data.normalization["mean"]), np.array(data.normalization["std"])
    parts = (("x", "y"), ("x_validation", "y_validation"), ("x_test", "y_test"))
    found = [(row, y) for a, b in parts for row, y in zip(getattr(data, a).numpy(), getattr(data, b), strict=True)]
    return {(*(row * std + mean).round(3).tolist(), str(data.class_names[int(y)])) for row, y in found}


LAST_FIRST = [",".join(np.roll(row.split(","), 1)) for row in ROWS]
QUOTED = ['"' + row.replace(",", '","') + '"' for row in ROWS]
EXPECTED = {(*row, name) for row, name in zip(X.tolist(), NAMES.tolist(), strict=True)}
FORMS: dict[str, tuple[list[str], str, str]] = {
    "a header": ([HEADER, *ROWS], "", "utf-8"),
    "no header": (ROWS, "", "utf-8"),
    "a named column": (
        ["animal,width,height", *(",".join(np.roll(r.split(","), 1)) for r in ROWS)],
        ":animal",
        "utf-8",
    ),
    "a numbered column": (LAST_FIRST, ":1", "utf-8"),
    "a mark of UTF-8": ([HEADER, *ROWS], "", "utf-8-sig"),
    "semicolons": ([r.replace(",", ";") for r in (HEADER, *ROWS)], ":animal", "utf-8"),
    "semicolons after a blank line": (["", *(r.replace(",", ";") for r in (HEADER, *ROWS))], "", "utf-8"),
    "tabs and spaces": ([r.replace(",", " \t ") for r in (HEADER, *ROWS)], ":animal", "utf-8"),
    "blank lines and quotes": (["", '"width","height","animal"', "", *QUOTED], "", "utf-8"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_tables(tmp_path: Path, form: str, end: str) -> None:
    lines, column, encoding = FORMS[form]
    path = write(tmp_path, lines, encoding, end)
    data = load(path + column)
    assert data.name == path + column
    assert data.class_names == ("cat", "dog")
    assert samples(data) == EXPECTED
    is_header = "width" in "".join(lines)
    assert ("is a header" if is_header else "no header") in data.origin.notes[0]
    assert ("'animal'" if is_header else f"column {column[1:] or 3}") in data.origin.notes[0]


def test_whole_numbers_as_classes(tmp_path: Path) -> None:
    rows = [f"{a},{b},{9 + i % 2}" for i, (a, b) in enumerate(X.tolist())]
    assert load(write(tmp_path, rows)).class_names == (9, 10)
    assert load(write(tmp_path, rows) + ":3").class_names == (9, 10)


BAD: dict[str, tuple[list[str], str, str]] = {
    "empty": ([], "", "has no rows"),
    "a header alone": ([HEADER], "", "a header, but no rows"),
    "one column": (["a", "b"], "", "has one column"),
    "a missing value": ([HEADER, *ROWS, ",1,cat"], "", "line 42, column 'width' is missing"),
    "a missing value without a header": ([*ROWS, "1, ,cat"], "", "line 41, column 2 is missing"),
    "a missing value at the start": (
        ["1,,cat", *ROWS],
        "",
        r"line 1, column 2 is missing; .*\(a header has no",
    ),
    "nan": ([HEADER, *ROWS, "1,NaN,cat"], "", "line 42, column 'height' is 'NaN', which is no finite number"),
    "a word": ([HEADER, *ROWS, "1,tall,cat"], "", "column 'height' is 'tall', .*class's, which is column 'animal'"),
    "a word before the class": (
        ["a,b,c", *(f"{n},{i},1" for i, n in enumerate(NAMES))],
        "",
        "line 2, column 'a' is 'cat'",
    ),
    "no class": ([HEADER, *ROWS, "1,2,"], "", "line 42 has no class in column 'animal'"),
    "a short row": ([HEADER, *ROWS, "1,cat"], "", "line 42 has 2 cells, but line 1 has 3"),
    "pandas' index": ([",width,animal", *ROWS], "", r"no name for column 1; .*index=False"),
    "two columns of a name": (["a,a,b", *ROWS], "", "two columns 'a'"),
    "no such column": (
        [HEADER, *ROWS],
        ":species",
        "no column 'species'; accepted are width, height, animal",
    ),
    "no such number": (ROWS, ":4", "no column '4'; accepted are .* 1 to 3"),
    "a name without a header": (ROWS, ":cat", "no column 'cat'; accepted are no names, as the first line has numbers"),
    "an open quote": ([HEADER, *ROWS, '1,2,"cat'], "", "cannot be read as a table"),
    "one class": ([HEADER, *ROWS[::2]], "", "column 'animal' has 1 class"),
    "a class of one sample": (["0,1,animal", *ROWS], "", r"too few .* 1 of 3 classes have one sample \(\['animal'\]\)"),
    "measurements": ([HEADER, *(f"{7 * i % 40},1,{i % 4 / 4}" for i in range(40))], "", "column 'animal' has '0.25'"),
    "a number in two spellings": (
        [HEADER, *(f"{a},{b},{('1', '1.0', '2')[i % 3]}" for i, (a, b) in enumerate(X.tolist()))],
        "",
        "column 'animal' has '1' and '1.0', which are one number",
    ),
    "pandas' missing class": ([HEADER, *ROWS, "1,2,NaN"], "", "line 42 has no class in column 'animal', but 'NaN'"),
    "pandas' numbered columns": (["0,1,2", *(f"{a},{b},{i % 4}" for i, (a, b) in enumerate(X))], "", "is 0, 1, ..., 2"),
    "a column of ids": (["Id," + HEADER, *(f"{i + 1},{r}" for i, r in enumerate(ROWS))], "", "'Id' counts the rows"),
    "a column of ids without a header": ([f"{i},{r}" for i, r in enumerate(ROWS)], "", "column 1 counts the rows"),
    "a label that is not last": (
        ["Label,a,b", *(f"{i % 2},{a},{i % 3}" for i, (a, _) in enumerate(X))],
        "",
        r"has a column 'Label', but the last one is 'b'; say which the class is: .*:Label or .*:b",
    ),
    "no number": ([HEADER, *ROWS, "2019_1,1,cat"], "", "column 'width' is '2019_1', which is no finite number"),
    "decimal commas": ([f"{i % 7},{i % 5};{i % 2}" for i in range(40)], "", "line 1, column 1 is '0,0'"),
    "too large": ([HEADER, *ROWS, "1e300,1,cat"], "", "not finite in float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    lines, column, message = BAD[name]
    path = write(tmp_path, lines)
    with pytest.raises(rd.ArtifactError, match=message) as caught:
        load(path + column)
    assert str(caught.value).startswith(path)


def test_a_label_of_another_name_than_the_last(tmp_path: Path) -> None:
    """Once it is said which the class is, there is no doubt left; and y beside x is a coordinate."""
    rows = [f"{i % 2},{a},{i % 3}" for i, (a, _) in enumerate(X.tolist())]
    path = write(tmp_path, ["label,a,b", *rows])
    assert load(path + ":label").class_names == (0, 1)
    assert load(path + ":b").class_names == (0, 1, 2)
    assert load(write(tmp_path, ["x,y,colour", *ROWS])).class_names == ("cat", "dog")


def test_other_encodings_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(rd.ArtifactError, match=r"cannot be read as a table .*utf-8"):
        load(write(tmp_path, [HEADER.replace("i", "ï"), *ROWS], "latin-1"))
    with pytest.raises(rd.ArtifactError, match=r"none\.csv: no such file"):
        load(str(tmp_path / "none.csv") + ":animal")


def test_a_short_name_for_directories(tmp_path: Path) -> None:
    for name, expected in (
        ("digits", "digits"),
        ("a/b.npz", "b"),
        ("a/b.csv:the.class", "b"),
        (f"{tmp_path}:32", tmp_path.name),
        (str(tmp_path), tmp_path.name),
    ):
        assert short_name(name) == expected
