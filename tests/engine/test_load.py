"""Load: long, wide, many, again and again. Each in a process of its own, so that its memory is its own; figures are
printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import revdistill as rd
from tests.engine.small import CE, data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

_COMMON = """
import gc, json, os, sys, time
from pathlib import Path
import torch, revdistill as rd
from torch import nn
torch.set_num_threads(1)
CE = nn.functional.cross_entropy

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def handles():
    return len(os.listdir("/proc/self/fd"))

def unrolled(net, x, y, steps, momentum, folder):
    loss, params = rd.from_module(net, CE)
    lr = torch.tensor(0.01, requires_grad=True)
    adjoint = rd.Reversible(folder, graph_bytes=0)
    sgd = rd.SGD(lr, momentum)
    theta, stats = rd.unroll(loss, params, (x, y), sgd, steps=steps, adjoint=adjoint, return_stats=True)
    torch.stack([p.square().sum() for p in theta.values()]).sum().backward()  # ReversalError unless every bit is back
    assert torch.isfinite(lr.grad) and lr.grad != 0
    return stats
"""


def measured(code: str, *arguments: str) -> dict[str, Any]:
    """What the code printed, as JSON.

    Large blocks go back to the system as soon as they are free (a setting of glibc's): what is measured is what is
    kept, not how the allocator's heap falls to pieces, which took one to three blocks of 8 MB here.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", _COMMON + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_LONG = """
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
x, y = torch.randn(7, 10, 10), torch.arange(70).reshape(7, 10) % 5
unrolled(net, x, y, 2000, 0.9, sys.argv[1])
before, open_before, started = status("VmHWM"), handles(), time.perf_counter()
stats = unrolled(net, x, y, 100_000, 0.9, sys.argv[1])
gc.collect()
print(json.dumps({"steps": stats.steps, "parameters": stats.parameters, "bits": stats.history_bits_per_parameter_step,
    "history_bytes": stats.history_bytes, "peak_rise": status("VmHWM") - before,
    "seconds": time.perf_counter() - started,
    "handles": handles() - open_before, "files": os.listdir(sys.argv[1])}))
"""


def test_a_hundred_thousand_steps_with_the_history_on_disk(tmp_path: Path) -> None:
    found = measured(_LONG, str(tmp_path))
    assert found["bits"] < 0.1521
    assert found["history_bytes"] == pytest.approx(0.1505 * found["parameters"] * 1e5 / 8, rel=0.01)
    assert found["peak_rise"] < 8 * 2**20  # a fingerprint of 8 bytes a step, and what allocators round up
    assert (found["handles"], found["files"]) == (0, [])


_WIDE = """
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(500, 1500), nn.Tanh(), nn.Linear(1500, 170), nn.Tanh(), nn.Linear(170, 10))
x, y = torch.randn(7, 5, 500), torch.arange(35).reshape(7, 5) % 10
unrolled(net, x, y, 800, 0.9, sys.argv[1])  # beyond the first words spilled
before, open_before, started = status("VmHWM"), handles(), time.perf_counter()
stats = unrolled(net, x, y, 10_000, 0.9, sys.argv[1])
print(json.dumps({"steps": stats.steps, "parameters": stats.parameters, "bits": stats.history_bits_per_parameter_step,
    "peak": before, "peak_rise": status("VmHWM") - before, "seconds": time.perf_counter() - started,
    "handles": handles() - open_before}))
"""


def test_a_million_parameters_for_ten_thousand_steps(tmp_path: Path) -> None:
    found = measured(_WIDE, str(tmp_path))
    assert found["parameters"] > 1_000_000
    assert found["bits"] < 0.1521
    # Seen: about one buffer of 8 bytes a parameter, some steps into the way back; none between 400 and 1,600 steps.
    # Kept on the device, the history alone would take 186 bytes a parameter, where this is 16.
    assert found["peak_rise"] < 2 * 8 * found["parameters"]
    assert found["handles"] == 0


def test_a_thousand_stacked_networks() -> None:
    """Each trains as it would alone, and has the hypergradient that it would have alone."""
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double() for _ in range(1000)
    ]
    x, y = data(5)
    x = x.detach().double()
    loss, params = rd.stack_modules(nets, CE)
    lr = torch.full((200, 1000), 0.1, dtype=torch.float64, requires_grad=True)
    theta = rd.unroll(loss, params, (x, y), rd.SGD(lr, 0.9), steps=200)
    torch.stack([p.square().sum() for p in theta.values()]).sum().backward()
    assert lr.grad is not None
    for i in (0, 17, 999):
        alone, own = rd.from_module(nets[i], CE)
        rate = torch.full((200,), 0.1, dtype=torch.float64, requires_grad=True)
        end = rd.unroll(alone, own, (x, y), rd.SGD(rate, 0.9), steps=200)
        torch.stack([p.square().sum() for p in end.values()]).sum().backward()
        for name, p in end.items():
            torch.testing.assert_close(theta[name][i], p, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(lr.grad[:, i], rate.grad, rtol=1e-7, atol=1e-10)


_AGAIN = """
from revdistill.distill.checkpoint import save
from revdistill.distill.config import Config
from revdistill.outer.data import load
from revdistill.distill.distiller import Distiller
config = Config(dataset="moons", architectures=("NonLinearNet", "MoreNonLinearNet"), steps=4, epochs=3,
                outer_steps=10**6,
    batch_size=64, learn_labels=True, average=1.0)
distiller = Distiller(config, load("moons"))

def several(count):
    for _ in range(count):
        distiller.step()
        if distiller.outer_step % 50 == 0:
            distiller.validation_accuracy()
            save(Path(sys.argv[1]) / "checkpoint.h5", distiller)

def alive():
    gc.collect()
    return len([o for o in gc.get_objects() if isinstance(o, torch.Tensor)])

several(300)
tensors, memory, open_before, started = alive(), status("VmRSS"), handles(), time.perf_counter()
several(3000)
print(json.dumps({"outer_steps": 3000, "tensors": alive() - tensors, "memory": memory,
                  "memory_rise": status("VmRSS") - memory,
    "handles": handles() - open_before, "seconds": time.perf_counter() - started}))
"""


def test_thousands_of_outer_steps_leave_nothing_behind(tmp_path: Path) -> None:
    """Two hours' worth of a small distillation's outer steps, in short form."""
    found = measured(_AGAIN, str(tmp_path))
    assert found["tensors"] == 0
    assert found["handles"] == 0
    assert found["memory_rise"] < 0.01 * found["memory"]
