"""Tuning a schedule: it helps, it can be followed by plain torch, it survives being killed; wrong input is one line."""

from __future__ import annotations

import errno
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from revdistill.cli import main as command
from torch import nn

import revdistill as rd
from revdistill.outer.data import load
from revdistill.outer.directory import METRICS, read_metrics
from revdistill.outer.job import InterruptedRunError
from revdistill.outer.models import build
from revdistill.outer.optimizers import accepted
from revdistill.outer.random_streams import NETWORKS, Minibatches, mix
from revdistill.tune import checkpoint as checkpoints
from revdistill.tune import schedule as schedules
from revdistill.tune.checkpoint import restore, save
from revdistill.tune.comparison import measure
from revdistill.tune.config import LEARNABLE, TuneConfig
from revdistill.tune.plots import schedule_figure
from revdistill.tune.schedule import Schedule, ScheduleLR, schedule_lr
from revdistill.tune.tuner import Tuner
from revdistill.tune.tuning import Tuning
from tests.outer.legible import illegible

QUICK = TuneConfig(
    dataset="moons", arch="MoreNonLinearNet", steps=20, outer_steps=4, learn=LEARNABLE, outer_batch=64, batch_size=32
)


def tuner(**changes: Any) -> Tuner:
    config = replace(QUICK, **changes)
    return Tuner(config, load(config.dataset))


def a_schedule(**changes: Any) -> Schedule:
    base = Schedule(
        lr=np.linspace(0.1, 0.01, 10, dtype=np.float32).reshape(5, 2),
        momentum=np.full((5, 2), 0.5, np.float32),
        weight_decay=np.array([0.0, 0.1], np.float32),
        init_scale=np.array([1.0, 2.0], np.float32),
        optimizer="sgd",
        groups=["0", "2"],
        config={"steps": 5},
        comparison={"start": {"loss": 1.0}},
    )
    return replace(base, **changes)


def test_a_tuned_schedule_is_better_on_data_it_never_saw(tmp_path: Path) -> None:
    """From a rate ten times too small: the loss on the test data falls far below that of the start."""
    slow = tuner(lr=0.002, momentum=0.5, outer_steps=25, outer_lr=0.3, learn=("lr", "momentum"))
    found = Tuning(tmp_path, slow).run(progress=False)
    start, learned = found.comparison["start"], found.comparison["learned"]
    assert learned["loss"] < 0.7 * start["loss"]
    assert learned["accuracy"] > start["accuracy"]
    assert found.lr.mean() > 0.004
    assert np.array_equal(found.init_scale, [1.0])  # not learned
    assert found.weight_decay == pytest.approx([1e-4])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_everything_that_is_learned_moves(optimizer: str, per_layer: bool) -> None:
    t = tuner(optimizer=optimizer, per_layer=per_layer, lr=0.01)
    start = t.schedule()
    for _ in range(3):
        report = t.step()
        assert math.isfinite(report.loss)
        assert report.longest > 0
    found = t.schedule()
    groups = 4 if per_layer else 1
    assert found.lr.shape == found.momentum.shape == (20, groups)
    assert found.weight_decay.shape == found.init_scale.shape == (groups,)
    for name in ("lr", "weight_decay", "init_scale"):
        assert (getattr(found, name) != getattr(start, name)).all(), name
    assert (found.momentum[1:] != start.momentum[1:]).all()  # at step 0 there is nothing that it could keep


def test_the_hypergradient_is_finite_differences_one() -> None:
    """In the direction of each leaf, at the first outer step, in float32: a tolerance to go with it."""
    t = tuner(arch="MLP", dataset="digits", steps=10, clip=0.0, batch_size=100, per_layer=True)
    start = t.stack.sample(mix(t.config.seed, NETWORKS, 0))

    def loss() -> float:
        from revdistill.engine import BackwardNorms

        with torch.no_grad():
            return float(t._outer_loss(0, t.parts[0], start, BackwardNorms()))

    from revdistill.engine import BackwardNorms

    t._outer_loss(0, t.parts[0], start, BackwardNorms()).backward()
    for name, leaf in t.leaves.items():
        assert leaf.grad is not None
        direction = torch.sign(leaf.grad)
        expected = float((leaf.grad * direction).sum())
        h = 0.01
        with torch.no_grad():
            leaf += h * direction
            up = loss()
            leaf -= 2 * h * direction
            down = loss()
            leaf += h * direction
        assert (up - down) / (2 * h) == pytest.approx(expected, rel=0.1, abs=3e-4), name


