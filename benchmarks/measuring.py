"""What the benchmarks share: the machine, peak memory, workers in processes of their own, and JSON in results/."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import ADAM_METHODS, METHODS
from tasks import KINDS, make

import revdistill as rd

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MIB = 2**20


def machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """What a figure must be read with."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "system": platform.system(),
        "device": device,
    }
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Of what was measured."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "revdistill": rd.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    vectors = (
        "AVX-512"
        if any("avx512f" in line for line in lines)
        else "AVX2"
        if any("avx2" in line for line in lines)
        else ""
    )
    return f"{name}, {vectors}" if vectors else name


def save(name: str, results: dict[str, Any], device: str = "cpu", *, indent: int | None = 1) -> Path:
    """results/NAME.json, or NAME-cuda.json; indent: as json's."""
    RESULTS.mkdir(exist_ok=True)
    path = _path(name, device)
    path.write_text(json.dumps(results, indent=indent) + "\n")
    print(f"wrote {path}")
    return path


def load(name: str, device: str = "cpu") -> dict[str, Any] | None:
    """The committed results of that name, or None."""
    path = _path(name, device)
    return json.loads(path.read_text()) if path.exists() else None


def _path(name: str, device: str) -> Path:
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-cuda.json")


def _memory(field: str) -> int:
    """Bytes, of this process (Linux). Not getrusage, which counts the parent's before exec."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def give_back() -> None:
    """Return what is free to the system: it would hide a later rise, and many workers' leftovers would fill the
    machine.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """`with PeakMemory(device) as peak: ...; peak.nbytes`: how far memory rose above where it was."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.nbytes = 0

    def __enter__(self) -> PeakMemory:
        give_back()
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            self._before = _memory("VmRSS")
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        peak = _memory("VmHWM") if self.device == "cpu" else torch.cuda.max_memory_allocated()
        self.nbytes = peak - self._before


class Worker:
    """One method on one task in a process of its own, which answers one request at a time."""

    def __init__(self, task: str, method: str, device: str, threads: int) -> None:
        self.method = method
        command = [
            sys.executable,
            __file__,
            "--task",
            task,
            "--method",
            method,
            "--device",
            device,
            "--threads",
            str(threads),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer, or {"error": ...} where the method failed or its process died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"the process ended (exit code {self._process.wait()})"}

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def _serve(arguments: argparse.Namespace) -> None:
    """The worker's side: read requests, write answers."""
    torch.set_num_threads(arguments.threads)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    method = (METHODS | ADAM_METHODS)[arguments.method]
    tasks: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        dtype = request.get("dtype", "float32")
        if dtype not in tasks:
            tasks[dtype] = make(arguments.task, dtype=getattr(torch, dtype), device=arguments.device)
        try:
            answer = _answer(request, method, tasks[dtype], arguments.device)
        except Exception as error:  # a rival's failure is a result
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0][:200] if text else ''}"}
        give_back()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _answer(request: dict[str, Any], method: Any, task: Any, device: str) -> dict[str, Any]:
    steps = request["steps"]
    if request["do"] == "check":
        x, lr = method.run(task, steps)
        np.save(
            request["path"],
            torch.cat([t.detach().reshape(-1).double().cpu() for t in (x, lr) if t is not None]).numpy(),
        )
        return {"entries": sum(t.numel() for t in (x, lr) if t is not None)}
    if request["do"] == "time":
        method.run(task, max(1, steps // 5))  # the caches and the clock were another method's
        _synchronise(device)
        started = time.perf_counter()
        method.run(task, steps)
        _synchronise(device)
        return {"seconds": time.perf_counter() - started}
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        method.run(task, steps)
        _synchronise(device)
        seconds = time.perf_counter() - started
    return {"bytes": peak.nbytes, "seconds": seconds}


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def disagreement(path: Path, reference: Path) -> float:
    """The relative difference of two saved hypergradients; the first may lack the rates, which come last."""
    found, expected = np.load(path), np.load(reference)
    expected = expected[: len(found)]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def task_arguments_of(description: str | None) -> argparse.ArgumentParser:
    """Those of a benchmark over tasks and methods."""
    parser = arguments_of(description)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(KINDS), help="default: the small ones on a CPU, all on a GPU"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), help="default: all; memory.py: the main ones but on the MLP"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser


def chosen_tasks(options: argparse.Namespace) -> list[str]:
    """What --tasks says, or its default for the device."""
    return options.tasks or [name for name, kind in KINDS.items() if not (kind.for_gpu and options.device == "cpu")]


if __name__ == "__main__":
    options = arguments_of(None)
    options.add_argument("--task", required=True)
    options.add_argument("--method", required=True)
    options.add_argument("--threads", type=int, required=True)
    _serve(options.parse_args())
