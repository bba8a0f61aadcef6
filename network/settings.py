"""Settings of units and context blocks: default, what is allowed, and how text is read."""

import argparse
import numbers
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Callable, NamedTuple

from glore_common import UsageError, closest_first


def check_whole(label: str, value: Any, low: int = 1) -> int:
    """Check an integer of at least ``low``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise UsageError(f"{label} must be an integer of at least {low}, not {value!r}.")
    return int(value)


def check_real(label: str, value: Any, low: float, high: float) -> float:
    """Check low <= value < high."""
    right = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not right or not low <= value < high:
        raise UsageError(f"{label} must be a number from {low:g} to below {high:g}, not {value!r}.")
    return float(value)


def check_flag(label: str, value: Any) -> bool:
    """Check a truth value."""
    if not isinstance(value, bool):
        raise UsageError(f"{label} must be True or False, not {value!r}.")
    return value


def check_ratio(label: str, value: Any) -> float:
    """Check a share of the channels, given as a number or as text such as '1/16'."""
    number = value
    if isinstance(value, str):
        try:
            number = float(Fraction(value.strip()))
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"{label} must be a number or a fraction such as '1/16', not {value!r}."
            ) from None
    return check_real(label, number, 1e-4, 8)


def one_of(known: Iterable[str]) -> Callable[[str, Any], str]:
    """Return a check for one of the ``known`` names, which may still grow."""

    def check(label: str, value: Any) -> str:
        if value not in known:
            nearest = closest_first(str(value), known)
            raise UsageError(f"{label} {value!r} is not one of: {', '.join(nearest)}.")
        return value

    return check


class Setting(NamedTuple):
    """A setting of a kind of unit or block.

    Attributes
    ----------
    default
    check
        ``check(label, value)`` returns the value as the builder takes it, or raises UsageError.
    read
        Turns text into a value to be checked.
    """

    default: Any
    check: Callable[[str, Any], Any]
    read: Callable[[str], Any] = str

    def of_text(self, label: str, text: str) -> Any:
        """Return the value that text stands for; UsageError says what it must be."""
        try:
            value = self.read(text)
        except (ValueError, argparse.ArgumentTypeError):
            value = text
        return self.check(label, value)