@pytest.mark.usefixtures("heard_signals")
def test_a_killed_tuning_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Tuning(tmp_path / "whole", tuner()).run(progress=False)
    t, original = tuner(), Tuner.step

    def step_and_stop(self: Tuner) -> Any:
        report = original(self)
        if self.outer_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return report

    monkeypatch.setattr(Tuner, "step", step_and_stop)
    with pytest.raises(InterruptedRunError, match="outer step 2"):
        Tuning(tmp_path / "killed", t).run(progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds a tuning"):
        Tuning(tmp_path / "killed", tuner()).run(progress=False)
    with pytest.raises(ValueError, match="another configuration"):
        Tuning(tmp_path / "killed", tuner(seed=1), resume=True).run(progress=False)
    resumed = Tuning(tmp_path / "killed", tuner(), resume=True).run(progress=False)
    for name in ("lr", "momentum", "weight_decay", "init_scale"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name))
    assert whole.comparison == resumed.comparison
    a, b = (read_metrics(tmp_path / name / METRICS) for name in ("whole", "killed"))
    seconds = [line.pop("seconds") for line in b]
    assert seconds == sorted(seconds)  # those before the kill count
    assert [{name: line[name] for name in b[0]} for line in a] == b
    assert [line["step"] for line in a] == [0, 1, 2, 3]


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a distillation: it goes on, says so, and what it ends with is the same."""
    whole, original = Tuning(tmp_path / "whole", tuner()).run(progress=False), checkpoints.save

    def full(path: Path, t: Tuner) -> None:
        if t.outer_step in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, t)

    monkeypatch.setattr(checkpoints, "save", full)
    found = Tuning(tmp_path / "full", tuner(), save_every=0.0).run(progress=False)
    assert np.array_equal(found.lr, whole.lr)
    assert capsys.readouterr().err.count("took nothing ([Errno 28] No space left on device); going on") == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tuning.h5"
    with pytest.raises(ValueError, match=r"holds no tuning\.h5"):
        restore(path, tuner())
    save(path, tuner())
    with h5py.File(path, "a") as file:
        file.attrs["outer_step"] = 99
    with pytest.raises(rd.ArtifactError, match="outer_step 99"):
        restore(path, tuner())


def test_divergence_is_skipped_and_in_the_end_an_error() -> None:
    t = tuner(lr=1e3, outer_steps=30, arch="NonLinearNet", weight_decay=10.0)
    assert all(t.step().diverged for _ in range(9))
    with pytest.raises((rd.RangeError, rd.NonFiniteError), match="10 outer steps in a row diverged"):
        t.step()


def test_explosions_are_reported_and_clipped() -> None:
    """A rate at the edge of chaos over many steps."""
    wild = dict(lr=1.5, momentum=0.9, steps=150, learn=("lr",), clip=0.0, arch="MoreNonLinearNet")
    free, tamed = tuner(**wild).step(), tuner(**wild, clip_back=1.0).step()
    assert free.explosion is not None
    assert free.longest > 1e3
    assert tamed.norm < free.norm
    calm = tuner().step()
    assert calm.explosion is None


def test_round_trip(tmp_path: Path) -> None:
    schedules.write(tmp_path, a_schedule())
    found = schedules.read(tmp_path)
    assert found.to_dict() == a_schedule().to_dict() == json.loads((tmp_path / "schedule.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["schedule.h5", "schedule.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ["0", "0"]}, "different names"),
        ({"groups": ["0"]}, "does not go with 1 groups"),
        ({"optimizer": "lion"}, f"expected {accepted()}"),
        ({"lr": -a_schedule().lr}, "at least 0"),
        ({"momentum": a_schedule().momentum + 1}, "below 1"),
        ({"lr": a_schedule().lr * np.nan}, "not finite"),
        ({"weight_decay": np.zeros(3, np.float32)}, "does not go with"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    schedules.write(tmp_path, a_schedule(**change))
    with pytest.raises(rd.ArtifactError, match=rf"schedule\.h5: .*{message}"):
        schedules.read(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_plain_torch_loop_follows_the_schedule(tmp_path: Path, optimizer: str) -> None:
    """schedule_lr's optimizer and LambdaLR take the steps of a loop that sets every number by hand, bit for bit."""
    schedules.write(tmp_path, a_schedule(optimizer=optimizer))
    s = schedules.read(tmp_path / "schedule.h5")
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    theirs = fresh()
    led, scheduler = schedule_lr(tmp_path, theirs)
    for _ in range(7):  # two steps longer than the schedule
        nn.functional.cross_entropy(theirs(x), y).backward()
        led.step()
        led.zero_grad()
        scheduler.step()

    mine = fresh()
    with torch.no_grad():
        mine[2].weight.mul_(2.0)
    groups = [
        {"params": list(mine[i].parameters()), "weight_decay": float(w)}
        for i, w in zip((0, 2), s.weight_decay, strict=True)
    ]
    plain: Any = torch.optim.SGD(groups, lr=0.0) if optimizer == "sgd" else torch.optim.Adam(groups)
    for k in range(7):
        for group, lr, momentum in zip(plain.param_groups, s.lr[min(k, 4)], s.momentum[min(k, 4)], strict=True):
            group["lr"] = float(lr)
            group |= {"momentum": float(momentum)} if optimizer == "sgd" else {"betas": (float(momentum), 0.999)}
        plain.zero_grad()
        nn.functional.cross_entropy(mine(x), y).backward()
        plain.step()
    for a, b in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing for parameter '1\.weight'; it has layers 0, 2"):
        a_schedule().make_optimizer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="1 parameter groups, but the schedule 2"):
        ScheduleLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), a_schedule())


