"""Hostile results, made up by hypothesis until the time is over, given to `revdistill show` and `evaluate` in this
process.

    python -m tests.distill.fuzz SECONDS

Each input must end in exit code 0 or 2 with at most one line on standard error; no file may be opened outside the run's
directory but those of the installed packages, nothing started, no connection made; memory must stay flat. Prints the
count of inputs. In a process of its own, so that a crash in the HDF5 library is seen as what it is.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from revdistill.cli import main as command

from revdistill.distill.artifact import Artifact, write
from revdistill.outer.whitening import Whitening

HERE = Path(__file__).resolve().parents[2]
EXAMPLES = 50  # of one round of hypothesis
MEMORY = 300 * 2**20  # bytes that the peak may rise by after the first round
CODES = {0, 2}
NOTE = "normalised by their own training part"  # evaluate's, beside a result that says otherwise
LARGE = 10**6  # values: of what is declared, not there

NAMES = ("x", "y", "lr", "momentum", "bases", "coefficients")
NAMES += ("whitening_mean", "whitening_components", "whitening_scales")
ATTRIBUTES = (
    "format_version",
    "revdistill_version",
    "torch_version",
    "dataset",
    "architectures",
    "steps",
    "epochs",
    "seed",
)
ATTRIBUTES += (
    "pack",
    "whitening_rest",
    "optimizer",
    "weight_decay",
    "classes",
    "normalization",
    "config",
    "evaluation",
)
DATASETS = (
    "moons",
    "digits",
    "mnist",
    "cifar10",
    "/etc/passwd",
    "../secret.npz",
    "secret.npz",
    "http://localhost/x.npz",
    "\x1b[2J",
)
NETWORKS = (
    "NonLinearNet",
    "MLP",
    "LeNet",
    "ConvNet-3",
    "ConvNet-3:width=65536",
    "ResNet-8:width=3",
    "antigravity",
    "os:system",
    "antigravity:fly",
    "no.such:thing",
    "\x1b]0;x\x07",
)
TEXTS = st.one_of(st.sampled_from(DATASETS), st.sampled_from(NETWORKS), st.text(max_size=20))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 1e308, 10**400]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(0, 6), max_size=6).map(tuple)
DTYPES = st.sampled_from(["float32", "float64", "int64", "int8", "bool", "complex64", "S5", "float16"])
HEAP = re.compile(rb"GCOL.{12}", re.DOTALL)  # signature, version, and size in bytes of a global heap
KEYS = ("step", "loss", "held_out_accuracy", "seconds", "hypergradient_norm", "diverged")


def artifact(images: bool) -> Artifact:
    draw = np.random.default_rng(0)
    return Artifact(
        x=draw.normal(size=(2, 4, 1, 8, 8) if images else (2, 4, 2)).astype(np.float32),
        y=np.arange(8).reshape(2, 4) % 2,
        lr=np.linspace(0.1, 0.2, 4, dtype=np.float32),
        momentum=np.full(4, 0.9, np.float32),
        dataset="digits" if images else "moons",
        architectures=["MLP" if images else "NonLinearNet"],
        epochs=2,
        seed=3,
        normalization={"mean": [0.0], "std": [1.0]},
        config={"init": "random"},
        evaluation={"MLP": {"schedule": "raw", "restarts": 2, "mean": 0.5, "std": 0.1}},
        weight_decay=0.0 if images else 0.01,
        classes=[] if images else [0, 1],
    )


FORMS = ("none", "packed", "bases", "whitened")


def formed(base: Artifact, form: str) -> Artifact:
    """The same with inputs stored in another form, or whitened."""
    draw = np.random.default_rng(1)
    if form == "packed":
        return replace(base, form={"x": draw.normal(size=(2, 1, 1, 8, 8)).astype(np.float32)}, pack=2)
    if form == "bases":
        shapes = {"bases": (3, 1, 4, 4), "coefficients": (2, 4, 3)}
        return replace(base, form={name: draw.normal(size=s).astype(np.float32) for name, s in shapes.items()})
    if form == "whitened":
        features = base.x[0, 0].size
        return replace(base, whitening=Whitening.of(torch.from_numpy(draw.normal(size=(50, features))).float()))
    return base


def array(draw: st.DataObject) -> np.ndarray:
    shape, dtype = draw.draw(SHAPES), draw.draw(DTYPES)
    values = np.random.default_rng(draw.draw(st.integers(0, 99))).normal(size=shape) * draw.draw(
        st.sampled_from([1, 1e30, 1e-40])
    )
    with np.errstate(all="ignore"):
        found: np.ndarray = np.asarray(values, dtype=dtype) if dtype != "S5" else np.full(shape, b"text", dtype)
        return found


def change(file: h5py.File, draw: st.DataObject) -> None:
    """One thing that a stranger may have done."""
    kind = draw.draw(
        st.sampled_from(["array", "values", "attribute", "json", "remove", "link", "huge", "large", "group"])
    )
    name = draw.draw(st.sampled_from(NAMES))
    if kind in ("array", "link", "huge", "group", "remove") and name in file:
        del file[name]
    if kind == "array":
        file[name] = array(draw)
    elif kind == "values" and isinstance(file.get(name), h5py.Dataset) and 0 < file[name].size < LARGE:
        flat = file[name][()].reshape(-1)
        with contextlib.suppress(OverflowError, ValueError, TypeError), np.errstate(all="ignore"):
            flat[draw.draw(st.integers(0, flat.size - 1))] = draw.draw(NUMBERS)
            file[name][...] = flat.reshape(file[name].shape)
    elif kind == "attribute":
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = draw.draw(st.one_of(NUMBERS, TEXTS, st.lists(st.integers(-9, 9), max_size=3)))
            file.attrs[draw.draw(st.sampled_from(ATTRIBUTES))] = value
    elif kind == "json":
        with contextlib.suppress(ValueError):  # a text with a NUL
            file.attrs[draw.draw(st.sampled_from(("architectures", *ATTRIBUTES[-4:])))] = json.dumps(draw.draw(VALUES))
    elif kind == "link":
        file[name] = draw.draw(
            st.sampled_from([h5py.ExternalLink("/etc/passwd", "/x"), h5py.SoftLink("/lr"), h5py.SoftLink("/" + name)])
        )
    elif kind == "huge":
        file.create_dataset(name, draw.draw(st.sampled_from([(2**40,), (2**20, 2**20, 2**10)])), "float32", chunks=True)
    elif kind == "large":
        file.attrs[draw.draw(st.sampled_from(ATTRIBUTES))] = "[" * draw.draw(st.sampled_from([10**4, 10**6, 5 * 2**20]))
    elif kind == "group":
        file.create_group("/".join([name] * draw.draw(st.integers(1, 200))))


def flip(contents: bytearray, positions: list[int]) -> None:
    """Flip these bits of an HDF5 file, but none of its texts.

    They are in global heaps, which have no checksum; a damaged one makes HDF5 itself loop, or crash, now and then.
    """
    heaps = [
        range(m.start(), m.start() + struct.unpack_from("<Q", contents, m.start() + 8)[0])
        for m in HEAP.finditer(contents)
    ]
    for position in positions:
        if not any(position // 8 in heap for heap in heaps):
            contents[position // 8] ^= 1 << position % 8


def make(directory: Path, draw: st.DataObject) -> None:
    """A run's directory, as a stranger might send it."""
    path = directory / "distilled.h5"
    images = draw.draw(st.booleans())
    write(path, formed(artifact(images), draw.draw(st.sampled_from(FORMS if images else ("none", "whitened")))))
    for _ in range(draw.draw(st.integers(0, 3))):
        with contextlib.suppress(OSError, RuntimeError, KeyError), h5py.File(path, "a") as file:
            change(file, draw)
    contents = bytearray(path.read_bytes())
    if draw.draw(st.integers(0, 3)) == 0:
        flip(contents, draw.draw(st.lists(st.integers(0, len(contents) * 8 - 1), max_size=10)))
    if draw.draw(st.integers(0, 9)) == 0:
        contents = contents[: draw.draw(st.integers(0, len(contents)))]
    path.write_bytes(contents)
    entries = draw.draw(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), max_size=3))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), errors="replace")


