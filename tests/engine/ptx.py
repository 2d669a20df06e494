"""What Triton compiles kernels to for a GPU that is not there: run as a program, in a process where nothing is
interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TARGETS = (80, 90)  # compute capabilities: A100, H100
# kernel, types of arguments, constants, targets
Case = tuple[str, Mapping[str, str], Mapping[str, Any], Sequence[int]]


def compiled(module: str, cases: Mapping[str, Case], cache: Path) -> dict[str, str]:
    """The PTX of each case, by its name and target, such as "add 80"."""
    program = f"from tests.engine.ptx import main; main({module!r})"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(cases), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main(module: str) -> None:
    """Cases as JSON from stdin, PTX as JSON to stdout. module: where the kernels are, a module's name or a file."""
    import importlib

    kernels = importlib.import_module(module)
    found = {}
    for name, (kernel, types, constants, targets) in json.load(sys.stdin).items():
        for capability in targets:
            found[f"{name} {capability}"] = ptx(getattr(kernels, kernel), types, constants, capability)
    json.dump(found, sys.stdout)


def ptx(function: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int) -> str:
    """For the options that kernels are launched with."""
    import inspect

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    # Triton 3.2 has another name for constants
    parameter = "constexprs" if "constexprs" in inspect.signature(ASTSource).parameters else "constants"
    source = ASTSource(function, signature=signature, **{parameter: dict(constants)})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    text: str = made.asm["ptx"]
    return text


def assert_exact(text: str, *, expected: Sequence[str] = ()) -> None:
    """No fused multiply-add of floats, nothing approximate; and these instructions are there."""
    instructions = {line.split()[0] for line in text.splitlines() if line.strip() and not line.strip().startswith("//")}
    wrong = {i for i in instructions if i.startswith("fma.") or ".approx" in i or ".full" in i or ".ftz" in i}
    assert not wrong
    assert set(expected) <= instructions, f"{expected} not all among {sorted(instructions)}"
