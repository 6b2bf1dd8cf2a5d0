"""Whether an answer is right."""

from __future__ import annotations

import re

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def grade(text: str, answer: str) -> bool:
    """Whether the last ``\\boxed{…}`` holds the answer."""
    found = BOXED.findall(text)
    return bool(found) and found[-1].strip() == answer