class Watch:
    """What the process asks the system for while an input is looked at."""

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.wrong: list[str] = []
        prefixes = {
            sys.prefix,
            sys.base_prefix,
            str(HERE),
            tempfile.gettempdir(),
            "/proc",
            "/sys",
            "/usr",
            "/etc/localtime",
            "/dev/null",
        }
        self._allowed = tuple(prefixes | {str(Path.home() / ".cache"), str(Path.home() / ".config")})

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.fork", "socket.connect", "socket.getaddrinfo"):
            self.wrong.append(f"{event} {arguments!r}"[:200])
        if (
            event == "open"
            and isinstance(arguments[0], str)
            and not os.path.abspath(arguments[0]).startswith(self._allowed)
        ):
            self.wrong.append(f"open {arguments[0]}")
        if event == "import" and arguments[0] in ("antigravity", "no"):
            self.wrong.append(f"import {arguments[0]}")


def look(directory: Path, arguments: list[str], watch: Watch) -> int:
    out, err = io.StringIO(), io.StringIO()
    watch.directory = directory
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command.run([arguments[0], str(directory), *arguments[1:]])
    finally:
        watch.directory = None
    assert code in CODES, (code, err.getvalue())
    said = [line for line in err.getvalue().splitlines() if code or not line.startswith(NOTE)]
    assert len(said) == (code == 2), err.getvalue()
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert not watch.wrong, watch.wrong
    return code


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    watch, codes = Watch(), collections.Counter[tuple[str, int]]()
    sys.addaudithook(watch)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            make(directory, data)
            for arguments in (["show"], ["evaluate", "--restarts", "1", "--data-dir", folder]):
                codes[arguments[0], look(directory, arguments, watch)] += 1

    os.chdir(tempfile.mkdtemp())
    end, start, before = time.monotonic() + seconds, random.SystemRandom().randrange(2**32), None
    print(f"seeds from {start}", flush=True)
    for round_ in range(10**9):
        hypothesis.seed(start + round_)(one)()
        if before is None:
            before = peak()
        if round_ and time.monotonic() > end:  # of one round alone nothing could have risen
            break
    risen = peak() - before
    looks = sum(codes.values())
    print(f"{looks} looks at {looks // 2} inputs: {dict(codes)}; peak memory rose by {risen / 2**20:.0f} MiB")
    assert risen < MEMORY


if __name__ == "__main__":
    main(float(sys.argv[1]))
