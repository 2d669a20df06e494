"""The checks of `revdistill verify` on the device, a JSON line for each.  python -m gpu.verify --device cuda

--quick: short runs, and only the first check.
"""

from __future__ import annotations

from gpu.lines import attempt, options_of, write
from gpu.place import here, leave
from revdistill.engine import selfcheck

QUICK = 1  # checks


def measure(device: str, quick: bool) -> int:
    """A line as soon as each check is done; 1 where one failed."""
    if quick:
        selfcheck.EXACT_STEPS, selfcheck.GRADIENT_STEPS, selfcheck.BIT_STEPS = 20, 10, 1_000
    failed = 0
    with here(device) as place:
        for i, check in enumerate(selfcheck.checks(place)):
            write(
                "verify",
                kind=check.kind,
                name=check.name,
                found=check.found,
                seconds=check.seconds,
                passed=check.passed,
            )
            failed += not check.passed
            if quick and i + 1 == QUICK:
                break
    return 1 if failed else 0


def main() -> None:
    """The command."""
    options = options_of(__doc__).parse_args()
    code = 1
    with attempt("verify"):
        code = measure(options.device, options.quick)
    leave(options.device, code)


if __name__ == "__main__":
    main()
