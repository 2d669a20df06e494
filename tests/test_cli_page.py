"""docs/cli.md is what docs/make_cli.py writes now, and says what each option is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click
import pytest
from revdistill.cli.main import cli

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_commands_say_now(make_cli: ModuleType) -> None:
    assert (DOCS / "cli.md").read_text() == make_cli.page(), "docs/cli.md is stale: python docs/make_cli.py"


def test_every_command_and_option_is_in_it(make_cli: ModuleType) -> None:
    text = make_cli.page()
    for name, command in cli.commands.items():
        own = text.split(f"\n## revdistill {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for flag in parameter.opts if isinstance(parameter, click.Option) else [parameter.make_metavar(context())]:
                assert flag in own, f"{name}: {flag}"
    assert all(f"| {code}" in text for code in (0, 1, 2, 130))


def context() -> click.Context:
    return click.Context(cli)


@pytest.mark.parametrize(
    ("option", "row"),
    [
        (
            click.option("--a", type=click.Choice(["x", "y"]), default="x", help="A|B."),
            "| `--a` | `x`, `y` | `x` | A\\|B. |",
        ),
        (click.option("--a", type=click.IntRange(1, 10**6)), "| `--a` | a whole number from 1 to 1,000,000 |  |  |"),
        (
            click.option("--a", type=click.FloatRange(0, min_open=True), default=0.5),
            "| `--a` | a number above 0 | `0.5` |  |",
        ),
        (click.option("--a", is_flag=True, help="Do.  [default: when told]"), "| `--a` |  | [when told] | Do. |"),
        (click.option("--a/--no-a", default=False), "| `--a`, `--no-a` |  | `--no-a` |  |"),
        (click.option("--a/--no-a", default=True), "| `--a`, `--no-a` |  | `--a` |  |"),
        (click.option("-a", "--all", type=click.Path(), multiple=True), "| `-a`, `--all` | a path, repeatable |  |  |"),
        (
            click.option("--a", envvar="A_B", default=3),
            "| `--a` | a whole number | `3` |  Also by the environment variable A_B. |",
        ),
        (click.option("--a", required=True, metavar="NAME"), "| `--a` | a name | required |  |"),
    ],
)
def test_an_options_line(make_cli: ModuleType, option: object, row: str) -> None:
    command = click.command("c")(option(lambda: None))  # type: ignore[operator]
    assert make_cli._options(command, click.Context(command)).splitlines()[2:] == [row]
