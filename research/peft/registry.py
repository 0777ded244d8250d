"""Methods by name: `lora:rank=8,targets=attn/(q|v)+prefix:length=10`.

A method is a function of the same name as its file in this folder, returning `Method`; a dotted path finds a user's own
(`my_package.my_method`). Its keyword arguments are its options: the names, types and defaults of the specification
string are read from the signature. A new file needs no other edit. Every method also has `layers=0-3`
(`compose.on_layers`).
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any

from research.errors import FlagError, did_you_mean
from research.peft.compose import chain, on_layers
from research.peft.method import Card, Method, split_outside


def names() -> list[str]:
    """The methods of this folder."""
    package = importlib.import_module("research.peft")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if _function(f"{package.__name__}.{m.name}"))


def card(name: str) -> Card:
    """The card of a method of this folder."""
    return getattr(importlib.import_module(f"research.peft.{name}"), "CARD", Card("-", "-"))


def small(name: str) -> str:
    """The method with options that fit a model of width 32."""
    return f"{name}:{options}" if (options := card(name).small) else name


def parse(spec: str, **run: Any) -> Method:
    """The method of a specification; FlagError names the nearest method, option or value.

    run: what a run knows, for the methods with a keyword-only parameter of that name: `tokenizer`, the model's, for
    those that start from text, and `run_steps`, how many steps there will be, for those with a schedule.
    """
    parts = [_parse_one(part, run) for part in split(spec)]
    return parts[0] if len(parts) == 1 else chain(*parts)


def split(spec: str) -> list[str]:
    """Splits a chain at each `+` that a method's name follows, outside brackets."""
    parts = split_outside(spec, r"\+(?=[A-Za-z_][\w.]*(?::|\+|$))")
    if not all(part.strip() for part in parts):
        raise FlagError(f"--peft={spec!r} names no method.{did_you_mean('', names())}")
    return parts


def find(name: str) -> Callable[..., Method]:
    """The method function of a name or dotted path."""
    path = name if "." in name else f"research.peft.{name}"
    try:
        function = _function(path) if all(path.split(".")) else None
    except ImportError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        function = None
    if function is None:
        raise FlagError(f"unknown PEFT method {name!r}.{did_you_mean(name, names())}")
    return function


def _function(path: str) -> Callable[..., Method] | None:
    """The function `a.b.name` in module `a.b.name` or `a.b`, where it is declared to return a Method."""
    parent, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        if error.name != path or not parent:
            raise
        module = importlib.import_module(parent)
    function = getattr(module, name, None)
    declared = inspect.signature(function).return_annotation if inspect.isfunction(function) else None
    return function if declared in (Method, "Method") and function.__module__ == module.__name__ else None


def _parse_one(part: str, run: dict[str, Any]) -> Method:
    name, _, options = part.strip().partition(":")
    function = find(name)
    signature = inspect.signature(function, eval_str=True).parameters
    parameters = {k: p.annotation for k, p in signature.items() if p.kind != p.KEYWORD_ONLY} | {"layers": str}
    arguments = {}
    for option in split_outside(options, r",(?=\s*\w+\s*=)") if options else []:
        key, equals, text = (s.strip() for s in option.partition("="))
        if not equals:
            raise FlagError(f"{name}: {option!r} is not of the form option=value.")
        if key not in parameters:
            raise FlagError(f"{name} has no option {key!r}.{did_you_mean(key, parameters)}")
        if key in arguments:
            raise FlagError(f"{name}: {key} is given twice.")
        arguments[key] = _value(name, key, text, parameters[key])
    layers = arguments.pop("layers", None)
    method = function(**arguments, **{k: v for k, v in run.items() if k in signature and k not in parameters})
    return method if layers is None else on_layers(method, layers)


def _value(name: str, key: str, text: str, kind: type) -> int | float | bool | str | None:
    """Converts an option by its annotation: int, float, bool or str, each also `| None`."""
    kinds = [k for k in getattr(kind, "__args__", (kind,)) if k is not type(None)]
    if kinds[0] not in (int, float, bool, str):
        raise FlagError(
            f"{name}: option {key} has no type that a specification can give: annotate it int, float, bool or str."
        )
    if text.lower() == "none" and len(kinds) < len(getattr(kind, "__args__", ())):
        return None
    try:
        if kinds[0] is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kinds[0](text)
    except (ValueError, KeyError):
        raise FlagError(f"{name}: {key}={text} is not a {kinds[0].__name__}.") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise FlagError(f"{name}: {key}={text} is not a finite number.")
    return value
