"""Whether networks are of one architecture: stacked, all of them are computed by the modules of the first."""

from __future__ import annotations

import builtins
import functools
import math
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from revdistill.engine.loss.modules import HOOKS, OWN

_LOCKS = type(threading.Lock()), type(threading.RLock())
_OF_CLASSES = ("__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__", "_abc_impl")


def check_alike(nets: Sequence[nn.Module]) -> None:
    """Check that networks differ in the values of their parameters and buffers only.

    Args:
        nets: at least one.

    Raises:
        ValueError: one differs from the first in more than that.
    """
    first = nets[0]
    for i, net in enumerate(nets):
        if net is first:
            continue
        difference = next(_differences(first, net), None)
        if difference is not None:
            raise ValueError(
                f"nets[{i}] is not of nets[0]'s architecture: {difference}. Stacked, all networks are computed as "
                "nets[0], each with parameters and buffers of its own; make them alike, or train them one by one with "
                "rd.from_module"
            )


def _differences(first: nn.Module, net: nn.Module) -> Iterator[str]:
    mine, theirs = (dict(n.named_modules(remove_duplicate=False)) for n in (first, net))
    for name in {**mine, **theirs}:
        if name not in mine or name not in theirs:
            yield f"{'nets[0]' if name in mine else 'it'} alone has a module {name!r}"
    yield from _ties_that_differ(first, net)
    same = _Same(first, net)
    for name, a in mine.items():
        b, of = theirs[name], f" of the module {name!r}" if name else ""
        if not same(type(a), type(b)):
            kinds = f"is a {type(b).__name__}, in nets[0] a {type(a).__name__}"
            yield f"the module {repr(name) if name else 'itself'} {kinds}"
        yield from _tensors_that_differ("parameter", a._parameters, b._parameters, of)
        yield from _tensors_that_differ("buffer", a._buffers, b._buffers, of)
        if a.training != b.training:
            yield f"the training mode{of} is {b.training}, in nets[0] {a.training}"
        for key in HOOKS:
            hooks = [list((getattr(module, key, None) or {}).values()) for module in (a, b)]
            if not same(*hooks):
                yield f"the hooks{of} differ"
        computed = _computed(a) & _computed(b)
        for key in {**vars(a), **vars(b)}:
            if key in OWN:
                continue
            values = [vars(module).get(key, _Absent) for module in (a, b)]
            if key in computed and all(isinstance(value, Tensor) for value in values):
                continue
            if not same(*values):
                yield f"the attribute {key!r}{of} is {_words(values[1])}, in nets[0] {_words(values[0])}"


def _computed(module: nn.Module) -> set[str]:
    """The attributes that torch's hooks set before each call, from parameters: of torch.nn.utils.weight_norm,
    spectral_norm and pruning.
    """
    hooks = module._forward_pre_hooks.values()
    names = {getattr(hook, key, None) for hook in hooks for key in ("name", "_tensor_name")}
    made_of = module._parameters
    return {name for name in names if isinstance(name, str) and {f"{name}_orig", f"{name}_v"} & made_of.keys()}


def _ties_that_differ(first: nn.Module, net: nn.Module) -> Iterator[str]:
    """Names of one tensor in one network and of two in the other."""
    mine, theirs = (
        {name: id(t) for of in (n.named_parameters, n.named_buffers) for name, t in of(remove_duplicate=False)}
        for n in (first, net)
    )
    met: list[dict[int, str]] = [{}, {}]  # the first name of each tensor
    for name in (name for name in mine if name in theirs):
        a, b = met[0].setdefault(mine[name], name), met[1].setdefault(theirs[name], name)
        if a != b:
            one = "nets[0] and two here" if b == name else "this one and two in nets[0]"
            yield f"{(a if b == name else b)!r} and {name!r} are one tensor in {one}"


def _tensors_that_differ(
    kind: str, mine: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], of: str
) -> Iterator[str]:
    for key in {**mine, **theirs}:
        described = ["absent" if t is None else _described(t) for t in (mine.get(key), theirs.get(key))]
        if described[0] != described[1]:
            yield f"the {kind} {key!r}{of} is {described[1]}, in nets[0] {described[0]}"


def _described(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}, requires_grad={t.requires_grad}"


class _Absent:
    """Stands for an attribute that a module does not have."""


