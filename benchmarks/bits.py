"""How many bits per parameter and step does the bit store keep, against the entropy bound log2(1 / momentum)?

For each momentum, velocities are decayed and kicked for so many steps that 2,000 bits per parameter are lost (at least
10,000 steps), then walked back: every bit must return. The words spilled are counted; the head of 52 bits per parameter
is state.

    python benchmarks/bits.py     about a minute

Writes results/bits.json; `python benchmarks/report.py` makes the table and the picture of it.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from measuring import arguments_of, machine, save, versions

from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.history import DeviceHistory
from revdistill.engine.integers.radix import COARSE

MOMENTA = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PARAMETERS = 1_000
LOST_BITS, LEAST_STEPS = 2_000, 10_000


def measure(momentum: float, device: str) -> dict[str, Any]:
    """There and back."""
    started = time.perf_counter()
    n = COARSE.quantise(momentum)
    ideal = math.log2(COARSE.base / n)
    steps = max(LEAST_STEPS, math.ceil(LOST_BITS / ideal))
    draw = torch.Generator().manual_seed(0)
    kicks = torch.randint(-(2**44), 2**44, (97, PARAMETERS), generator=draw).to(device)
    v = torch.zeros(PARAMETERS, dtype=torch.int64, device=device)
    store = BitStore(len(v), v.device, DeviceHistory())
    for k in range(steps):
        store.decay_(v, n)
        v += kicks[k % len(kicks)]
    kept = 8 * store.history.nbytes / (PARAMETERS * steps)
    for k in reversed(range(steps)):
        v -= kicks[k % len(kicks)]
        store.undecay_(v, n)
    if v.any() or not store.is_empty():
        raise SystemExit(f"momentum {momentum}: the way back did not end at the start")
    print(
        f"momentum {momentum}: {steps} steps, bound {ideal:.5f}, kept {kept:.5f}, ratio {kept / ideal:.4f}", flush=True
    )
    return {
        "momentum": momentum,
        "steps": steps,
        "ideal": ideal,
        "kept": kept,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """The command."""
    options = arguments_of(__doc__).parse_args()
    rows = [measure(momentum, options.device) for momentum in MOMENTA]
    results = {
        "machine": machine(options.device),
        "versions": versions(),
        "parameters": PARAMETERS,
        "head_bits": 52,
        "rows": rows,
    }
    save("bits", results, options.device)


if __name__ == "__main__":
    main()
