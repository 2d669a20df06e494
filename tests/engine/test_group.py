"""rd.unroll on the processes of a group: the derivatives of one process, the same bits on all, one error for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import revdistill as rd
from tests.torchrun import ROOT, torchrun

WORKER = ROOT / "tests/engine/group_worker.py"
SECONDS = 15.0  # after which a rank that waits for another counts as hanging
OTHER = "on rank 1: "
SAME = " must be the same on all ranks of the group, but is not on ranks 0 and 1"
# what every rank is to raise, and words of its message
ERRORS = {
    "one fails": ("ValueError", OTHER + "a word"),
    "one fails in its own way": ("RankError", "rank 1 failed: OwnError: its own"),
    "one fails, back": ("RankError", "rank 1 failed: OwnError: its own"),
    "one fails, back, shard": ("TypeError", OTHER + "a word"),
    "not finite, shard=False": ("NonFiniteError", OTHER + "the gradient of params['0.weight']"),
    "not finite, shard=True": ("NonFiniteError", OTHER + "the gradient of params['0.weight']"),
    "out of range, shard=False": (
        "RangeError",
        "the velocity of params['2.bias'] left the fixed-point range at step 0",
    ),
    "out of range, shard=True": ("RangeError", OTHER + "the velocity of params['2.bias'] left"),
    "not repeated, shard=False": ("ReversalError", "on rank 0: the gradient at step 5 was not the same bit for bit"),
    "not repeated, shard=True": ("ReversalError", "on rank 0: the gradient at step 5 was not the same bit for bit"),
    "other start, shard=False": ("ReversalError", OTHER + "the way back over 9 steps did not end bit-exactly"),
    "other start, shard=True": ("ReversalError", OTHER + "the way back over 9 steps did not end bit-exactly"),
    "other outer loss, shard=False": ("UnsupportedError", "rd.distributed.copy"),
    "other outer loss, shard=True": ("UnsupportedError", "rd.distributed.copy"),
    "other outer losses": ("UnsupportedError", "dL/dtheta is not the same on ranks 0 and 1"),
    "other params": ("ValueError", "params" + SAME),
    "other rates": ("ValueError", "optimizer.lr" + SAME),
    "other optimizer": ("ValueError", "optimizer" + SAME),
    "other steps": ("ValueError", "steps" + SAME + ": 3 and 4"),
    "other seed": ("ValueError", "seed" + SAME + ": 3 and 4"),
    "other hyper": ("ValueError", "hyper" + SAME),
    "other adjoint": ("ValueError", "adjoint" + SAME),
    "other callback": ("ValueError", "on_step" + SAME),
    "other batches": ("RuntimeError", OTHER + "mat1 and mat2 shapes cannot be multiplied"),
    "other unused": ("UnsupportedError", "params['extra'] a gradient on rank 1 and none on rank 0, at step 0"),
    "other nothing": ("TypeError", "params must be a dict from name to tensor, got int"),
    "other backprop": ("UnsupportedError", "rd.Reversible(), rd.Checkpoint() or rd.StoreAll()"),
    "other graphs": ("UnsupportedError", "with a group use compile=False or compile=True"),
    "other shard": ("TypeError", OTHER + "shard must be a bool, got str"),
    "other grads": ("ValueError", "whether anything requires grad" + SAME + ": False and True"),
    "other seed of one": ("ValueError", "seed" + SAME + ": None and 3"),
    "other outputs": ("ValueError", "outputs and chunk_size must be the same on all ranks of the group"),
    "other chunks": ("ValueError", "outputs and chunk_size must be the same on all ranks of the group"),
    "tried again": ("ValueError", OTHER + "a word"),
    "changed in place": ("ReversalError", OTHER + "a tensor in batches or hyper was changed in place"),
    "other few": ("ValueError", "needs more than 2 parameters, got 2"),
    "other order": ("UnsupportedError", "rank 0 is at the start of the backward pass, rank 1 at the seed"),
    "one fails before an exchange": ("ValueError", OTHER + "a word"),
    "other shapes": ("ValueError", "gather of [2, 3], torch.float64 on rank 0 and rd.distributed.gather of [3, 2]"),
    "other operations": ("ValueError", "rd.distributed.sum of [7], torch.float64 on rank 0 and rd.distributed.gather"),
    "copied without a group": ("UnsupportedError", "the loss calls rd.distributed.copy, and the unroll has no group"),
    "copied apart": ("UnsupportedError", "rd.distributed.copy was given what is not the same on ranks 0 and 1"),
    "copied apart, back": ("UnsupportedError", "rd.distributed.copy was given what is not the same on ranks 0 and 1"),
    "unseen by autograd": (
        "UnsupportedError",
        "the loss calls allreduce of torch.distributed on a tensor that requires",
    ),
    "no group": ("UnsupportedError", "the loss calls allreduce of torch.distributed, and the unroll has no group"),
    "drift": ("ReversalError", "theta on ranks [1] is not what it is on rank 0 after 64 steps"),
    "full disk": ("OSError", "on rank 0: [Errno 28] No space left on device"),
    "killed": ("RankError", "another process of the group is gone"),
}


def ran(processes: int, part: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank noted."""
    done = torchrun(processes, [str(WORKER), str(folder), part], cwd=folder)
    files = [folder / f"{rank}.json" for rank in range(processes)]
    assert all(file.exists() for file in files), done.stderr
    return [json.loads(file.read_text()) for file in files]


