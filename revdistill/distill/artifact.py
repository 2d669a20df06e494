"""RUN/distilled.h5: the distilled batches with their step sizes, readable by anyone (HDF5, no pickle)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import revdistill
from revdistill.distill.parametrization import MOST_PACKED, REDUCED, form_of, too_large
from revdistill.engine.showing import brief, shares
from revdistill.outer.hdf5 import Reader, reading, writing
from revdistill.outer.labels import Label
from revdistill.outer.optimizers import DEFAULT, OPTIMIZERS, accepted
from revdistill.outer.whitening import Whitening

FORMAT_VERSION = 1
WITH_OPTIMIZER = 2  # for another optimizer than SGD: readers that know of none must not take it for SGD's
WITH_DECAY = 3  # likewise for a weight decay; has an optimizer too
WITH_CLASSES = 4  # likewise for names of classes: class 0 must not be taken for the data's label 0; has all of these
WITH_FORM = 5  # likewise for inputs that are stored in another form, or are whitened; has all of these
FILE_NAME = "distilled.h5"
_WHITENING = ("mean", "components", "scales")
_LARGEST = 1e30  # of a whitening's numbers: inputs and their images stay finite


@dataclass(frozen=True)
class Artifact:
    """Distilled data, and how to train on them.

    To use it without this project: for k in range(T), make one step of torch.optim.SGD on (x[k % s], y[k % s]) with
    lr[k], momentum[k] and weight_decay. Where optimizer is "adam" or "adamw": of torch.optim.Adam or AdamW with
    lr[k], betas (momentum[k], 0.999), eps 1e-8 and weight_decay. What x is made of where it is not stored itself, and
    how real inputs are whitened, says docs/distillation.md.

    Args:
        x: float32 [s, B, ...], the synthetic batches.
        y: int64 [s, B], or soft labels float32 [s, B, C].
        lr: float32 [T], T = s x epochs.
        momentum: float32 [T].
        dataset: what was distilled: a name, or the path of a file or folder.
        architectures: that the data were distilled for.
        epochs: T / s.
        seed: of the distillation.
        normalization: {"mean": [...], "std": [...]}, what was done to the real inputs.
        config: everything needed to distil again.
        evaluation: architecture -> what `Evaluation.to_dict` gives.
        optimizer: a name of OPTIMIZERS.
        weight_decay: as torch.optim has it.
        form: what x is made of, by name, where it is not stored itself: x of Packed, or bases and coefficients of
            Bases.
        pack: see Packed; 1 for none.
        whitening: of real inputs, after they were normalized; None for none.
        classes: the labels that the real data have for classes 0, 1, ...: integers or strings. Empty where they are 0
            to n - 1, and in files of releases that did not keep them.
        revdistill_version: that wrote the file.
        torch_version: that wrote the file.
    """

    x: np.ndarray
    y: np.ndarray
    lr: np.ndarray
    momentum: np.ndarray
    dataset: str
    architectures: list[str]
    epochs: int
    seed: int
    normalization: dict[str, Any]
    config: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    optimizer: str = DEFAULT
    weight_decay: float = 0.0
    classes: list[Label] = field(default_factory=list)
    form: dict[str, np.ndarray] = field(default_factory=dict)
    pack: int = 1
    whitening: Whitening | None = None
    revdistill_version: str = ""
    torch_version: str = ""

    def __repr__(self) -> str:
        labels = f"soft labels of {self.y.shape[-1]} classes" if self.has_soft_labels else "hard labels"
        inputs = " x ".join(map(str, self.x.shape[2:]))
        reached = shares(self.evaluation, "mean")
        return (
            f"Artifact({self.dataset}: {self.batches} batches of {self.x.shape[1]}, inputs {inputs}, {labels}; "
            f"{self.inner_steps} steps of {self.optimizer}, lr {brief(self.lr)}; for {', '.join(self.architectures)}"
            + (f"; test accuracy {reached})" if reached else ")")
        )

    @property
    def batches(self) -> int:
        """s, the number of synthetic batches."""
        return len(self.x)

    @property
    def inner_steps(self) -> int:
        """T, the number of training steps. (The file's attribute `steps` is s.)"""
        return len(self.lr)

    @property
    def stored(self) -> dict[str, np.ndarray]:
        """What the file has of the inputs, by name."""
        return self.form or {"x": self.x}

    @property
    def numbers(self) -> dict[str, int]:
        """How many numbers are stored, as budgets of images count them: of inputs, and of labels where these are soft.
        (A step size for each of T steps comes on top.)
        """
        inputs = sum(values.size for values in self.stored.values())
        return {"inputs": inputs, "labels": self.y.size if self.has_soft_labels else 0}

    @property
    def has_soft_labels(self) -> bool:
        """Whether y holds probabilities."""
        return self.y.ndim == 3


def write(path: Path, artifact: Artifact) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    with writing(path) as file:
        for name in ("y", "lr", "momentum"):
            file.create_dataset(name, data=getattr(artifact, name))
        for name, values in artifact.stored.items():
            file.create_dataset(name, data=values)
        version = _version(artifact)
        file.attrs["format_version"] = version
        if version >= WITH_OPTIMIZER:
            file.attrs["optimizer"] = artifact.optimizer
        if version >= WITH_DECAY:
            file.attrs["weight_decay"] = float(artifact.weight_decay)
        if version >= WITH_CLASSES:
            file.attrs["classes"] = json.dumps(artifact.classes)
        if version >= WITH_FORM:
            file.attrs["pack"] = artifact.pack
            _write_whitening(file, artifact.whitening)
        file.attrs["revdistill_version"] = revdistill.__version__
        file.attrs["torch_version"] = str(torch.__version__)
        file.attrs["dataset"] = artifact.dataset
        file.attrs["steps"] = artifact.batches
        file.attrs["epochs"] = artifact.epochs
        file.attrs["seed"] = artifact.seed
        for name in ("architectures", "normalization", "config", "evaluation"):
            file.attrs[name] = json.dumps(getattr(artifact, name))


def _version(artifact: Artifact) -> int:
    """The lowest version that can say everything, so that earlier releases read the file where they can."""
    if artifact.form or artifact.whitening:
        return WITH_FORM
    if artifact.classes:
        return WITH_CLASSES
    if artifact.weight_decay:
        return WITH_DECAY
    return FORMAT_VERSION if artifact.optimizer == DEFAULT else WITH_OPTIMIZER


def read(path: str | Path) -> Artifact:
    """Read and check the file.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    with reading(path) as file:
        version = file.check_version(FORMAT_VERSION, WITH_OPTIMIZER, WITH_DECAY, WITH_CLASSES, WITH_FORM)
        stored, pack = _stored(file, version)
        artifact = Artifact(
            x=_inputs(file, stored, pack),
            form={} if pack == 1 and "x" in stored else stored,
            pack=pack,
            whitening=_whitening(file) if version >= WITH_FORM else None,
            y=file.array("y", "int64", "float32"),
            lr=file.array("lr", "float32", ndim=1),
            momentum=file.array("momentum", "float32", ndim=1),
            dataset=file.text("dataset"),
            architectures=file.json("architectures", list),
            epochs=file.integer("epochs"),
            seed=file.integer("seed"),
            normalization=file.json("normalization", dict),
            config=file.json("config", dict),
            evaluation=file.json("evaluation", dict),
            optimizer=file.text("optimizer") if version >= WITH_OPTIMIZER else DEFAULT,
            weight_decay=file.number("weight_decay") if version >= WITH_DECAY else 0.0,
            classes=file.json("classes", list) if version >= WITH_CLASSES else [],
            revdistill_version=file.text("revdistill_version"),
            torch_version=file.text("torch_version"),
        )
        _check(file, artifact)
        if version == WITH_CLASSES or artifact.classes:
            _check_classes(file, artifact)
        return artifact


def _stored(file: Reader, version: int) -> tuple[dict[str, np.ndarray], int]:
    """What the file has of the inputs, and how images are packed, checked: other sizes would not go together."""
    if version < WITH_FORM:
        return {"x": file.array("x", "float32")}, 1
    pack = file.integer("pack")
    if "bases" in file.names():
        stored = {name: file.array(name, "float32") for name in ("bases", "coefficients")}
        bases, coefficients = (values.shape for values in stored.values())
        if len(bases) != 4 or len(coefficients) != 3 or 0 in bases or coefficients[2] != bases[0] or pack != 1:
            raise file.fail(
                f"'coefficients' has shape {list(coefficients)}, which does not go with bases of shape {list(bases)}"
            )
        return stored, pack
    x = file.array("x", "float32")
    if not 1 <= pack <= MOST_PACKED or (pack > 1 and (x.ndim != 5 or x.shape[3] % pack or x.shape[4] % pack)):
        raise file.fail(f"attribute 'pack' is {pack}, which does not go with 'x' of shape {list(x.shape)}")
    return {"x": x}, pack


def _inputs(file: Reader, stored: dict[str, np.ndarray], pack: int) -> np.ndarray:
    """The inputs that it stands for."""
    if "x" in stored and pack == 1:
        return stored["x"]
    shapes = {name: values.shape for name, values in stored.items()}
    form = form_of(shapes, pack)
    channels, *sides = shapes["x"][2:] if "x" in shapes else shapes["bases"][1:]
    image = (channels, *(side if "x" in shapes else REDUCED * side for side in sides))
    reason = too_large(form.numbers(shapes), image)
    if reason:
        raise file.fail(f"stands for {reason}")
    inputs = form.inputs({name: torch.from_numpy(values) for name, values in stored.items()})
    if not bool(torch.isfinite(inputs).all()):
        raise file.fail("stands for inputs that are not finite")
    return inputs.numpy()


def _write_whitening(file: h5py.File, whitening: Whitening | None) -> None:
    if whitening is None:
        return
    for name in _WHITENING:
        file.create_dataset(f"whitening_{name}", data=getattr(whitening, name).numpy())
    file.attrs["whitening_rest"] = whitening.rest


def _whitening(file: Reader) -> Whitening | None:
    names = [f"whitening_{name}" for name in _WHITENING]
    if not file.has("whitening_rest") and not set(names) & set(file.names()):
        return None
    mean, components, scales = (torch.from_numpy(file.array(name, "float32")) for name in names)
    rest = file.number("whitening_rest")
    fine = mean.ndim == scales.ndim == 1 and components.shape == (scales.numel(), mean.numel())
    if not fine:
        raise file.fail(
            f"'whitening_components' has shape {list(components.shape)}; with mean {list(mean.shape)} and scales "
            f"{list(scales.shape)} it must be [{scales.numel()}, {mean.numel()}]"
        )
    if bool((components.abs() > 1.001).any()) or bool((mean.abs() > _LARGEST).any()):
        raise file.fail("'whitening_components' must be between -1 and 1, and 'whitening_mean' below 1e30")
    for scale in (rest, *scales.aminmax()) if scales.numel() else (rest,):
        if not 1 / _LARGEST < scale < _LARGEST:
            raise file.fail(f"'whitening_scales' and 'whitening_rest' must be from 1e-30 to 1e30, got {float(scale)}")
    return Whitening(mean, components, scales, rest)


def _check(file: Reader, a: Artifact) -> None:
    if a.x.ndim < 3 or 0 in a.x.shape:
        raise file.fail(f"'x' has shape {list(a.x.shape)}; expected [batches, batch size, ...]")
    if a.y.shape[:2] != a.x.shape[:2] or a.y.ndim != (3 if a.y.dtype.kind == "f" else 2):
        raise file.fail(f"'y' has shape {list(a.y.shape)}, which does not go with x of shape {list(a.x.shape)}")
    if not 1 <= a.epochs <= 10**6 or a.inner_steps != a.batches * a.epochs or a.momentum.shape != a.lr.shape:
        raise file.fail(
            f"'lr' has shape {list(a.lr.shape)} and 'momentum' {list(a.momentum.shape)}; expected "
            f"[{a.batches * a.epochs}], "
            f"{a.batches} batches x {a.epochs} epochs"
        )
    if (a.lr < 0).any() or (a.momentum < 0).any() or (a.momentum > 1).any():
        raise file.fail("'lr' must be at least 0 and 'momentum' between 0 and 1")
    if a.optimizer not in OPTIMIZERS:
        raise file.fail(f"attribute 'optimizer' is {a.optimizer!r}; expected {accepted()}")
    if OPTIMIZERS[a.optimizer].momentum_below_one and (a.momentum >= 1).any():
        raise file.fail(f"'momentum' must be below 1 where attribute 'optimizer' is {a.optimizer!r}")
    if a.weight_decay < 0:
        raise file.fail(f"attribute 'weight_decay' is {a.weight_decay}; expected a number of at least 0")
    if not a.has_soft_labels and (a.y.min() < 0 or a.y.max() > 10**6):
        raise file.fail("'y' has classes below 0 or beyond 10^6")
    if not all(isinstance(name, str) for name in a.architectures):
        raise file.fail("attribute 'architectures' must list names")
    if a.whitening is not None and a.whitening.mean.numel() != math.prod(a.x.shape[2:]):
        raise file.fail(f"whitens inputs of {a.whitening.mean.numel()} features; 'x' has shape {list(a.x.shape)}")
    for key in ("mean", "std"):
        values = a.normalization.get(key)
        if not isinstance(values, list) or not all(isinstance(v, (int, float)) for v in values):
            raise file.fail(f"attribute 'normalization' must hold a list of numbers {key!r}")


def _check_classes(file: Reader, a: Artifact) -> None:
    kinds = {type(name) for name in a.classes}
    if kinds not in ({int}, {str}) or len(set(a.classes)) != len(a.classes):
        raise file.fail("attribute 'classes' must list different integers or different texts")
    count = a.y.shape[2] if a.has_soft_labels else int(a.y.max()) + 1
    if count > len(a.classes) or (a.has_soft_labels and count != len(a.classes)):
        raise file.fail(f"attribute 'classes' has {len(a.classes)} classes, but 'y' has {count}")
