"""What does a user get in the first ten minutes: is the engine exact on this machine, and what does the default run
give?

    python benchmarks/headline.py     about three minutes

Writes results/headline.json and results/digits.png; `python benchmarks/report.py` puts the figures into the README.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, machine, save, versions

from revdistill.distill.artifact import read
from revdistill.engine.selfcheck import checks

ARGUMENTS = ["train", "--steps", "30", "--epochs", "3"]


def default_run() -> dict[str, Any]:
    """The README's first command, and its picture."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "revdistill.cli", *ARGUMENTS], check=True, cwd=folder)
        seconds = time.perf_counter() - started
        run = Path(folder) / "runs/digits"
        evaluation = read(run / "distilled.h5").evaluation
        shutil.copy(run / "plots/images.png", RESULTS / "digits.png")
    return {"command": " ".join(["revdistill", *ARGUMENTS]), "seconds": seconds, "evaluation": evaluation}


def main() -> None:
    """The command."""
    verified = [check.__dict__ for check in checks(torch.device("cpu"))]
    for check in verified:
        print(f"{check['kind']}: {check['name']}: {check['found']}", flush=True)
    results = {"machine": machine("cpu"), "versions": versions(), "verify": verified, "default_run": default_run()}
    save("headline", results)


if __name__ == "__main__":
    main()
