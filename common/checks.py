"""Checks of what users write, and the words for what is wrong with it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from common.errors import UserError


def near_miss(word: str, known: Iterable[str], listing: str = "allowed") -> str:
    """`did you mean 'x'?` for the known word nearest to `word`, or a list of all of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f"did you mean {near[0]!r}?" if near else f"{listing}: {', '.join(known)}"


def check_keys(what: str, values: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse keys that nothing reads.

    Raises:
        UserError: names the key and the nearest known one.
    """
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"unknown {what} {key!r}; {near_miss(str(key), known)}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Compare a value from YAML or a command line with a type hint (`int`, finite `float`, `str`, `bool`, `Literal`,
    tuples, unions).

    Raises:
        UserError: names the value and what the hint allows.
    """
    options = get_args(hint) if get_origin(hint) is Union or _is_union(hint) else (hint,)
    if not any(_matches(value, option) for option in options):
        allowed = " or ".join(_in_words(option) for option in options)
        raise UserError(f"{name}: {value!r} is not allowed; give {allowed}")


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise a `UserError` unless `low <= value <= high`; without `high`, any finite number from `low` on will do."""
    if not low <= value < math.inf or (high is not None and value > high):
        allowed = f"{_limit(low)} to {_limit(high)}" if high is not None else f"at least {_limit(low)}"
        if value == math.inf:
            allowed += ", and finite"
        raise UserError(f"{name}: {value!r} is outside its range; allowed: {allowed}")


def check_multiple(name: str, value: int, factor: int, why: str = "") -> None:
    """Raise a `UserError` that names the nearest multiples unless `factor` divides `value`."""
    if value % factor:
        below = value // factor * factor
        nearest = f"{below} or {below + factor}" if below else str(factor)
        raise UserError(f"{name}: {value} is not a multiple of {factor}{why}; use {nearest}")


def _limit(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_union(hint: Any) -> bool:
    return type(hint).__name__ == "UnionType"


def _matches(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool) and hint is not bool:
        return False
    if hint is float:
        return isinstance(value, (int, float)) and -math.inf < value < math.inf
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list, each of it " + _in_words(get_args(hint)[0])
    words = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    return words[hint]
