"""A formula in floats as text of a Triton kernel: what `Source.value` gives when it is evaluated with expressions.

Every operation is one of float64, in the order in which the formula has it: the bits are those of tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revdistill.engine.optimizers.hyperparameters import Table
from revdistill.engine.static.rows import ANY


class Writer:
    """Lines of a kernel, and the tensors that it is launched with.

    Attributes:
        arguments: tensors by the name of their pointer.
        loads, lines: what is read first, and what is then done.
    """

    def __init__(self) -> None:
        self.arguments: dict[str, Tensor] = {}
        self.loads: list[str] = []
        self.lines: list[str] = []
        self._constants: list[float] = []
        self._rows: dict[tuple[int, int], str] = {}
        self._columns: dict[int, str] = {}
        self._names = 0

    def name(self, hint: str) -> str:
        """One that is not used yet."""
        self._names += 1
        return f"{hint}{self._names}"

    def let(self, text: str) -> Expression:
        """A name for it, so that it is written once."""
        name = self.name("x")
        self.lines.append(f"{name} = {text}")
        return Expression(self, name)

    def number(self, value: float) -> str:
        """A Python float. Triton may round a literal to float32, so that others come from memory."""
        narrow = struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 2.0**127 else None
        if value == narrow:
            return repr(float(value))
        if value not in self._constants:
            self._constants.append(value)
        return f"constant{self._constants.index(value)}"

    def each(self, values: Tensor) -> str:
        """float64 [numel], loaded."""
        name = self.name("each")
        self.arguments[f"{name}_at"] = values.contiguous()
        self.loads.append(f"{name} = tl.load({name}_at + i, inside, other=1.0)")
        return name

    def row(self, values: Tensor, index: Tensor | None) -> str:
        """float64 [1, G], loaded: its number, or each element's own. Raises: ValueError for more than one row."""
        key = values.data_ptr(), -1 if index is None else index.data_ptr()
        if key not in self._rows:
            if values.shape[0] != 1 or not values.is_contiguous():
                raise ValueError(f"a kernel sees one row of a table, got one of shape {[*values.shape]}")
            name = self._rows[key] = self.name("row")
            self.arguments[f"{name}_at"] = values
            self.loads.append(f"{name} = tl.load({name}_at{'' if index is None else ' + ' + self._column(index)})")
        return self._rows[key]

    def _column(self, index: Tensor) -> str:
        key = index.data_ptr()
        if key not in self._columns:
            name = self._columns[key] = self.name("column")
            self.arguments[f"{name}_at"] = index.contiguous()
            self.loads.append(f"{name} = tl.load({name}_at + i, inside, other=0)")
        return self._columns[key]

    def finish(self, device: torch.device) -> None:
        """The constants get their place in memory."""
        if self._constants:
            self.arguments["constants_at"] = torch.tensor(self._constants, dtype=torch.float64, device=device)
            self.loads += [f"constant{i} = tl.load(constants_at + {i})" for i in range(len(self._constants))]


class Expression:
    """A float64 in registers, in the place of a tensor. text: its source, a name or in brackets."""

    def __init__(self, writer: Writer, text: str) -> None:
        self.writer, self.text = writer, text

    def _with(self, sign: str, other: Any, *, swapped: bool = False) -> Expression:
        theirs = other.text if isinstance(other, Expression) else self.writer.number(float(other))
        a, b = (theirs, self.text) if swapped else (self.text, theirs)
        return Expression(self.writer, f"({a} {sign} {b})")

    def __add__(self, other: Any) -> Expression:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Expression:
        return self._with("+", other, swapped=True)

    def __sub__(self, other: Any) -> Expression:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Expression:
        return self._with("-", other, swapped=True)

    def __mul__(self, other: Any) -> Expression:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Expression:
        return self._with("*", other, swapped=True)

    def __truediv__(self, other: Any) -> Expression:
        return self._with("/", other)

    def __rtruediv__(self, other: Any) -> Expression:
        return self._with("/", other, swapped=True)

    def square(self) -> Expression:
        """x^2"""
        x = self.writer.let(self.text)
        return x * x

    def relu(self) -> Expression:
        """max(x, 0)"""
        x = self.writer.let(self.text)
        return Expression(self.writer, f"tl.where({x.text} > 0.0, {x.text}, 0.0)")

    def sqrt(self) -> Expression:
        """Correctly rounded: Triton's is, of float64."""
        return Expression(self.writer, f"tl.sqrt({self.text})")


class Values:
    """What a formula reads, in the place of a mapping of tensors. value: writes the one of this name."""

    def __init__(self, writer: Writer, value: Callable[[str], str]) -> None:
        self._writer, self._value = writer, value
        self._found: dict[str, Expression] = {}

    def __getitem__(self, name: str) -> Expression:
        if name not in self._found:
            self._found[name] = self._writer.let(self._value(name))
        return self._found[name]


class InKernel:
    """`Step` for expressions."""

    k = ANY

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def of(self, table: Table) -> Expression:
        """The row's number, or each element's own."""
        return Expression(self._writer, self._writer.row(table.values.detach(), table.index))

    def root(self, x: Expression) -> Expression:
        """sqrt(x)"""
        return x.sqrt()
