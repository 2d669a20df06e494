"""`revdistill verify` on the device, a JSON line per check.  python -m gpu.verify --device cuda

The stand-in is no device of the command's: there its checks run in this process. --quick stops after the first.
"""

from __future__ import annotations

import re
import subprocess
import sys

from gpu.lines import attempt, options_of, write
from gpu.place import here, leave

_CHECK = re.compile(r"  (exactness|gradients|bits) +(\S.*?\S) {2,}(\S.*?) +(\d+\.\d) s  (ok|FAILED)$")
QUICK = 1  # checks


def by_command(device: str, quick: bool) -> int:
    """Each line as the command prints it; the command's exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "verify", "--device", device], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    checks = 0
    for text in process.stdout:
        found = _CHECK.match(text.rstrip("\n"))
        if not found:
            write("verify", line=text.rstrip("\n"))
            continue
        kind, name, figure, seconds, word = found.groups()
        write("verify", kind=kind, name=name, found=figure, seconds=float(seconds), passed=word == "ok")
        checks += 1
        if quick and checks == QUICK:
            process.terminate()
            process.wait()
            return 0
    return process.wait()


def in_process(device: str, quick: bool) -> int:
    """The checks themselves."""
    from revdistill.engine import selfcheck

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
        code = (in_process if options.device == "standin" else by_command)(options.device, options.quick)
    leave(options.device, code)


if __name__ == "__main__":
    main()
