"""The program that compares expressions by math-verify; imports nothing of skipkv.

sympy can hang or take all memory on a few characters, so it runs in a process of its own.
"""

import math
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

PLACES = 12  # of decimals: math-verify's 6 make 0.333333 of 1/3
# Units are off: they would make 3 of 3c.
CONFIG = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
)


def _parse(text: str) -> Any:
    found = parse(f"${text}$", [CONFIG], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def answer(found: str, gold: str, tolerance: float) -> list[bool]:
    """[whether they are equal], or for a tolerance > 0 also whether their values are as close as that."""
    a, b = _parse(found), _parse(gold)
    if a is None or b is None:
        return [False]
    if verify(b, a, float_rounding=PLACES, allow_set_relation_comp=True, timeout_seconds=None):
        return [True]
    try:
        return [tolerance > 0 and math.isclose(float(a), float(b), rel_tol=tolerance)]
    except (TypeError, ValueError, OverflowError, AttributeError):  # no number
        return [False]
