"""docs/cli.md, from the commands themselves: what --help says, with types, defaults and choices.

python docs/make_cli.py          writes it
python docs/make_cli.py --check  exits with 1 where it is not what would be written
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from revdistill.cli.main import cli

PAGE = Path(__file__).with_name("cli.md")
FRONT = """# The command line

<!-- written by docs/make_cli.py; do not edit -->

Every command has `-h`, `--help`; `revdistill --version` says what a report of a fault should. `python -m revdistill` is
the same command. A shell completes options, architectures, datasets and files after

    eval "$(_REVDISTILL_COMPLETE=bash_source revdistill)"    likewise zsh_source and fish_source

| exit code | |
|---|---|
| 0 | done |
| 1 | anything else: a check of `verify` failed, memory was short, a file could not be written |
| 2 | something to put right in the command; one line says which option, what came, and what is accepted |
| 130, 143, 129 | stopped by Ctrl-C, SIGTERM or SIGHUP; what was done is saved, and `--resume` goes on |

A default in brackets is found when the command runs. *Repeatable* options may be given several times."""
_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]")


def page() -> str:
    """All commands, in the order of --help."""
    context = click.Context(cli, info_name="revdistill", **cli.context_settings)
    parts = [FRONT, *_description(cli)]
    names = cli.list_commands(context)
    parts.append("\n".join(["| command | |", "|---|---|", *(_line(cli.commands[name]) for name in names)]))
    parts += ["Options of `revdistill` itself:", _options(cli, context)]
    for name in names:
        command = cli.commands[name]
        inner = click.Context(command, info_name=name, parent=context)
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        parts += [f"## revdistill {name}", f"    {usage}", *_description(command)]
        parts.append(_options(command, inner))
    return "\n\n".join(parts) + "\n"


def _line(command: click.Command) -> str:
    name = command.name or ""
    return f"| [{name}](#revdistill-{name}) | {_cell(command.get_short_help_str(limit=200))} |"


def _description(command: click.Command) -> Iterator[str]:
    r"""Its help; what stands after \b is kept as it is, indented."""
    for paragraph in inspect.cleandoc(command.help or "").split("\f")[0].split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if lines and lines[0].strip() == "\b":
            yield "\n".join(f"    {line}" for line in lines[1:])
        elif lines:
            yield _text(" ".join(line.strip() for line in lines))


def _options(command: click.Command, context: click.Context) -> str:
    rows = ["| option | accepted | default | |", "|---|---|---|---|"]
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden and "--help" not in parameter.opts:
            words = " ".join((parameter.help or "").split())
            stated = _DEFAULT.search(words)
            cells = (_names(parameter), _accepted(parameter), _default(parameter, stated), _DEFAULT.sub("", words))
            rows.append("| " + " | ".join([*cells[:3], _cell(_with_variable(parameter, cells[3]))]) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _names(option: click.Option) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _accepted(option: click.Option) -> str:
    """In words: choices, ranges, what a text names."""
    kind = option.type
    if option.is_flag and not option.metavar:
        words = ""
    elif isinstance(kind, click.Choice):
        words = ", ".join(f"`{choice}`" for choice in kind.choices)
    elif isinstance(kind, (click.IntRange, click.FloatRange)):
        words = _range(kind)
    elif isinstance(kind, click.Path):
        words = "a path"
    elif isinstance(kind, (click.types.IntParamType, click.types.FloatParamType)):
        words = "a whole number" if isinstance(kind, click.types.IntParamType) else "a number"
    else:
        words = f"a {(option.metavar or kind.name).lower()}"
    if option.metavar and option.metavar.startswith("["):
        words += ", or nothing"
    return _cell(words + (", repeatable" if option.multiple else ""))


def _range(kind: click.IntRange | click.FloatRange) -> str:
    noun = "a whole number" if isinstance(kind, click.IntRange) else "a number"
    low = "" if kind.min is None else f" {'above' if kind.min_open else 'from'} {_number(kind.min)}"
    high = "" if kind.max is None else f" {'below' if kind.max_open else 'to'} {_number(kind.max)}"
    return noun + low + high


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _default(option: click.Option, stated: re.Match[str] | None) -> str:
    """What the help states, which is found when the command runs, or the value."""
    if stated:
        return _cell(f"[{stated[1]}]")
    if option.required:
        return "required"
    value = option.default
    if option.is_flag and not option.metavar:
        return (
            f"`{option.opts[0]}`" if value is True else f"`{option.secondary_opts[0]}`" if option.secondary_opts else ""
        )
    if value is None or callable(value) or not isinstance(value, (str, int, float, Path)) or value == "":
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _with_variable(option: click.Option, words: str) -> str:
    return f"{words} Also by the environment variable {option.envvar}." if option.envvar else words


def _text(words: str) -> str:
    """For Markdown, which takes a < for the start of a tag, and a [word] for a link."""
    return words.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text() == page() else f"{PAGE} is stale: python docs/make_cli.py")
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
