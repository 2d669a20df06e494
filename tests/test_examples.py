"""docs/examples: each script runs at small size, prints a result that is one, and draws a picture that can be read; and
its hypergradient is plain autograd's.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

import revdistill as rd
from tests.outer.legible import illegible

EXAMPLES = Path(__file__).parents[1] / "docs/examples"
PAGE = EXAMPLES / "README.md"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
Names = dict[str, Any]


def own_module(found: Names) -> None:
    assert found["learned"] < 0.9 * found["best"] < 0.9 * found["start"]
    of_those_that_matter, of_the_others = found["penalty"][:3].mean(), found["penalty"][3:].mean()
    assert of_those_that_matter < of_the_others - 0.5


def schedule(found: Names) -> None:
    assert found["learned"] < 0.95 * found["best"] < 0.95 * found["start"]
    assert (found["decay"] < -7.5).all()


def flipped_labels(found: Names) -> None:
    assert found["flipped"][found["worst"]].sum() >= 15  # by chance 3
    assert abs(found["predicted"] - found["after"]) < 0.5 * (found["before"] - found["after"])
    assert found["after_new"] < found["before_new"]


def weights(found: Names) -> None:
    assert found["early"] < 0.9 * found["equal"]
    kept = found["weights"][found["kept"]]
    assert kept[found["wrong"]].mean() < 0.7 * kept[~found["wrong"]].mean()


def initialisation(found: Names) -> None:
    assert found["learned"] < 0.85 * found["best"]


def transformer(found: Names) -> None:
    assert found["after"] > found["before"] + 0.1
    assert found["weights"][found["other"]].mean() < 0.7 * found["weights"][~found["other"]].mean()


RESULTS: dict[str, Callable[[Names], None]] = {
    f.__name__: f for f in (own_module, schedule, flipped_labels, weights, initialisation, transformer)
}


def run(name: str) -> Names:
    """The script's names, once it has run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--small"])
    plt.switch_backend("agg")
    plt.close("all")
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    plt.close("all")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_result_and_a_picture(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(name)
    RESULTS[name](found)
    printed = capsys.readouterr().out
    assert re.search(r"\d\.\d", printed)
    (drawn,) = Path().iterdir()
    assert drawn.name == f"{name}.png"
    check_picture(drawn)
    assert illegible(plt.gcf()) == []


def check_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 500
        assert image.height >= 200
        colours = image.convert("RGB").getcolors(1 << 24)
        assert len({colour for count, colour in colours if count > 100}) >= 3  # white, black and what is drawn
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_what_is_learned(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text, feature_version=(3, 10))
    said = ast.get_docstring(tree) or ""
    assert "learn" in said
    assert "Expect: " in said
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in imported if "revdistill" in module} == {"revdistill"}  # what is public alone


def test_the_page_is_of_these_scripts() -> None:
    """With the figures that it has, it is what docs/make_examples.py would write now."""
    make = runpy.run_path(str(EXAMPLES.parent / "make_examples.py"))
    page = PAGE.read_text()
    (machine,) = re.findall(r"^Seconds are those of one core of (.*)\.$", page, flags=re.M)
    results = {}
    for name in make["ORDER"]:
        (seconds,) = re.findall(rf"^\| \[{name}\.py\]\({name}\.py\).* \| (\d+) \|$", page, flags=re.M)
        (printed,) = re.findall(rf"^((?:    .+\n)+)\n!\[.*\]\({name}\.png\)$", page, flags=re.M)
        assert re.search(r"\d\.\d", printed)
        results[name] = "\n".join(line.removeprefix("    ") for line in printed.splitlines()), float(seconds)
    assert page == make["page"](results, machine), "docs/examples/README.md is stale: python docs/make_examples.py"
    assert sorted(results) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_an_examples_picture(name: str) -> None:
    check_picture(EXAMPLES / f"{name}.png")


def test_there_are_six() -> None:
    assert set(NAMES) == set(RESULTS)
    assert len(NAMES) == 6


class Seen(Exception):  # noqa: N818
    """The first call of the verb with what the example learns."""


def learned(given: Any) -> list[torch.Tensor]:
    """The tensors that require grad, at any depth: of batches, hyper, optimizers, params."""
    if isinstance(given, torch.Tensor):
        return [given] if given.requires_grad else []
    if dataclasses.is_dataclass(given):
        given = [getattr(given, field.name) for field in dataclasses.fields(given)]
    if isinstance(given, dict):
        given = list(given.values())
    return [t for entry in given for t in learned(entry)] if isinstance(given, (list, tuple)) else []


@pytest.fixture
def _in_double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a script says nothing of precision, and where it says `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("name", NAMES)
def test_its_hypergradient_is_plain_autograds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb = "attribute" if name == "flipped_labels" else "unroll"
    original = getattr(rd, verb)

    def watched(*args: Any, **options: Any) -> Any:
        if verb == "unroll" and all(isinstance(t, torch.nn.Parameter) for t in learned([args, options])):
            return original(*args, **options)  # nothing is learned here: a training to compare with
        raise Seen(args, options)

    monkeypatch.setattr(rd, verb, watched)
    with pytest.raises(Seen) as seen:
        run(name)
    args, options = seen.value.args
    if verb == "attribute":
        options["queries"] = tuple(t[:5] for t in options["queries"])

    def hypergradient(adjoint: Any) -> list[torch.Tensor]:
        result = original(*args, **options, seed=0, adjoint=adjoint)
        if verb == "attribute":
            return [result.scores]
        assert all(p.dtype == torch.float64 for p in result.values())
        outer = sum((p * torch.linspace(-1, 2, p.numel()).view_as(p)).sum() for p in result.values())
        return list(torch.autograd.grad(outer, learned([args, options])))

    ours, plain = hypergradient(None), hypergradient(rd.Backprop())
    assert ours
    for a, b in zip(ours, plain, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() < 1e-7 * b.norm()
