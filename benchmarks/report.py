"""Tables and pictures from the JSON in results/: benchmarks/README.md, results/*.png, and the sections of README.md
and docs/*.md that have marks (pages.py).

python benchmarks/report.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pages
import report_attribution
import report_bits
import report_cuda
import report_flipped
import report_front
import report_images
import report_images_race
import report_language_model
import report_memory
import report_scale
import report_speed
import report_study
import report_study_pictures
import report_tuning
import report_tuning_pictures
from matplotlib.figure import Figure
from measuring import HERE, MIB, RESULTS, load
from tables import where

from revdistill.distill.artifact import read
from revdistill.distill.image_grid import images
from revdistill.outer.drawing import save

DEVICES = (("cpu", "", ""), ("cuda", "-cuda", " on a GPU"))
TIMED = {"speed": ("Speed", report_speed), "memory": ("Memory", report_memory)}


def headline_summary(results: dict[str, Any]) -> str:
    """The default run and the engine's own checks."""
    run = results["default_run"]
    (name, evaluation), *_ = run["evaluation"].items()
    gradients = [check for check in results["verify"] if check["kind"] == "gradients"]
    worst = max(float(check["found"].split()[-1]) for check in gradients)
    place = where(results | {"machine": results["machine"] | {"threads": run["threads"]}})
    return "\n".join(
        [
            f"On {place}:",
            "",
            f"- `{run['command']}`: {evaluation['mean']:.1%} +- {evaluation['std']:.1%} test accuracy, {name}, "
            f"{evaluation['restarts']} fresh networks, in {run['seconds']:.0f} s"
            f"{_beside(results.get('beside_others'))}.",
            f"- `revdistill verify`: hypergradients against float64 autograd, worst relative error {worst:.1e} "
            f"({len(gradients)} combinations).",
        ]
    )


def _beside(run: dict[str, Any] | None) -> str:
    """How long it takes where every core has other work as well."""
    return f" ({run['seconds']:.0f} s beside {run['others']} other busy processes)" if run else ""


def first_unroll(results: dict[str, Any]) -> str:
    """What a process pays once."""
    kept, fresh = results["first_unroll"]["later"], results["first_unroll"]["nothing kept"]["first"]
    torch, loaded, first, second = (_cost(kept[part]) for part in ("torch", "import", "first", "second"))
    return (
        f"`import revdistill` takes {loaded} beside torch. The first unroll of a process and its way back (four steps "
        f"of a small network) take {first}, the second {second}: the loops on integers are loaded as machine code. "
        f"(torch's own first product of a Hessian and a vector takes {torch} besides, as it loads sympy.) The first "
        f"unroll ever on a machine compiles the loops by numba, {_cost(fresh)}, and keeps them in the user's cache "
        "(`$XDG_CACHE_HOME/revdistill` or `~/.cache/revdistill`; where that takes nothing, beside the package). Where "
        "nothing can be kept, each process pays that. What is there may be deleted at any time; what others could have "
        "written is not loaded."
    )


def _cost(found: dict[str, float]) -> str:
    return f"{found['seconds']:.2g} s and {found['bytes'] / MIB:.0f} MiB"


def everything() -> dict[str, Any]:
    """Name -> the committed results, of all that there are."""
    names = ("speed", "memory", "headline", "medvedev2020", "images", "adam", "maclaurin2015", "language_model")
    names += ("attribution", "attribution_cost", "flipped", "bits", "scale", "maclaurin_drawn")
    found = {name: load(name) for name in names} | {f"{name}-cuda": load(name, "cuda") for name in TIMED}
    found["cuda"] = report_cuda.load(RESULTS / "cuda.jsonl")
    return {name: results for name, results in found.items() if results}


