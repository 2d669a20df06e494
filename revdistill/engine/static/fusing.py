"""All moves of a step as one Triton kernel, which is written for them: every number is read once and written once.

The kernel is the moves' own arithmetic (`integers.kernels`) and their sources' own formulas, evaluated with text
(`expressions`), in the order of the moves; so its bits are theirs.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.compiling import give_up
from revdistill.engine.integers.bitstore import BitStore
from revdistill.engine.integers.fused import Fused
from revdistill.engine.integers.state import THETA, State
from revdistill.engine.optimizers.moves import Add, Factor, Move, RunningMaximum
from revdistill.engine.optimizers.sources import GRADIENT, Read
from revdistill.engine.static.expressions import Expression, InKernel, Values, Writer
from revdistill.engine.static.made import Moves, Notes
from revdistill.engine.static.rows import ANY, RowDecay

BLOCK = 512  # elements of one program, four to a thread
_BITS = {torch.float32: "tl.int32", torch.float64: "tl.int64"}


def moves_of(moves: Sequence[Move], state: State, *, back: bool) -> Moves:
    """The moves in one kernel where the state's backend has kernels, else one after the other. Arguments: `Moves`."""
    if isinstance(state.backend, Fused) and moves:
        return FusedMoves(moves, state, back=back)
    return Moves(moves, state, back=back)


