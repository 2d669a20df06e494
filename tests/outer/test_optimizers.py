"""The registry of optimizers: one entry is all that it takes to have another one everywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import revdistill as rd
from revdistill.outer.optimizers import OPTIMIZERS, accepted

# Heavy-ball momentum with another dampening: the engine's SGD and torch.optim's, with the same constant.
COMMAND = """
import sys
import torch
import revdistill as rd
from revdistill.outer.optimizers import OPTIMIZERS, Family, set_momentum

OPTIMIZERS["damped"] = Family(
    title="damped SGD",
    engine=lambda lr, momentum, decay: rd.SGD(lr, momentum, dampening=0.25, weight_decay=decay),
    plain=lambda groups, lr: torch.optim.SGD(groups, lr=lr, dampening=0.25),
    set_momentum=set_momentum,
    momentum_name="friction",
)
from revdistill.cli.main import run

for line in sys.stdin:
    print("exit code", run(line.split()), flush=True)
"""


def commands(*lines: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND], input="\n".join(lines), cwd=cwd, capture_output=True, text=True, check=False
    )


def test_another_optimizer_is_one_entry(tmp_path: Path) -> None:
    """A toy one goes through train, the artifact, show, evaluate and tune, and its constants with it."""
    usual = "--dataset moons --arch NonLinearNet --steps 4 --outer-steps 2"
    done = commands(
        f"train {usual} --epochs 2 --batch-size 64 --optimizer damped --momentum 0.5 --out run",
        "show run",
        "evaluate run --restarts 2 --json",
        f"tune {usual} --optimizer damped --learn lr,momentum --out tuned",
        "evaluate run --schedule strategy1",
        f"train {usual} --optimizer damped --momentum 1 --out other",
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert re.findall(r"^exit code (.*)$", done.stdout, flags=re.M) == ["0"] * 4 + ["2"] * 2
    assert "friction" in done.stdout
    assert "steps of damped" in done.stdout
    refused, other = done.stderr.splitlines()  # nothing of the first four
    assert "distilled for damped SGD" in refused
    assert "momentum is 1.0; accepted is a number below 1, as damped SGD's friction" in other
    assert json.loads((tmp_path / "tuned/schedule.json").read_text())["optimizer"] == "damped"
    from revdistill.distill.artifact import read

    with pytest.raises(rd.ArtifactError, match=f"'optimizer' is 'damped'; expected {accepted()}"):
        read(tmp_path / "run/distilled.h5")  # here nobody has registered it


EPS = 0.25
FAMILIES = OPTIMIZERS | {f"{name}, eps": f.with_eps(EPS) for name, f in OPTIMIZERS.items() if f.with_eps is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engines_and_torchs_are_the_same(name: str) -> None:
    """Every entry: training by torch.optim takes the steps that are differentiated through."""
    family, steps = FAMILIES[name], 6
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(steps, 8, 4, generator=generator), torch.randint(3, (steps, 8), generator=generator)
    lr, momentum = torch.linspace(0.02, 0.01, steps), torch.arange(8, 8 + steps) / 16  # each is an n / 2^16
    net = torch.nn.Linear(4, 3).double()
    loss, params = rd.from_module(net, torch.nn.functional.cross_entropy)
    theta = rd.unroll(loss, params, (x.double(), y), family.engine(lr, momentum, 0.125), steps=steps)
    plain = family.plain([{"params": list(net.parameters()), "weight_decay": 0.125}], 0.0)
    assert plain.defaults.get("eps") in ((EPS,) if name.endswith("eps") else (None, 1e-8))
    for k in range(steps):
        (group,) = plain.param_groups
        group["lr"] = float(lr[k])
        family.set_momentum(group, float(momentum[k]))
        plain.zero_grad()
        torch.nn.functional.cross_entropy(net(x[k].double()), y[k]).backward()
        plain.step()
    for parameter, value in net.named_parameters():
        torch.testing.assert_close(theta[parameter].detach(), value.detach(), rtol=1e-5, atol=1e-7)
