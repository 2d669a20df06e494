"""What surrounds an unroll on a device: torch's settings and generators, the environment, the outer loop's code, other
threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.place import here
from torch import Tensor

import revdistill as rd
from revdistill.distill import augment
from revdistill.distill import config as configuration
from revdistill.distill import distiller as distilling
from revdistill.distill.config import Config
from revdistill.distill.distiller import Distiller
from revdistill.engine.loss.determinism import CUBLAS_VARIABLE, repeatable
from revdistill.engine.loss.randomness import generators_of
from revdistill.outer.data import load
from tests.cuda.cases import CPU, DEVICE, assert_same, case, hypergradient

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds, before a thread counts as hanging
only_on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA's own settings")


def settings() -> tuple[Any, ...]:
    """What torch keeps for the whole process and an unroll changes."""
    backends: Any = torch.backends
    owners = (backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    return (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_float32_matmul_precision(),
        (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32),
        [owner.fp32_precision for owner in owners if hasattr(owner, "fp32_precision")],
        (
            backends.cuda.math_sdp_enabled(),
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
        ),
    )


@pytest.mark.parametrize("name", ["mlp", "groupnorm", "attention"])
def test_tensorfloat_32_changes_no_bit_and_is_left_as_it_was(device: torch.device, name: str) -> None:
    problem, found = case(name, torch.float32, device), []
    start = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            before = settings()
            found.append(hypergradient(problem, rd.Reversible(graph_bytes=0)))
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision(start)
    assert_same(found[1], found[0])


@only_on_cuda
def test_tensorfloat_32_would_have_changed_bits(device: torch.device) -> None:
    """Or the test above says nothing. (GPUs before Ampere have none.)"""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TensorFloat-32")
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    start, products = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            products.append(a @ a)
        assert not torch.equal(*products)
        torch.set_float32_matmul_precision("high")
        with repeatable(device):
            assert torch.equal(a @ a, products[0])
    finally:
        torch.set_float32_matmul_precision(start)


@pytest.mark.parametrize("adjoint", [rd.Reversible(graph_bytes=0), rd.Backprop()], ids=lambda a: type(a).__name__)
def test_on_step_sees_torch_as_the_caller_left_it(device: torch.device, adjoint: Any) -> None:
    seen: list[Any] = []
    cudnn: Any = torch.backends.cudnn
    before_benchmark = cudnn.benchmark
    try:
        cudnn.benchmark = True
        before = settings()
        problem = case("dropout", torch.float32, device)
        hypergradient(problem, adjoint, 4, on_step=lambda *_: seen.append(settings()))
        assert seen == [before] * 4
        assert settings() == before
    finally:
        cudnn.benchmark = before_benchmark


@pytest.mark.parametrize(
    "adjoint", [rd.Reversible(graph_bytes=0), rd.Checkpoint(), rd.Backprop()], ids=lambda a: type(a).__name__
)
def test_the_callers_random_numbers_go_on_as_if_nothing_had_been(device: torch.device, adjoint: Any) -> None:
    """Though the loss draws some, from the device's generator."""
    problem = case("dropout", torch.float32, device)
    before = [generator.get_state() for generator in generators_of(device)]
    hypergradient(problem, adjoint, 6)
    assert all(map(torch.equal, [generator.get_state() for generator in generators_of(device)], before))


_UNROLL = """
import os, sys
sys.path[:0] = [{root!r}, {benchmarks!r}]
import torch
{imports}
from gpu.place import here
with here({device!r}) as device:
    a = torch.ones(8, 8, device=device)
    a @ a
    import revdistill as rd
    w = torch.eye(8, device=device, requires_grad=True)
    def loss(params, batch):
        return (a @ params["w"]).square().mean()
    theta = rd.unroll(loss, {{"w": w}}, lambda k: (), rd.SGD(0.01, 0.9), steps=3)
    theta["w"].sum().backward()

    b = torch.ones(8, 8, dtype=torch.float64)
    start = torch.eye(8, dtype=torch.float64, requires_grad=True)
    now, v = start, torch.zeros_like(start)
    for _ in range(3):
        v = 0.9 * v + torch.autograd.grad((b @ now).square().mean(), now, create_graph=True)[0]
        now = now - 0.01 * v
    now.sum().backward()
    for found, expected in ((theta["w"].detach(), now.detach()), (w.grad, start.grad)):
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)
    print("right", flush=True)
    if device.type == "standin":
        os._exit(0)  # torch 2.11 aborts where a thread of autograd's for such a device is still there at the end
"""


