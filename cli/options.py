"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from revdistill.distill import models
from revdistill.distill.config import check_device
from revdistill.distill.data import DATA_DIR
from revdistill.distill.image_files import FROM_FILES

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # older releases of click have it without a parameter


class _Checked(_ParamType):
    """A text that a function of the library checks."""

    def __init__(self, name: str, check: Any) -> None:
        self.name, self._check = name, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _device_name(name: str) -> str:
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


ARCHITECTURE = _Checked("name", models.canonical)
DEVICE = _Checked("device", _device_name)

arch = click.option(
    "--arch",
    "architectures",
    type=ARCHITECTURE,
    multiple=True,
    metavar="NAME",
    help=f"Network: {', '.join(models.ARCHITECTURES)}, or your own factory package.module:function, called with "
    "(input_shape, classes). Repeat it for several.",
)
data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=DATA_DIR,
    show_default=True,
    envvar="REVDISTILL_DATA_DIR",
    show_envvar=True,
    help=f"Where the files of {', '.join(FROM_FILES)} are: the folder itself, or one that holds folders of these names.",
)
dataset = click.option(
    "--dataset",
    help="Real data instead of those that RUN names: a name, or a .npz file. Needed where RUN was distilled from a .npz file: "
    "which file is read is yours to say.",
)
device = click.option("--device", type=DEVICE, default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto.")
