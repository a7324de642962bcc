"""Checks of numbers where they enter: expected, got, and what to do."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from lipsim.certificates.errors import LipsimError

# The square of an anchor has to be a float32 number.
LARGEST_ANCHOR = 1e18


def check_constants(anchor: float, lipschitz: float = 1.0, feature_error: float = 0.0) -> None:
    """Refuse numbers with which a certificate would be none.

    Raises:
        ValueError: one is negative, NaN, no number, or (but for ``lipschitz``) infinite.
    """
    check_number("anchor", anchor)
    check_number("Lipschitz bound", lipschitz, finite=False)
    check_number("feature_error", feature_error)


def check_number(
    name: str, value: object, least: float = 0.0, most: float = math.inf, *, above: bool = False, finite: bool = True
) -> float:
    """A real number of a range, as a float; no bool, no text, no NaN.

    Args:
        name: what it is called in the message.
        value: the number.
        least: the smallest it may be.
        most: the largest it may be.
        above: it has to be above ``least``.
        finite: infinity is refused even where ``most`` is infinite.

    Raises:
        ValueError: it is something else.
    """
    # Of torch's numbers only those of no dimension, which a module may have computed.
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        value = value.item()
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = math.inf
    fits = least < number if above else least <= number  # False for NaN
    if not (fits and number <= most) or (finite and number == math.inf):
        sign = ">" if above else "≥"
        end = f" and at most {most:g}" if most < math.inf else ""
        kind = "a finite " if finite else "a "
        raise LipsimError(f"expected {kind}{name} {sign} {least:g}{end}, got {value!r}")
    return number


def check_count(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least ``least``, also one of NumPy, as an int; no bool and no float.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise LipsimError(f"expected a whole number {name} ≥ {least}, got {value!r}")
    return int(value)