def check(noted: list[dict[str, Any]], errors: dict[str, tuple[str, str]]) -> None:
    """Errors are as they are to be and the same on all ranks; differences from one process are of rounding."""
    wrong: list[str] = []
    for name, first in noted[0].items():
        each = [of[name] for of in noted if name in of]  # a rank that is killed notes nothing
        if name in errors:
            kind, words = errors[name]
            fine = all(of.get("error") == kind and words in of["message"] for of in each)
            same = all({**of, "seconds": first["seconds"]} == first for of in each)
            fine = fine and (same or name == "killed")
        else:
            found = [of.get("found", "nothing") for of in each]
            fine = "nothing" not in found and all(
                value < 1e-10 for of in found for value in (of or {}).values() if isinstance(value, float)
            )
        if not fine or any(of["seconds"] > SECONDS for of in each):
            wrong.append(f"{name}: {each}")
    assert not wrong, "\n".join(wrong)


def check_bits(noted: list[dict[str, Any]]) -> None:
    """Theta is the same on all ranks, run after run, whichever rank has which share, whole or in parts; and so is what
    is derived from it where sums are in the same order.
    """
    found = [of["bits"]["found"] for of in noted]
    assert all(of == found[0] for of in found)
    thetas, derived = ({name: of[i] for name, of in found[0].items()} for i in (0, 1))
    assert len(set(thetas.values())) == 1
    assert derived["plain"] == derived["again"] == derived["StoreAll"]


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    noted = ran(2, "most", tmp_path)
    check(noted, ERRORS)
    check_bits(noted)
    assert len(noted[0]) > 45
    assert set(ERRORS) <= noted[0].keys()
    values = noted[1]["out of range, shard=False"]["values"]
    assert (values["parameter"], values["step"]) == ("2.bias", 0)
    for name in ("random numbers", "rounding", "drawn seeds"):
        assert noted[0][name]["found"] == noted[1][name]["found"]
    found = noted[0]["random numbers"]["found"]
    assert found["drawn"] != found["other"]
    for shard in (False, True):
        assert noted[0][f"pieces, shard={shard}"]["found"]["same"]


@pytest.mark.slow
def test_four_ranks_do_what_one_does(tmp_path: Path) -> None:
    noted = ran(4, "few", tmp_path)
    check(noted, {"one fails, shard=True": ("ValueError", "on rank 3: a word"), "killed": ERRORS["killed"]})
    check_bits(noted)
    assert len(noted[0]) == 5
    assert all("killed" in of for of in noted[:3])


@pytest.mark.slow
def test_every_adjoint_of_every_optimizer(tmp_path: Path) -> None:
    noted = ran(2, "every", tmp_path)
    check(noted, {})
    assert sum(len(of["found"]) for of in noted[0].values()) > 120
    assert {"extras", "many outputs", "attribution"} <= noted[0].keys()


def test_arguments_of_one_process() -> None:
    params = {"w": torch.ones(3)}
    options = {"batches": (torch.ones(1),), "optimizer": rd.SGD(0.1), "steps": 1}
    with pytest.raises(ValueError, match="shard=True keeps the state in parts on the ranks of a group"):
        rd.unroll(lambda p, b: p["w"].sum(), params, **options, shard=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"group must be a torch.distributed ProcessGroup or None, got str"):
        rd.unroll(lambda p, b: p["w"].sum(), params, **options, group="world")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["copy", "sum", "gather"])
def test_what_is_exchanged_is_looked_at(name: str) -> None:
    exchange = getattr(rd.distributed, name)
    for value, kind, words in (
        (3.0, TypeError, "takes a tensor, got float"),
        (torch.ones(2, dtype=torch.float16), TypeError, "takes float32 and float64, got torch.float16"),
        (torch.ones(2), ValueError, "call torch.distributed.init_process_group first"),
    ):
        with pytest.raises(kind, match=rf"rd\.distributed\.{name} .*{words}"):
            exchange(value)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed ProcessGroup or None, got str"):
        exchange(torch.ones(2), "world")