def pictures(results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of all that there is JSON or an artifact for, one after another."""
    for _, suffix, _ in DEVICES:
        for name, (_, module) in TIMED.items():
            if name + suffix in results:
                yield f"{name}{suffix}", module.picture(results[name + suffix])
    if "medvedev2020" in results:
        for name, figure in report_study_pictures.pictures(results["medvedev2020"]).items():
            yield f"medvedev2020-{name}", figure
    if "maclaurin_drawn" in results:
        yield from report_tuning_pictures.pictures(results["maclaurin_drawn"])
    if "race" in results.get("images", {}):
        yield "images-race", report_images_race.picture(results["images"])
    for name, module in (("attribution", report_attribution), ("bits", report_bits)):
        if name in results:
            yield name, module.picture(results[name])
    for path in sorted(RESULTS.glob("*.h5")):
        yield path.stem, images(read(path))


def own_page(results: dict[str, Any]) -> str:
    """benchmarks/README.md."""
    parts = [(HERE / "introduction.md").read_text().rstrip()]
    for _, suffix, words in DEVICES:
        for name, (heading, module) in TIMED.items():
            if name + suffix in results:
                title = f"{heading}{words}"
                picture = f"![{title}](results/{name}{suffix}.png)"
                parts += [f"## {title}", picture, module.section(results[name + suffix])]
    for name, heading, picture, write in (
        ("medvedev2020", "The data distillation study (Medvedev 2020)", "", report_study.section),
        ("images", "Images: MNIST and CIFAR-10", "", report_images.section),
        ("adam", "Adam", "", _placed(report_tuning.adam_section)),
        ("maclaurin2015", "Training schedules (Maclaurin et al. 2015)", "", _placed(report_tuning.schedules_section)),
        ("language_model", "A language model", "", lambda found: report_language_model.section(found, where)),
        (
            "attribution",
            "Attribution: which training example did this",
            "![LDS against smoothness](results/attribution.png)",
            _placed(report_attribution.section),
        ),
        ("attribution_cost", "Attribution: one and 100 queries", "", _placed(report_attribution.cost_section)),
        ("flipped", "Labels that are wrong, and other harm", "", _placed(report_flipped.section)),
        ("bits", "Bits", "![Bits per parameter and step](results/bits.png)", report_bits.section),
        ("scale", "More processes than one", "", lambda found: report_scale.section(found, where)),
        ("cuda", "On a GPU", "", report_cuda.section),
    ):
        if name in results:
            parts += [f"## {heading}", *([picture] if picture else []), write(results[name])]
    return pages.LINK.sub(r"\g<1>../", "\n\n".join(parts) + "\n").replace("](../benchmarks/", "](")


def _placed(write: Callable[[dict[str, Any], str], str]) -> Callable[[dict[str, Any]], str]:
    return lambda results: write(results, where(results))


def sections(results: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown, of the sections that may stand in README.md and docs/*.md."""
    found: dict[str, str] = {}

    def add(section: str, write: Callable[..., str], *names: str) -> None:
        if all(name in results for name in names):
            found[section] = write(*(results[name] for name in names))

    add("front-memory", report_front.memory, "memory", "speed")
    add("front-attribution", report_front.attribution, "attribution")
    add("front-distillation", report_front.distillation, "images")
    add("headline", headline_summary, "headline")
    add("first-unroll", first_unroll, "headline")
    add("speed", lambda r: f"{report_speed.summary(r)}\n\nOn {where(r)}.", "speed")
    add("memory", report_memory.summary, "memory")
    add("images", report_images.summary, "images")
    add("adam", _placed(report_tuning.adam_summary), "adam")
    add("schedules", report_tuning.schedules_table, "maclaurin2015")
    add("attribution-cost", report_attribution.cost_table, "attribution_cost")
    add("flipped", _placed(report_flipped.summary), "flipped")
    add("cuda", report_cuda.summary, "cuda")
    add("front-gpu", report_cuda.front, "cuda")
    add("study", report_study.summary, "medvedev2020")
    return found


def main() -> None:
    """Write everything that there is JSON for."""
    results = everything()
    written = sections(results)
    pages.write(written)  # first: it says what is wrong with the pages before anything is drawn
    (HERE / "README.md").write_text(own_page(results))
    for name, figure in pictures(results):
        save(figure, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
