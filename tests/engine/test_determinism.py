"""torch's settings around a pass: those that a GPU reads can be made, read and put back without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revdistill as rd
from revdistill.engine.loss import determinism
from revdistill.engine.loss.precision import without_tf32
from revdistill.engine.loss.randomness import seeded
from revdistill.engine.selfcheck import checks
from tests.engine.small import CE, data, mlp

CPU = torch.device("cpu")
backends: Any = torch.backends


def _set(owner: Callable[[], Any], name: str, value: str | bool) -> Callable[[], None]:
    return lambda: setattr(owner(), name, value)


# What users do; those with fp32_precision since torch 2.9
SETTINGS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old, matmul": _set(lambda: backends.cuda.matmul, "allow_tf32", True),
    "old, cudnn": _set(lambda: backends.cudnn, "allow_tf32", False),
}
if hasattr(backends.cuda.matmul, "fp32_precision"):
    SETTINGS |= {
        "all tf32": _set(lambda: backends, "fp32_precision", "tf32"),
        "all ieee": _set(lambda: backends, "fp32_precision", "ieee"),
        "cudnn ieee": _set(lambda: backends.cudnn, "fp32_precision", "ieee"),
        "conv ieee": _set(lambda: backends.cudnn.conv, "fp32_precision", "ieee"),
        "matmul tf32": _set(lambda: backends.cuda.matmul, "fp32_precision", "tf32"),
        "cpu bf16": _set(lambda: backends.mkldnn.matmul, "fp32_precision", "bf16"),
    }


def read(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except (RuntimeError, AttributeError) as error:  # disagreeing settings; an older torch
        return type(error)


def everything() -> dict[str, Any]:
    """Whatever can be read of precision."""
    owners = {
        "all": backends,
        "cudnn": backends.cudnn,
        "conv": getattr(backends.cudnn, "conv", None),
        "rnn": getattr(backends.cudnn, "rnn", None),
        "matmul": backends.cuda.matmul,
        "cpu": getattr(backends.mkldnn, "matmul", None),
    }
    found = {
        f"{name}.{key}": read(owner, key) for name, owner in owners.items() for key in ("fp32_precision", "allow_tf32")
    }
    try:
        found["matmul precision"] = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        found["matmul precision"] = type(error)
    return found


def check_setting(name: str) -> None:
    SETTINGS[name]()
    before = everything()
    with without_tf32():
        inside = everything()
        with torch.backends.cudnn.flags(enabled=False):  # as the library advises for recurrent layers
            pass
        assert everything() == inside
    assert everything() == before
    assert inside["matmul.allow_tf32"] is inside["cudnn.allow_tf32"] is False
    assert inside["matmul precision"] == "highest"
    precisions = {
        value for key, value in inside.items() if key.endswith("fp32_precision") and not key.startswith("all")
    }
    assert precisions <= {"ieee", AttributeError}


# torch starts with values that cannot be set again: each check is a fork of one process that has changed nothing.
_FORKS = """
import os, sys
{before}
failed = []
for name in {names!r}:
    child = os.fork()
    if not child:
        code = 1
        try:
            {check}
            code = 0
        except BaseException as error:
            print(name, repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    failed += [name] * (os.waitpid(child, 0)[1] != 0)
sys.exit(f"failed: {{failed}}" if failed else 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_tf32_is_off_can_be_read_and_is_put_back() -> None:
    """Regression: inside a passage the old switches disagreed with the new ones, and torch's own code that reads them
    raised.
    """
    code = _FORKS.format(
        before="from tests.engine.test_determinism import check_setting",
        names=list(SETTINGS),
        check="check_setting(name)",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tf32_is_off_in_passages_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches can be thrown without a GPU."""
    before = everything()
    monkeypatch.setattr(determinism, "generators_of", lambda device: [torch.default_generator])
    around = determinism.Determinism.capture(torch.device("cuda"), 0)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: without_tf32())  # torch's own warns without a GPU
    cudnn = backends.cudnn.benchmark, backends.cudnn.deterministic
    with around.passage():
        assert backends.cudnn.allow_tf32 is backends.cuda.matmul.allow_tf32 is False
        assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == (False, True)
        with around.watching():
            assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == cudnn
    assert everything() == before
    with determinism.repeatable(torch.device("cuda")):  # what an outer loop does around its unrolls
        assert backends.cudnn.allow_tf32 is backends.cuda.matmul.allow_tf32 is False
        assert torch.get_deterministic_debug_mode() == 2
    assert everything() == before
    assert torch.get_deterministic_debug_mode() == 0


# cuBLAS


_UNROLL = """
import revdistill as rd
p = {'w': torch.ones(2, requires_grad=True)}
rd.unroll(lambda p, b: p['w'].square().sum(), p, lambda k: (), rd.SGD(0.1), steps=2)['w'].sum().backward()
"""
# (what is done, the variable before, and after)
VARIABLES = [
    ("", None, None),
    ("import revdistill", None, ":4096:8"),
    ("import revdistill.cli.main", None, ":4096:8"),
    (_UNROLL, None, ":4096:8"),
    ("import revdistill", ":16:8", ":16:8"),
    ("import revdistill", ":0:0", ":0:0"),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_workspace_of_cublas_is_set_by_the_import_and_stays() -> None:
    """Regression: torch reads it once, at the first matrix product, and it was set inside a passage only."""
    variable = determinism.CUBLAS_VARIABLE
    check = (
        f"code, value, expected = name; {{}} if value is None else os.environ.update({variable}=value); "
        f"exec(code); assert os.environ.get({variable!r}) == expected, os.environ.get({variable!r})"
    )
    code = _FORKS.format(before="import torch, numba, sklearn", names=VARIABLES, check=check)
    environment = {name: v for name, v in os.environ.items() if name != variable}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


_CUBLAS_SAYS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS "
    "and you have "
    "CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment variable before "
    "running your PyTorch "
    "application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
)


@pytest.mark.parametrize(
    ("value", "cause"),
    [(":4096:8", "once, at the process's first matrix product on a GPU"), (":0:0", "and here it is ':0:0'")],
)
def test_a_product_before_the_import_is_named_as_the_cause(
    monkeypatch: pytest.MonkeyPatch, value: str, cause: str
) -> None:
    monkeypatch.setenv(determinism.CUBLAS_VARIABLE, value)
    _, params = rd.from_module(mlp(), CE)

    def refused(p: dict[str, Tensor], batch: Any) -> Tensor:
        raise RuntimeError(_CUBLAS_SAYS)

    with pytest.raises(rd.UnsupportedError, match=cause) as caught:
        rd.unroll(refused, params, data(5), rd.SGD(0.1), steps=2)
    assert "import" in str(caught.value)
    assert "torch said: Deterministic behavior" in str(caught.value)


# Random numbers


def test_seeded_gives_torchs_numbers_and_puts_the_callers_back() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(7, CPU):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), seeded(7, CPU):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gpus_generator_is_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: torch.manual_seed within fork_rng(devices=[]) seeds every GPU for good."""
    theirs = torch.Generator().manual_seed(3)  # stands for that of cuda:1
    monkeypatch.setattr(torch.cuda, "default_generators", (None, theirs))
    state = theirs.get_state()
    with seeded(7, torch.device("cuda", 1)):
        assert not torch.equal(theirs.get_state(), state)
    assert torch.equal(theirs.get_state(), state)


def test_nothing_in_the_engine_seeds_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_all(seed: int) -> None:
        raise AssertionError("seeds the generators of every GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    loss, params = rd.from_module(net, CE)
    batches = torch.randn(4, 6, 5), torch.arange(24).reshape(4, 6) % 3
    theta = rd.unroll(loss, params, batches, rd.SGD(0.1), steps=3)
    theta["0.weight"].sum().backward()
    assert next(checks(CPU)).passed
