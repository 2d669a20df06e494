"""What a result is, in the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from revdistill.attribute.flipping import highest
from revdistill.attribute.result import Kept
from revdistill.distill.artifact import Artifact
from revdistill.outer.optimizers import OPTIMIZERS
from revdistill.tune.schedule import Schedule

from .described import named
from .table import comparison_table, evaluation_table, flipped_table, harmful_table, table
from .texts import check_lines

SHOWN = 5  # of the most harmful examples


def run_summary(a: Artifact) -> str:
    """Of distilled data.

    Raises:
        ValueError: its evaluation, which may come from anywhere, is none.
    """
    rows = [
        ("dataset", a.dataset),
        ("distilled for", ", ".join(a.architectures)),
        ("synthetic data", f"{a.batches} batches of {a.x.shape[1]}, each {' x '.join(map(str, a.x.shape[2:]))}"),
        *([("stored", _stored(a))] if a.form else []),
        ("labels", "soft" if a.has_soft_labels else "hard"),
        *([("whitened", f"ZCA, {len(a.whitening.scales)} components")] if a.whitening else []),
        *([("classes", named(a.classes))] if a.classes else []),
        ("inner steps", f"{a.inner_steps} ({a.epochs} epochs)"),
        ("step sizes", _span(a.lr)),
        ("optimizer", a.optimizer),
        (OPTIMIZERS[a.optimizer].momentum_name, _span(a.momentum)),
        ("weight decay", f"{a.weight_decay:.4g}"),
        ("seed", str(a.seed)),
        ("written by", f"revdistill {a.revdistill_version}, torch {a.torch_version}"),
    ]
    return table(("what", "value"), rows) + _measured("evaluation", a.evaluation, evaluation_table)


def _stored(a: Artifact) -> str:
    how = f"each image {a.pack} x {a.pack} smaller ones" if a.pack > 1 else f"{len(a.stored['bases'])} bases"
    return f"{a.numbers['inputs']:,} numbers: {how}"


def tuning_summary(s: Schedule) -> str:
    """Of a schedule.

    Raises:
        ValueError: its comparison, which may come from anywhere, is none.
    """
    groups = "all parameters alike" if len(s.groups) == 1 else f"{len(s.groups)} layers: {', '.join(s.groups)}"
    rows = [
        *((name, str(s.config[key])) for name, key in (("dataset", "dataset"), ("network", "arch")) if key in s.config),
        ("training steps", str(s.steps)),
        *([("learned", ", ".join(map(str, s.config["learn"])))] if isinstance(s.config.get("learn"), list) else []),
        ("groups", groups),
        ("learning rates", _span(s.lr)),
        ("optimizer", s.optimizer),
        (OPTIMIZERS[s.optimizer].momentum_name, _span(s.momentum)),
        ("weight decay", _span(s.weight_decay)),
        ("initial scale", _span(s.init_scale)),
    ]
    return table(("what", "value"), rows) + _measured("comparison", s.comparison, comparison_table)


def attribution_summary(a: Kept) -> str:
    """Of an attribution."""
    named = ("dataset", "arch", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "eps", "seed")
    rows = [
        *((name.replace("_", " "), str(a.config[name])) for name in named if a.config.get(name) is not None),
        ("training examples", str(len(a.examples))),
        ("test accuracy", f"{a.accuracy:.2%}"),
        ("queries", f"{len(a.queries)}, mean loss {a.losses.mean():.4g}"),
        ("scores", _span(a.scores)),
    ]
    harm = a.scores.mean(0, dtype=np.float64)
    most = [(int(a.examples[i]), a.labels[i], float(harm[i]), bool(a.wrong[i])) for i in highest(harm, SHOWN)]
    parts = [table(("what", "value"), rows), "the most harmful examples:", harmful_table(most, flips=bool(a.flipped))]
    parts += [] if a.check is None else check_lines(a.check)
    parts += [flipped_table(a.flipped)] if a.flipped else []
    return "\n".join(parts)


def _span(values: np.ndarray) -> str:
    return f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"


def _measured(name: str, found: dict[str, Any], as_table: Any) -> str:
    try:
        return f"\n{as_table(found)}" if found else ""
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"attribute {name!r} of the result is not one of this release ({error})") from error
