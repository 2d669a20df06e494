"""Loops in Python as machine code: compiled once per machine, loaded by every later process without the compiler.

numba compiles, which costs a process that imports it 55 MiB, and half a second before the first loop runs. llvmlite
loads what was kept, and the loops are called as C functions: no thread holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from revdistill.engine.integers import object_cache

_FORMAT = 2  # of what is kept
_C: dict[str, Any] = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float64": ctypes.c_double}


@dataclass(frozen=True)
class Signature:
    """Names of types: what the tensors' elements are, the other arguments, and what is returned."""

    pointed: tuple[str, ...]
    scalars: tuple[str, ...]
    result: str | None

    def text(self) -> str:
        return f"{self.result}({', '.join([*(f'{name}*' for name in self.pointed), *self.scalars])})"


LOCK = threading.RLock()  # one thread compiles or loads
if hasattr(os, "register_at_fork"):  # in the middle of that a process is not forked: numba has a lock of its own
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
_kept: list[Any] = []  # what numba has compiled in this process
_LIBRARY = ("sqrt",)  # of the C library that Python and torch have loaded; correctly rounded (IEEE 754)


def loaded(function: Callable[..., Any], signature: Signature) -> Any:
    """The function as a C function: as it was kept, or compiled now, and kept where that is possible."""
    with LOCK:
        machine = _Machine.this()
        name = f"{function.__name__}-{machine.digest(_text(function), signature)}"
        code = object_cache.read(name) if machine.has_library else None
        if code is None:
            made = _compiled_by_numba(function, signature)
            code = machine.object_of(made, name)
            if code is not None:
                object_cache.write(name, code)
        address = machine.load(code, name) if code is not None else made.address
    result = None if signature.result is None else _C[signature.result]
    kind = ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * len(signature.pointed), *(_C[s] for s in signature.scalars))
    run: Any = kind(address)
    run.machine = machine  # whose memory the code is in: it must last as long as the function
    return run


def _text(function: Callable[..., Any]) -> str:
    """What numba compiles: the byte code, with the numbers of the module that it names. Not the source: since this
    process has read it, the file may have become another release's.
    """
    code = function.__code__
    named = ((name, function.__globals__.get(name)) for name in sorted(code.co_names))
    numbers = [(name, value) for name, value in named if isinstance(value, int | float)]
    return repr((sys.implementation.cache_tag, code.co_code, code.co_consts, code.co_names, code.co_varnames, numbers))


def _compiled_by_numba(function: Callable[..., Any], signature: Signature) -> Any:
    """With `native_name`, `inspect_llvm` and `address`; it must be kept where its address is called."""
    from numba import cfunc, types

    pointer: Any = types.CPointer
    pointed = [pointer(getattr(types, pointed)) for pointed in signature.pointed]
    result = types.void if signature.result is None else getattr(types, signature.result)
    typed = result(*pointed, *(getattr(types, scalar) for scalar in signature.scalars))
    made = cfunc(typed, error_model="numpy")(function)
    _kept.append(made)
    return made


class _Machine:
    """The processor, its compiler's last stage, and what was loaded so far."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        self._llvm = llvm
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._triple = llvm.get_process_triple()
        self._cpu = llvm.get_host_cpu_name()
        self._features = llvm.get_host_cpu_features().flatten()
        self._target = llvm.Target.from_triple(self._triple).create_target_machine(
            cpu=self._cpu, features=self._features, opt=3, codemodel="jitdefault", jit=True
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._target)
        self.has_library = all(llvm.address_of_symbol(name) for name in _LIBRARY)

    @staticmethod
    @cache
    def this() -> _Machine:
        return _Machine()

    def digest(self, source: str, signature: Signature) -> str:
        """Of all that the machine code depends on."""
        releases = [version("numba"), version("llvmlite")]
        parts = [_FORMAT, source, signature.text(), *releases, self._triple, self._cpu, self._features]
        return hashlib.sha256("\0".join(map(str, [*parts, platform.machine()])).encode()).hexdigest()[:40]

    def object_of(self, made: Any, name: str) -> bytes | None:
        """The object file of what numba has compiled, with one public symbol, `name`; None where it calls numba, the
        interpreter, or what is not in _LIBRARY: a process that has no such symbol would be aborted by loading it.
        """
        if not self.has_library:
            return None
        module = self._llvm.parse_assembly(made.inspect_llvm())
        module.triple = self._triple
        for symbol in (*module.functions, *module.global_variables):
            if symbol.is_declaration:
                if symbol.name not in _LIBRARY and not symbol.name.startswith("llvm."):  # those are instructions
                    return None
            elif symbol.name == made.native_name:
                symbol.name = name
            else:
                symbol.linkage = "internal"
        module.verify()
        code: bytes = self._target.emit_object(module)
        return code

    def load(self, code: bytes, name: str) -> int:
        """The address of the symbol, in memory that stays as long as this object does."""
        self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        address: int = self._engine.get_function_address(name)
        if not address:
            raise RuntimeError(f"no {name} in the machine code that was compiled for it")
        return address
