"""What the configurations of outer loops share: a check of a field, and the way to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

MANY = 10**6  # steps, samples or networks: what nobody has memory for is no setting, but a mistake
MOST_THREADS = 256  # as many are started, whatever the machine: a file from somebody else may say any number
LARGEST = 2**53  # of what is only counted up to
LEAST_RATE = 1e-30  # a smaller one is 0 in float32
C = TypeVar("C", bound="Configuration")


@dataclass(frozen=True)
class Configuration:
    """Everything that defines a job: what is needed to run it again. tuples: the fields that JSON makes lists of."""

    tuples: ClassVar[tuple[str, ...]] = ()

    def need(self, name: str, fine: bool, accepted: str) -> None:
        """ValueError that names the field, what came and what is accepted, unless it is fine."""
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")

    def need_counts(self, most: int, *names: str) -> None:
        """ValueError unless these fields are integers from 1 to `most`."""
        for name in names:
            self.need(name, 1 <= getattr(self, name) <= most, f"an integer from 1 to {most:,}")

    def need_side_by_side(self) -> None:
        """ValueError unless the field `side_by_side` is None or a number of networks."""
        side_by_side = getattr(self, "side_by_side", None)
        fine = side_by_side is None or (isinstance(side_by_side, int) and 1 <= side_by_side <= MANY)
        self.need("side_by_side", fine, f"an integer from 1 to {MANY:,}, or none for all networks")

    def need_threads(self) -> None:
        """ValueError unless the field `threads` is None or a number of threads."""
        threads = getattr(self, "threads", None)
        fine = threads is None or (type(threads) is int and 1 <= threads <= MOST_THREADS)
        self.need("threads", fine, f"an integer from 1 to {MOST_THREADS}, or none for torch's own number")

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON."""
        return asdict(self) | {name: list(getattr(self, name)) for name in self.tuples}

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The configuration that `to_dict` made these of.

        Raises:
            TypeError, ValueError: they are of no configuration.
        """
        return cls(**(values | {name: tuple(values.get(name, ())) for name in cls.tuples}))
