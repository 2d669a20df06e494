"""Tables of attribution on a language model, from results/language_model.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measuring import MIB, load
from tables import table

METHODS = {"training": "training alone", "ours": "one metagradient", "autograd": "plain autograd, every graph kept"}
WHO = {"bergson": "bergson, checkpoints `{mode}`", "ours": "ours"}
WAYS = {
    "float32": "division by the factors, float32",
    "float64": "division by the factors, float64",
    "restated": "the fixed point of `reversible_data_attribution`, restated",
    "ours": "`rd.Reversible`",
}


def section(results: dict[str, Any], where: Callable[[dict[str, Any]], str]) -> str:
    """Everything about the language model in benchmarks/README.md; where: a part's machine and versions in words."""
    parts = [introduction(results)]
    for name, (heading, part) in PARTS.items():
        if name in results:
            said = where(results[name])
            parts.append(f"### {heading}\n\nOn {said}.\n\n{part(results[name]['found'])}")
    return "\n\n".join(parts)


def introduction(results: dict[str, Any]) -> str:
    """What was trained, and on what."""
    size, text = results["size"], results["text"]
    epochs = size["steps"] * size["batch"] / size["train"]
    return (
        f"`python benchmarks/language_model.py`: a GPT of {size['parameters']:,} parameters ({size['layers']} layers, "
        f"width {size['width']}, tied embedding, GELU) learns {text['what']} ({text['characters']:,} characters, "
        f"SHA-256 `{text['sha256'][:16]}...`), of which {size['train']:,} random chunks of {size['length']} characters "
        f"are taken, {size['batch']} a step, in {size['steps']:,} steps of AdamW (rate {size['rate']:g} after "
        f"{size['warm_up']} steps of warm-up, eps {size['eps']:g}): {epochs:g} epochs."
    )


def scores_part(found: dict[str, Any]) -> str:
    """One query with its chunks: the one that a single chunk helps most."""
    query = min(found["queries"], key=lambda q: q["helpful"][0]["score"])
    rows = [
        [kind, f"{entry['score']:+.4f}", _code(entry["text"])]
        for kind in ("helpful", "harmful")
        for entry in query[kind]
    ]
    apart = found["difference_from_autograd"]
    return (
        f"The mean held-out loss is {found['held_out_loss']:.3f} nats per character; the weight of a chunk has a "
        f"derivative of {found['typical']:.1e} there (median of magnitudes; the largest {found['largest']:.1e}). Over "
        f"{apart['steps']} steps the metagradient in float32 differs from plain autograd's in float64 by "
        f"{apart['relative']:.0e} of its norm.\n\nOf {len(found['queries'])} held-out chunks that were asked about, "
        f"the one with the most helpful chunk, {_code(query['text'])}, loss {query['loss']:.3f}:\n\n"
        + table(["", "dL/dw", "chunk"], rows)
    )


def lds_part(found: dict[str, Any]) -> str:
    """Rank correlations."""
    singles = found["spearman_queries"]
    lines = found["pearson_queries"]
    rows = [["mean held-out loss", f"{found['spearman_mean_loss']:.3f}", f"{found['pearson_mean_loss']:.3f}"]]
    if singles:
        rows.append(
            [
                f"single chunks, mean of {len(singles)} (lowest, highest)",
                f"{_mean(singles):.3f} ({min(singles):.3f}, {max(singles):.3f})",
                f"{_mean(lines):.3f} ({min(lines):.3f}, {max(lines):.3f})",
            ]
        )
    return (
        f"Predicted against true change of loss over {found['retrainings']} trainings by torch.optim.AdamW in a plain "
        f"loop, each without a random {found['dropped']:.0%} of the chunks:\n\n"
        + table(["query", "LDS (Spearman)", "Pearson"], rows)
    )


def memory_part(found: list[dict[str, Any]]) -> str:
    """Peaks against T, and what plain autograd would need on its line."""
    rows = [[METHODS[r["method"]], f"{r['steps']:,}", f"{r['bytes'] / MIB:,.0f} MiB"] for r in found]
    graphs = [r for r in found if r["method"] == "autograd"]
    longest = max(r["steps"] for r in found if r["method"] == "ours")
    (a, b) = graphs
    slope = (b["bytes"] - a["bytes"]) / (b["steps"] - a["steps"])
    needed = b["bytes"] + slope * (longest - b["steps"])
    rows.append([f"{METHODS['autograd']}, on that line", f"{longest:,}", f"about {needed / 2**30:,.0f} GiB"])
    return "Peak above what was there before, in a fresh process each:\n\n" + table(["", "T", "extra peak"], rows)