class _Same:
    """Whether two values do the same in two networks.

    Functions and classes that were made anew for each network (a lambda in __init__, a parametrized layer's class) are
    the same where their code is and what they hold on to.
    """

    def __init__(self, first: nn.Module, net: nn.Module) -> None:
        self._names: list[dict[int, str]] = [_names(first), _names(net)]
        self._held: list[Any] = []  # what has an entry below, so that nothing else gets its address
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        mine, theirs = self._names[0].get(id(a)), self._names[1].get(id(b))
        if mine is not None or theirs is not None:
            return mine == theirs
        if isinstance(a, type) and isinstance(b, type):
            return a.__qualname__ == b.__qualname__ and self._once(a, b, self._classes)
        if type(a) is not type(b) and not self(type(a), type(b)):
            return False
        if isinstance(a, (int, float, complex, str, bytes, set, frozenset, range, torch.dtype, torch.device)):
            return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
        return self._once(a, b, self._parts)

    def _once(self, a: Any, b: Any, compare: Any) -> bool:
        if (id(a), id(b)) in self._seen:
            return True  # within itself, or found the same before
        self._seen.add((id(a), id(b)))
        self._held += (a, b)
        return bool(compare(a, b))

    def _parts(self, a: Any, b: Any) -> bool:
        if isinstance(a, RemovableHandle):
            return True  # of a hook, which is compared where it is
        if isinstance(a, Tensor):
            if a.grad_fn is not None and b.grad_fn is not None:
                return True  # what a forward left behind
            return _described(a) == _described(b) and (a.is_meta or torch.equal(a, b))
        if isinstance(a, Mapping):
            return len(a) == len(b) and all(map(self, a, b)) and all(map(self, a.values(), b.values()))
        if isinstance(a, (tuple, list, deque)):
            return len(a) == len(b) and all(map(self, a, b))
        if isinstance(a, types.FunctionType):
            return a.__code__ == b.__code__ and self(_held_by(a), _held_by(b)) and self._globals(a, b)
        if isinstance(a, types.BuiltinFunctionType):
            return self((a.__name__, a.__self__), (b.__name__, b.__self__))
        if isinstance(a, types.MethodType):
            return self((a.__func__, a.__self__), (b.__func__, b.__self__))
        if isinstance(a, weakref.ReferenceType):
            return self(a(), b())
        if isinstance(a, weakref.ProxyTypes):
            return self(a.__repr__.__self__, b.__repr__.__self__)
        if isinstance(a, property):
            return self((a.fget, a.fset, a.fdel), (b.fget, b.fset, b.fdel))
        if isinstance(a, (staticmethod, classmethod)):
            return self(a.__func__, b.__func__)
        if isinstance(a, functools.partial):
            return self((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if hasattr(a, "__array__"):
            return self(torch.as_tensor(a), torch.as_tensor(b)) if _is_numeric(a) else bool((a == b).all())
        if not self(getattr(a, "__dict__", None), getattr(b, "__dict__", None)) or not self(_slots(a), _slots(b)):
            return False
        return self._values(a, b)

    def _globals(self, a: types.FunctionType, b: types.FunctionType) -> bool:
        """Of functions of one code, what they find by name."""
        if a.__globals__ is b.__globals__:
            return True
        scopes = [{**vars(builtins), **function.__globals__} for function in (a, b)]
        return all(self(*(scope.get(name, _Absent) for scope in scopes)) for name in _names_in(a.__code__))

    def _values(self, a: Any, b: Any) -> bool:
        """Of what is no Python object through and through: a built-in function, a slice, a date, a generator."""
        equal: Any = type(a).__eq__
        own = hasattr(a, "__dict__") or bool(_slots(a))
        reduce: Any = type(a).__reduce__
        if reduce is not object.__reduce__ or (equal is object.__eq__ and not own):
            try:  # what it would be made of again
                return self(*(_reduced(value) for value in (a, b)))
            except TypeError:
                return own or isinstance(a, _LOCKS)
        if own and (equal is object.__eq__ or isinstance(equal, types.FunctionType)):
            return True  # its attributes are all that there is
        try:
            return bool(a == b)
        except Exception:  # whatever a comparison raises, they are not known to be the same
            return False

    def _classes(self, a: type, b: type) -> bool:
        return self(a.__bases__, b.__bases__) and self(*(_members(c) for c in (a, b)))


def _names(net: nn.Module) -> dict[int, str]:
    """What a network is made of: id -> kind and name."""
    parts = {id(module): f"module {name}" for name, module in net.named_modules()}
    return parts | {id(t): f"tensor {name}" for name, t in (*net.named_parameters(), *net.named_buffers())}


def _held_by(function: types.FunctionType) -> tuple[Any, ...]:
    cells = [_contents(cell) for cell in function.__closure__ or ()]
    return function.__defaults__, function.__kwdefaults__, cells, vars(function)


def _names_in(code: types.CodeType) -> set[str]:
    """The names of globals, and of attributes, in a function and those within it."""
    within = (_names_in(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*within)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled
        return _Absent


def _members(c: type) -> dict[str, Any]:
    return {key: value for key, value in vars(c).items() if key not in _OF_CLASSES}


def _slots(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for c in type(value).__mro__:
        slots = vars(c).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{c.__name__.lstrip('_')}{name}" if private else name
            if name not in _OF_CLASSES:
                found[name] = getattr(value, name, _Absent)
    return found


def _reduced(value: Any) -> Any:
    found = value.__reduce_ex__(4)
    return found if isinstance(found, str) else (*found[:3], *(list(rest or ()) for rest in found[3:5]))


def _is_numeric(array: Any) -> bool:
    return getattr(getattr(array, "dtype", None), "kind", "") in "biufc"


def _words(value: Any) -> str:
    if value is _Absent:
        return "absent"
    if isinstance(value, Tensor):
        return f"another tensor {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"another {type(value).__name__}"
