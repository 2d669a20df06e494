"""The architectures by name, with their options, and a user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from revdistill.engine import RevdistillError
from revdistill.outer import architectures

Factory = Callable[..., nn.Module]
MOST = 2**10  # of an option that is a number: a file may name an architecture, and must not fill the memory by that

ARCHITECTURES: dict[str, Factory] = {
    "LinearNet": architectures.linear_net,
    "NonLinearNet": architectures.non_linear_net,
    "MoreNonLinearNet": architectures.more_non_linear_net,
    "MLP": architectures.mlp,
    "MLP-GELU": architectures.mlp_gelu,
    "LeNet": architectures.LeNet,
    "AlexCifarNet": architectures.AlexCifarNet,
    "ConvNet-3": architectures.ConvNet3,
    "ResNet-8": architectures.ResNet8,
}


def canonical(name: str) -> str:
    """The name as it is registered, whatever the case of its letters, with the options that are not the default in
    their order ("ConvNet-3:width=64,norm=group"); a `package.module:function` stays as it is.

    Raises:
        ValueError: there is no such architecture or option, or it cannot be imported.
    """
    known, options = _registered(name)
    if known is not None:
        defaults = _defaults(known)
        given = _options(name, known, options)
        text = ",".join(f"{key}={given[key]}" for key in defaults if given.get(key, defaults[key]) != defaults[key])
        return f"{known}:{text}" if text else known
    if ":" in name:
        _factory(name)
        return name
    raise _unknown(name)


def is_own(name: str) -> bool:
    """Whether the name is a user's own `package.module:function`, which would be imported."""
    return ":" in name and _registered(name)[0] is None


def shown() -> str:
    """The names with their options, for help: "MLP, ConvNet-3:width=128,norm=instance"."""
    options = {name: ",".join(f"{k}={v}" for k, v in _defaults(name).items()) for name in ARCHITECTURES}
    return ", ".join(f"{name} ({text})" if text else name for name, text in options.items())


def build(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A new network of the named architecture.

    Args:
        name: a key of ARCHITECTURES, with options or without, or `package.module:function`.
        input_shape: of one sample.
        classes: how many there are.

    Raises:
        ValueError: the architecture does not fit these, or is no torch.nn.Module.
    """
    known, options = _registered(name)
    if known is None and not is_own(name):
        raise _unknown(name)  # and no module of this name is imported: a file may have named it
    factory = ARCHITECTURES[known] if known is not None else _factory(name)
    given = _options(name, known, options) if known is not None else {}
    try:
        net = factory(input_shape, classes, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"architecture {name!r} does not fit inputs {list(input_shape)} and {classes} classes: {error}"
        ) from error
    except RevdistillError:
        raise
    except Exception as error:  # the user's own code raises what it likes
        raise ValueError(
            f"architecture {name!r} failed for inputs {list(input_shape)} and {classes} classes: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"architecture {name!r} returned {type(net).__name__}; it must return a torch.nn.Module")
    return net


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"unknown architecture {name!r}; accepted are {', '.join(ARCHITECTURES)} and package.module:function"
    )


def _factory(name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"architecture {name!r}: cannot import {module_name!r} ({error})") from error
    except Exception as error:  # the user's own code raises what it likes
        raise ValueError(
            f"architecture {name!r}: importing {module_name!r} failed ({type(error).__name__}: {error})"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise ValueError(f"architecture {name!r}: module {module_name!r} has no {attribute!r}")
    if not callable(factory):
        raise ValueError(f"architecture {name!r} is not callable as factory(input_shape, classes)")
    return factory  # type: ignore[no-any-return]


def _registered(name: str) -> tuple[str | None, list[str]]:
    """The registered name that comes before the options, None where there is no such, and the options."""
    first, colon, options = name.partition(":")
    if first.isidentifier() and options.isidentifier():
        return None, []  # a module of the user's may have an architecture's name
    known = next((known for known in ARCHITECTURES if known.lower() == first.lower()), None)
    return known, options.split(",") if colon else []


def _defaults(known: str) -> dict[str, Any]:
    """The options of a registered architecture: its factory's keywords."""
    keywords = inspect.signature(ARCHITECTURES[known]).parameters.values()
    return {p.name: p.default for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _options(name: str, known: str, options: list[str]) -> dict[str, Any]:
    """The options that a name has, such as "width=64" and "norm=group", each of its default's type."""
    defaults, found = _defaults(known), dict[str, Any]()
    for part in options:
        key, _, value = part.partition("=")
        if key not in defaults or key in found:
            accepted = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "none"
            raise ValueError(f"architecture {name!r}: option {part!r} is unknown or given twice; accepted: {accepted}")
        if isinstance(defaults[key], str):
            found[key] = value
            if key == "norm" and value not in architectures.NORMS:
                raise ValueError(
                    f"architecture {name!r}: norm is {value!r}; accepted is {', '.join(architectures.NORMS)}"
                )
        elif value.isdecimal() and value.isascii() and len(value) <= 9 and 1 <= int(value) <= MOST:
            found[key] = int(value)
        else:
            raise ValueError(f"architecture {name!r}: {key} is {value!r}; accepted is an integer from 1 to {MOST:,}")
    return found