def speed_part(found: dict[str, Any]) -> str:
    """Multiples of a training step."""
    titles = {"training": "training alone", "one": "metagradient, one query", "many": f"{found['queries']} queries"}
    rows = [
        [title, f"{found[name]['ms_per_step']:.0f}", f"{found[name]['ratio_to_training']:.2f}"]
        for name, title in titles.items()
    ]
    return f"T = {found['steps']}, {found['rounds']} rounds in turn:\n\n" + table(
        ["", "ms per step", "x training"], rows
    )


def bergson_part(found: dict[str, Any]) -> str:
    """MAGIC by bergson beside ours."""
    size, agreement, first = found["size"], found["agreement"], found["rows"][0]
    rows = [
        [
            WHO[row["who"]].format(mode=row["save_mode"]),
            str(row["queries"]),
            f"{row['seconds']:.1f} s",
            f"{row['bytes'] / MIB:,.0f} MiB",
            f"{row['disk_bytes'] / MIB:,.0f} MiB" if "disk_bytes" in row else "-",
        ]
        for row in found["rows"]
    ]
    made = ", ".join(f"{name} {first['versions'][name]}" for name in ("bergson", "transformers"))
    return (
        f"A GPT-2 from a configuration ({first['parameters']:,} parameters, embedding not tied), {size['train']:,} "
        f"chunks, batch {size['batch']}, T = {size['steps']}, the same start and order, AdamW; {made}, one thread. "
        "Training, the way back and, of bergson, its files are in the time:\n\n"
        + table(["", "queries", "time", "extra peak memory", "on disk"], rows)
        + f"\n\nThe scores of the two differ by {agreement['difference']:.0e} of their norm; the lowest correlation "
        f"of a query is {min(agreement['pearson']):.6f} (rank correlation {min(agreement['spearman']):.6f})."
    )


def adam_part(found: dict[str, Any]) -> str:
    """Ways back through Adam."""
    rows = []
    for row in found["rows"]:
        lost = f"lost after {row['lost_after']} steps back" if row["lost_after"] else ""
        error = (
            "not finite" if row["error"] is None else "0, bit for bit" if not row["error"] else f"{row['error']:.0e}"
        )
        rows.append(
            [
                WAYS[row["who"]],
                ", ".join(filter(None, [error, lost])),
                f"{row['state_bytes']:.0f}" if "state_bytes" in row else "-",
                f"{row['bits']:.3f}" if "bits" in row else "-",
                f"{row['bits_reserved']:.2f}" if "bits_reserved" in row else "-",
            ]
        )
    restated = next(row for row in found["rows"] if row["who"] == "restated")
    adam = load("adam")
    ours = f", ours {adam['bits']['kept']:.4f} (T = {adam['bits']['steps']:,})" if adam else ""
    header = ["way back", "error of theta_0", "state, bytes", "bits per step put away", "bits per step reserved"]
    return (
        f"A GPT of {found['parameters']:,} parameters, T = {found['steps']:,}, Adam with betas .9 and .999; all but "
        "the first column per parameter:\n\n"
        + table(header, rows)
        + f"\n\nIn the long run the restated store needs {restated['bits_in_the_long_run']:.4f} bits per parameter "
        f"and step{ours}; the entropy bound is {found['ideal']:.4f}. `reversible_data_attribution` trains a second "
        "time, in float64, to fill its buffers, and does not compare where its way back ends with the start; its "
        "scores are first-order: terms above five times the largest of the first 100 steps back are clamped, "
        "denominators kept above 1e-4, ratios of them below 5. The restatement is of its state arithmetic only."
    )


def _code(text: str) -> str:
    """Text in a table's cell, as code."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "scores": ("Which chunk did this", scores_part),
    "lds": ("Against true retrainings", lds_part),
    "memory": ("Memory of a metagradient", memory_part),
    "speed": ("Time of a metagradient", speed_part),
    "bergson": ("Beside bergson's MAGIC", bergson_part),
    "adam": ("Ways back through Adam", adam_part),
}