class FusedMoves(Moves):
    """`Moves` in one launch. Where that fails, a warning says so, and they are made one after the other.

    Args:
        moves: in the order in which they are made, over static memory (`rows`).
        state: which they change; its backend is `Fused`.
        back: whether each is undone.

    Raises:
        ValueError: the state has another backend.
    """

    def __init__(self, moves: Sequence[Move], state: State, *, back: bool) -> None:
        super().__init__(moves, state, back=back)
        if not isinstance(state.backend, Fused):
            raise ValueError(f"fused moves need the backend Fused, got {type(state.backend).__name__}")
        # Whoever never goes back may have these too.
        self._refused = next((move.irreversible for move in moves if back and move.irreversible), None)
        self._kernels, self._block = state.backend.kernels, min(BLOCK, state.backend.block)
        self._written: dict[tuple[Any, ...], tuple[str, dict[str, Tensor]]] = {}
        self._given_up = False

    def run(self, gradient: Tensor | None, theta_out: Tensor | None = None, notes: Notes | None = None) -> None:
        """See `Moves.run`. Raises: ValueError: a move cannot be undone; the gradient is missing, or of another shape;
        theta_out has gaps.
        """
        if self._refused:
            raise ValueError(self._refused)
        needed = notes is not None or any(GRADIENT in move.reads for move in self._moves)
        if needed and gradient is None:
            raise ValueError("gradient: needed by these moves or for notes, got None")
        if gradient is not None and gradient.shape != self._state.numbers[THETA].shape[-1:]:
            raise ValueError(f"gradient: needs the shape of theta's numbers, got {[*gradient.shape]}")
        if self._given_up or not self._launched(gradient if needed else None, theta_out, notes):
            super().run(gradient, theta_out, notes)

    def _launched(self, gradient: Tensor | None, theta_out: Tensor | None, notes: Notes | None) -> bool:
        theta = self._state.numbers[THETA]
        numel = theta.shape[-1]
        if not numel:
            return False
        called: dict[str, Tensor] = {} if gradient is None else {"gradient_at": gradient.contiguous()}
        if theta_out is not None:
            if not theta_out.is_contiguous() or theta_out.shape != theta.shape[-1:]:
                raise ValueError(f"theta_out: needs {numel} numbers without gaps, got shape {[*theta_out.shape]}")
            called["theta_out_at"] = theta_out
        if notes is not None:
            for note in notes:
                note.zero_()
            called |= {"fingerprint_at": notes[0], "largest_at": notes[1].view(torch.int64)}
        try:
            source, arguments = self._source(
                None if gradient is None else gradient.dtype, theta_out is not None, notes is not None
            )
            grid = (-(-numel // self._block),)
            with torch.cuda.device(theta.get_device()):
                kernel = _compiled(source, self._kernels)[grid]
                kernel(**arguments, **called, numel=numel, BLOCK=self._block, enable_fp_fusion=False)
        except Exception as error:  # whatever the compiler raises: nothing was launched
            self._given_up = True
            give_up("one kernel for all moves of a step", error)
            return False
        return True

    def _source(self, gradient: torch.dtype | None, theta_out: bool, notes: bool) -> tuple[str, dict[str, Tensor]]:
        """The kernel's text for a run with these, and all arguments but these."""
        heads = [store.head for store in self._state.all_stores()]
        places = [t.data_ptr() for t in (*self._state.numbers.values(), *heads)]
        key = gradient, theta_out, notes, *places
        if key not in self._written:
            self._written = {key: self._write(gradient, theta_out, notes)}
        return self._written[key]

    def _write(self, gradient: torch.dtype | None, theta_out: bool, notes: bool) -> tuple[str, dict[str, Tensor]]:
        writer, state = Writer(), self._state
        registers = _Registers(writer, state)
        if gradient is not None:
            registers.writer.loads.append("gradient = tl.load(gradient_at + i, inside, other=0.0)")
        for move in self._moves:
            _WRITERS[type(move)](registers, move, self._back)
        lines = list(writer.lines)
        if theta_out:
            lines.append(f"theta_out = {registers.value(THETA)}.to(theta_out_at.dtype.element_ty)")
            lines.append("tl.store(theta_out_at + i, theta_out, inside)")
        lines += registers.stores()
        if notes:
            assert gradient is not None
            lines += [
                f"bits = gradient.to({_BITS[gradient]}, bitcast=True).to(tl.int64)",
                "found = tl.where(inside, mixed(bits, i), 0)",
                "tl.atomic_add(fingerprint_at, tl.reduce(found, 0, sum_of))",
                f"magnitude = gradient.to(tl.float64).to(tl.int64, bitcast=True) & {2**63 - 1}",
                "tl.atomic_max(largest_at, tl.reduce(magnitude, 0, larger_of))",
            ]
        writer.finish(state.numbers[THETA].device)
        names = [
            *writer.arguments,
            *(["gradient_at"] if gradient is not None else []),
            *(["theta_out_at"] if theta_out else []),
            *(["fingerprint_at", "largest_at"] if notes else []),
        ]
        signature = ",\n        ".join([*names, "numel", "BLOCK: tl.constexpr"])
        title = ("Undone: " if self._back else "") + ", ".join(f"{type(m).__name__} {m.target}" for m in self._moves)
        body = [f'"""{title}."""', "i, inside = elements(numel, BLOCK)", *writer.loads, *lines]
        text = f"def moves(\n        {signature},\n):\n" + "".join(f"    {line}\n" for line in body)
        return text, writer.arguments


class _Registers:
    """The state's numbers and heads in registers: loaded when a move first names them, stored if one changed them."""

    def __init__(self, writer: Writer, state: State) -> None:
        self.writer, self.state = writer, state
        self._loaded: dict[str, Tensor] = {}
        self._changed: dict[str, None] = {}

    def _register(self, name: str, q: Tensor) -> str:
        if name not in self._loaded:
            self._loaded[name] = self.writer.arguments[f"{name}_at"] = q
            self.writer.loads.append(f"{name} = tl.load({name}_at + i, inside, other=0)")
        return name

    def words(self, name: str) -> list[str]:
        """The one or two words of theta or a slot."""
        q = self.state.numbers[name]
        if q.ndim == 1:
            return [self._register(f"q_{name}", q)]
        return [self._register(f"q_{name}_{part}", q[row]) for row, part in enumerate(("high", "low"))]

    def head(self, name: str) -> str:
        """Of a slot's, or theta's, bit stores."""
        return self._register(f"head_{name}", flat_head(self.state.stores[name]))

    def change(self, names: Sequence[str], text: str) -> None:
        """They become what the text gives."""
        self.writer.lines.append(f"{', '.join(names)} = {text}")
        self._changed |= dict.fromkeys(names)

    def stores(self) -> list[str]:
        return [f"tl.store({name}_at + i, {name}, inside)" for name in self._changed]

    def value(self, name: str) -> str:
        """The gradient, theta or a slot, as it is now, in float64."""
        if name == GRADIENT:
            return "gradient.to(tl.float64)"
        words = self.words(name)
        if len(words) == 2:
            return f"value_wide({', '.join(words)})"
        return f"value({words[0]}, {self.writer.number(self.state.formats[name].resolution)})"

    def factor(self, factor: Factor, power_of_two: float) -> Expression:
        """The product, in the order of `Factor.value`, and then the power of two."""
        writer, start = self.writer, factor.start(ANY)
        found = Expression(writer, writer.each(start) if isinstance(start, Tensor) else writer.number(start))
        for table in factor.tables.values():
            found = found * InKernel(writer).of(table)
        return found * power_of_two


def _write_decay(registers: _Registers, move: RowDecay, back: bool) -> None:
    names = registers.words(move.target)
    if move.kind == "forget" and not back:
        for name in names:
            registers.change([name], f"{name} * 0")
    if move.kind != "shorten":
        return
    assert move.numbers is not None
    n = registers.writer.row(move.numbers, move.table.index)
    names = [*names, registers.head(move.target)]
    done = ("divided" if back else "multiplied") + ("_wide" if move.radix.words == 2 else "")
    bits = "" if move.radix.words == 2 else f", {move.radix.bits}"
    registers.change(names, f"{done}({', '.join(names)}, {n}{bits})")


def _write_add(registers: _Registers, move: Add, back: bool) -> None:
    state, writer = registers.state, registers.writer
    if isinstance(move.source, Read) and move.source.name != GRADIENT:
        (word,) = registers.words(move.source.name)
        source, unit = Expression(writer, f"{word}.to(tl.float64)"), state.formats[move.source.name].resolution
    else:
        values: Any = Values(writer, registers.value)
        source, unit = move.source.value(values, InKernel(writer)), 1.0  # type: ignore[assignment, arg-type]
    amount = writer.let((source * registers.factor(move.factor, unit * state.formats[move.target].scale)).text)
    names = registers.words(move.target)
    if len(names) == 2:
        registers.change(names, f"added_wide({', '.join(names)}, {amount.text}, {-1 if back else 1})")
    else:
        registers.change(names, f"{names[0]} {'-' if back else '+'} rint({amount.text})")


def _write_maximum(registers: _Registers, move: RunningMaximum, back: bool) -> None:
    names = registers.words(move.target)
    registers.change(names, f"larger_wide({', '.join([*names, *registers.words(move.source)])})")


_WRITERS: dict[type, Any] = {RowDecay: _write_decay, Add: _write_add, RunningMaximum: _write_maximum}


def flat_head(stores: Sequence[BitStore]) -> Tensor:
    """The heads of one tensor's stores, int64 [numel]: a view. Raises: ValueError where they do not lie in a row."""
    first, offset = stores[0].head, 0
    for store in stores:
        if store.head.data_ptr() != first.data_ptr() + offset * first.element_size():
            raise ValueError("the heads of one tensor's bit stores do not lie in a row")
        offset += store.head.numel()
    return first if len(stores) == 1 else first.as_strided((offset,), (1,))


@cache
def _compiled(source: str, kernels: ModuleType) -> Any:
    """The kernel, which Triton compiles when it is first launched; its source where `inspect` looks for it."""
    name = f"<moves {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = dict(vars(kernels))
    exec(compile(source, name, "exec"), namespace)
    return type(kernels.elements)(namespace["moves"])  # compiled by Triton, or interpreted, as the kernels are
