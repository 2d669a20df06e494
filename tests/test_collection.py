"""Which files pytest reads for which marks, and in which order tests run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest

HERE = Path(__file__).parent
OF_GRAPHS = "engine/test_graphs.py"  # imitated
OF_DEVICES = "engine/test_device.py"  # standin


@pytest.mark.parametrize(
    ("expression", "left_out"),
    [
        ("", set()),
        ("slow", set()),
        ("not slow and not standin and not imitated", set()),
        ("imitated and not slow", {OF_DEVICES}),
        ("standin and not slow", {OF_GRAPHS}),
        ("(standin or cuda) and not slow", {OF_GRAPHS}),
        ("standin or imitated", set()),
        ("standin or slow", set()),
    ],
)
def test_files_that_have_no_such_mark_are_not_read(expression: str, left_out: set[str]) -> None:
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    found = {name for name in (OF_GRAPHS, OF_DEVICES) if conftest.pytest_ignore_collect(HERE / name, config)}
    assert found == left_out
    assert not conftest.pytest_ignore_collect(HERE / "engine", config)


def test_files_that_take_longest_come_first() -> None:
    assert all((HERE / name).exists() for name in conftest.LONGEST)

    def item(name: str, number: int) -> Any:
        return SimpleNamespace(path=HERE / name, nodeid=f"{name}::{number}", get_closest_marker=lambda _: None)

    last, first = conftest.LONGEST[1], conftest.LONGEST[0]
    items = [item("test_rooms.py", 0), item(last, 0), item(last, 1), item("test_docs.py", 0), item(first, 0)]
    conftest.pytest_collection_modifyitems(items)
    files = [first, last, last, "test_rooms.py", "test_docs.py"]  # in a file, and of the rest, as they were
    assert [one.nodeid for one in items] == [f"{name}::{n}" for name, n in zip(files, (0, 0, 1, 0, 0), strict=True)]


def test_a_mark_that_stands_in_another_file_is_told() -> None:
    """As where a class of tests with a mark is imported: `pytest -m imitated` would not read the file."""
    stray: Any = SimpleNamespace(path=HERE / "test_rooms.py", nodeid="stray", get_closest_marker="imitated".__eq__)
    with pytest.raises(pytest.UsageError, match=r"stray has the mark imitated; write pytest.mark.imitated in its file"):
        conftest.pytest_collection_modifyitems([stray])
