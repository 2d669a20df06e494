"""Tables of flipped labels and of harm that training loss cannot see, from results/flipped.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from tables import table

# method -> its name in the table, and the trainings that it takes
FLIPS = {
    "loss_one": ("training loss", "1"),
    "loss": ("training loss, mean", "10"),
    "loss_early": ("training loss after a quarter of the epochs, mean", "10"),
    "loss_outside": ("loss of those that training left out, in turn", "5"),
    "tracin": ("TracIn, mean", "10"),
    "metagradient": ("one metagradient", "1"),
    "memorising": ("one metagradient, memorising training", "1"),
    "soft": ("one, temperature 3, asked along the training", "1"),
    "labels": ("weights of every label, temperature 3, asked along the training", "1"),
    "mean": ("metagradients, mean over starts and orders", "5"),
    "mean_soft": ("the same, temperature 3, asked along the training", "5"),
    "mean_labels": ("weights of every label, asked so, mean", "5"),
    "learned": ("weights learned in [0, 1], stopped early", "5"),
    "labels_in_turn": ("weights of every label, training examples as queries in turn", "5"),
    "labels_in_turn_own_loss": ("the same, times their training loss", "5"),
    "labels_in_turn_and_loss": ("weights of every label, in turn, times the loss of 5 longer trainings", "10"),
}
HARM = {
    "training_loss": "training loss",
    "tracin": "TracIn, every epoch",
    "scores": "scores (one metagradient)",
    "along": "the same, asked along the training",
    "labels": "weights of every label, asked so (one metagradient)",
    "random": "at random",
}
CASES = {
    "poisoned": ("2 % poisoned (patch, label 0); queries: patched images", "patched test images right"),
    "near_duplicates": ("1 % copies of one 4, labelled 9; queries: other copies", "other copies right"),
    "other_distribution": ("20 % upside down, labels right; queries: upright", "test accuracy"),
}
PARTS = {"flips_10": "10 %", "flips_20": "20 %"}
BEST = ("loss_one", "loss", "metagradient", "memorising", "labels", "mean", "learned", "labels_in_turn_and_loss")


def _spread(values: Iterable[float], form: str) -> str:
    """Mean +- sample standard deviation."""
    found = list(values)
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):{form}} +- {deviation:{form}}"


def flips_table(results: dict[str, Any], methods: Iterable[str] = tuple(FLIPS)) -> str:
    """Every method, for both shares of flipped labels."""
    parts = [part for part in PARTS if part in results]
    rows = []
    for reference, name in (
        ("with_all", "all, flipped labels included"),
        ("without_the_flipped", "without the flipped"),
    ):
        cells = [c for p in parts for c in ("", "", _spread((run[reference] for run in results[p]), ".1%"))]
        rows.append([name, "", *cells])
    for method in methods:
        cells = []
        for part in parts:
            of = [run["methods"][method] for run in results[part]]
            cells += [
                _spread((f["auroc"] for f in of), ".3f"),
                _spread((f["precision_worst_tenth"] for f in of), ".0%"),
            ]
            cells.append(_spread((f["test"] for f in of), ".1%"))
        rows.append([*FLIPS[method], *cells])
    header = [
        c for p in parts for c in (f"{PARTS[p]} flipped: AUROC", "flipped among the worst 10 %", "retrained without")
    ]
    return table(["ranked by", "trainings", *header], rows)


def harm_table(results: dict[str, Any]) -> str:
    """Every case and method."""
    rows = []
    for case, (title, mended) in CASES.items():
        runs = results.get(case, [])
        if not runs:
            continue
        for method, name in HARM.items():
            of = [run["methods"][method] for run in runs]
            cells = [_spread((f[key] for f in of), form) for key, form in (("auroc", ".3f"), ("precision", ".0%"))]
            rows.append(
                [title if method == "training_loss" else "", name, *cells, _spread((f["mended"] for f in of), ".1%")]
            )
        for reference, name in (("with_all", "nothing left out"), ("without_the_guilty", "exactly those left out")):
            mean = _spread((run[reference]["mended"] for run in runs), ".1%")
            rows.append([f"({mended})" if reference == "with_all" else "", name, "", "", mean])
    header = [
        "what is wrong, and what asks",
        "ranked by",
        "AUROC",
        "precision at the true number",
        "mended by retraining without",
    ]
    return table(header, rows)


def section(results: dict[str, Any], where: str) -> str:
    """Everything in benchmarks/README.md."""
    seconds = sum(run["cpu_seconds"] for part in (*PARTS, *CASES) for run in results.get(part, []))
    parts = [
        f"`python benchmarks/flipped.py --data-dir DIR`, on {where}; {seconds / 60:.0f} minutes of one core in all. "
        "5,000 MNIST images, 500 clean held-out ones, 500 others to stop early by; MLP 784-128-64-10 with GELU, "
        "SGD(.01, .9), means and standard deviations over 3 draws of data, flips and starts. Retrained: without as "
        "many as were flipped, by a training of its own, accuracy on 10,000 test images.",
        flips_table(results),
        "*Weights of every label*: each example is trained on as one of every class c with weight V_ic, V one-hot; one "
        "way back gives dL/dV [n, C]. Its given label's column is the score; a label is worth what it harms more than "
        "the label that would harm least: whatever is the example's own (how early it was seen, how strange it is) "
        "falls out. *Asked along the training*: the queries' mean loss after each epoch of the second half, in "
        "one way back. *Queries in turn*: a fifth of the training examples, labels as they are, is left out of each "
        "training and asked, with the clean ones: 500 clean images know less of 5,000 labels than 4,000 noisy "
        "neighbours do.",
    ]
    if any(case in results for case in CASES):
        parts.append("### Harm that training loss cannot see\n\n" + harm_table(results))
    return "\n\n".join(parts)


def summary(results: dict[str, Any], where: str) -> str:
    """The figures of the main README."""
    parts = [flips_table(results, BEST)]
    if any(case in results for case in CASES):
        parts.append(harm_table(results))
    return "\n\n".join([*parts, f"On {where}."])