def test_the_comparison_does_not_seed_the_generators_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_all(seed: int) -> None:
        raise AssertionError("the caller's generators on GPUs are lost")

    found = tuner()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    state = torch.get_rng_state()
    measure(found.schedule(), found.data, found.config.arch, batch_size=16, restarts=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_comparison_is_a_plain_loop() -> None:
    """One network, by hand with torch.optim, on the batches that the comparison uses."""
    data, config = load("moons"), QUICK
    schedule = tuner().schedule()
    found = measure(schedule, data, config.arch, batch_size=32, restarts=1, seed=5)
    from revdistill.outer.networks import NetworkStack
    from revdistill.outer.random_streams import evaluation_seed

    stack = NetworkStack(config.arch, 1, data.input_shape, data.classes, torch.device("cpu"))
    net = build(config.arch, data.input_shape, data.classes)
    drawn = stack.sample(evaluation_seed(5))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(drawn[name][0])
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    batch = Minibatches(data, 32, evaluation_seed(5))
    for k in range(config.steps):
        x, y = batch(k)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y.float()).backward()
        optimizer.step()
    accuracy = ((net(data.x_test)[:, 0] > 0) == data.y_test).float().mean()
    assert found.accuracy == pytest.approx(float(accuracy), abs=1e-3)
    expected = nn.functional.binary_cross_entropy_with_logits(net(data.x_test)[:, 0], data.y_test.float())
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_picture_has_every_group() -> None:
    figure = schedule_figure(a_schedule(), a_schedule())
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["0", "2", "start"]
    assert illegible(figure) == []
    plt.close(figure)


ARGUMENTS = [
    "tune",
    "--dataset",
    "moons",
    "--arch",
    "nonlinearnet",
    "--steps",
    "8",
    "--outer-steps",
    "3",
    "--learn",
    "lr,init",
]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert command.run([*ARGUMENTS, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "learning lr, init in 3 outer steps" in printed
    assert "learned" in printed
    assert "start" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "schedule.h5",
        "schedule.json",
        "schedule.png",
        "tuning.h5",
        "metrics.jsonl",
    }
    assert command.run(["show", out]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "learned lr, init",
        "groups all parameters alike",
        "initial scale",
        "start ",
        f"picture: {out}/schedule.png",
    ):
        assert text in shown
    assert command.run(["evaluate", out]) == 2
    assert "holds no distilled.h5 but a tuning's schedule.h5 (revdistill show" in capsys.readouterr().err
    assert command.run(["show", out, "--dataset", "moons"]) == 2
    assert "--dataset: " in capsys.readouterr().err
    assert command.run([*ARGUMENTS, "--out", out]) == 2
    assert "already holds a tuning" in capsys.readouterr().err
    assert command.run([*ARGUMENTS, "--out", out, "--resume"]) == 0  # done: compared once more
    assert command.run(["tune", "--out", out, "--resume", "--lr", "0.3"]) == 2
    assert "--lr is 0.3, but the tuning in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--learn", "lr,speed"],
            "learn is ('lr', 'speed'); accepted is names out of lr, momentum, weight-decay, init",
        ),
        (["--learn", ""], "learn is ()"),
        (["--learn", "momentum", "--momentum", "0"], "momentum is 0.0; accepted is a number above 0"),
        (["--learn", "init", "--window", "5"], "window is 5; accepted is none where init is learned"),
        (["--dataset", "nowhere.npz"], "--dataset: "),
        (["--resume"], "holds no tuning.h5"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.run(["tune", "--out", str(tmp_path / "run"), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(LEARNABLE), min_size=1, unique=True), st.booleans(), st.sampled_from(["sgd", "adam"]))
def test_configurations_survive_json(learn: list[str], per_layer: bool, optimizer: str) -> None:
    config = TuneConfig(learn=tuple(learn), per_layer=per_layer, optimizer=optimizer)
    assert TuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
