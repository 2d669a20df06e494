"""What was measured on: versions, the card, its driver and memory.  python -m gpu.machine --device cuda"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

# Before revdistill is imported, which sets it.
_CUBLAS = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

from gpu.lines import attempt, options_of, write  # noqa: E402
from gpu.place import missing  # noqa: E402


def card() -> dict[str, Any]:
    """The GPU as torch and its driver describe it."""
    found, cudnn = torch.cuda.get_device_properties(0), vars(torch.backends)["cudnn"]
    a = torch.randn(64, 64, device="cuda")
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "bytes": found.total_memory,
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "works": bool(torch.isfinite(a @ a).all()),
    }


def driver() -> str:
    """As nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    from measuring import machine, versions

    on_cuda = options.device == "cuda" and missing("cuda") is None
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "h5py", "click", "scikit-learn")}
    write(
        "machine",
        device=options.device,
        quick=options.quick,
        commit=os.environ.get("REVDISTILL_COMMIT"),
        machine=machine("cuda" if on_cuda else "cpu"),
        versions=versions(),
        packages=packages,
        system=platform.platform(),
        cublas={"before": _CUBLAS, "after": os.environ.get("CUBLAS_WORKSPACE_CONFIG")},
    )
    if options.device == "cuda":
        with attempt("machine", what="card"):
            write("machine", card=card(), driver=driver())


if __name__ == "__main__":
    main()