def in_a_process(imports: str = "") -> subprocess.CompletedProcess[str]:
    """A matrix product, then an unroll beside a loop in float64, in a process that does not inherit what importing
    revdistill has set in this one.
    """
    code = _UNROLL.format(root=str(ROOT), benchmarks=str(ROOT / "benchmarks"), device=DEVICE, imports=imports)
    environment = {name: value for name, value in os.environ.items() if name != CUBLAS_VARIABLE}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_a_product_after_the_import_and_before_the_first_unroll(device: torch.device) -> None:
    done = in_a_process("import revdistill")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_a_product_before_the_import_is_right_or_an_error_that_says_what_to_do(device: torch.device) -> None:
    """Whether torch still takes CUBLAS_WORKSPACE_CONFIG after its first product differs between its versions."""
    done = in_a_process()
    if done.returncode == 0:
        assert done.stdout == "right\n"
        return
    named = [line for line in done.stderr.splitlines() if "UnsupportedError: " in line]
    assert any(CUBLAS_VARIABLE in line and "import revdistill" in line for line in named), done.stderr


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_augmentations_have_one_gradient(device: torch.device, name: str) -> None:
    """As an outer loop takes it, which wants deterministic kernels: the same bits twice, and near the CPU's."""
    draw = torch.Generator().manual_seed(0)
    images, weights = torch.randn(2, 6, 3, 16, 16, generator=draw).unbind(0)

    def gradient(where: torch.device, seed: int) -> Tensor:
        x = images.to(where, copy=True).requires_grad_()
        with repeatable(where):
            made = augment.draw((name,), torch.Generator().manual_seed(seed))(x)
            return torch.autograd.grad((made * weights.to(where)).sum(), x)[0].cpu()

    for seed in range(3):
        found, again = gradient(device, seed), gradient(device, seed)
        assert torch.equal(found, again)
        torch.testing.assert_close(found, gradient(CPU, seed), rtol=1e-4, atol=1e-4)


SMALL = Config(
    dataset="digits",
    architectures=("MLP",),
    steps=4,
    epochs=3,
    per_class=1,
    outer_steps=3,
    batch_size=64,
    learn_labels=True,
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"augment": ("color", "flip")}, {"augment": ("crop", "scale", "rotate")}, {"optimizer": "adam"}],
    ids=str,
)
def test_distilling_twice_gives_the_same_bits(
    device: torch.device, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "standin":  # no device of the library's
        for module in (configuration, distilling):
            monkeypatch.setattr(module, "check_device", torch.device)
    config = Config.from_dict(SMALL.to_dict() | {"device": str(device)} | changes)
    data, runs = load("digits"), []
    for _ in range(2):
        distiller = Distiller(config, data)
        losses = [distiller.step().loss for _ in range(config.outer_steps)]
        leaves = {name: leaf.detach().cpu() for name, leaf in distiller.synthetic.leaves.items()}
        runs.append((losses, distiller.validation_accuracy(), leaves))
    assert runs[0][:2] == runs[1][:2]
    assert_same(runs[1][2], runs[0][2])
    start = Distiller(config, data).synthetic.leaves
    assert not any(torch.equal(leaf.detach().cpu(), runs[0][2][name]) for name, leaf in start.items())


# Last: a thread that hangs holds the library's lock, and every later test would wait for it.
def test_two_threads_forward_and_back_at_once(device: torch.device) -> None:
    """autograd has one thread for a GPU: each way back must not wait there for the other one's turn."""
    # Made before the threads start: a network draws its parameters from torch's one generator, and so from the other's
    # losses.
    problems = [case(name, torch.float32, device) for name in ("mlp", "dropout")]
    expected = [hypergradient(problem, rd.Reversible(graph_bytes=0)) for problem in problems]
    found: dict[int, Any] = {}

    def one(i: int) -> None:
        try:
            with here(DEVICE):
                found[i] = [hypergradient(problems[i], rd.Reversible(graph_bytes=0)) for _ in range(2)]
        except BaseException as error:  # told where it can be seen
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), f"still going after {PATIENCE} s"
    for i, gradients in found.items():
        if isinstance(gradients, BaseException):
            raise gradients
        for gradient in gradients:
            assert_same(gradient, expected[i])
    assert sorted(found) == [0, 1]
