"""Every exception that skipkv raises on purpose, one to one with the C core's status codes; and how it warns."""

import sys
import warnings

LONGEST = 1200  # characters of a message


class Error(Exception):
    """Base of all skipkv exceptions: one printable line, whatever names, values and words of others it quotes."""

    def __str__(self) -> str:
        text = super().__str__()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        half = LONGEST // 2
        return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


class CheckpointError(Error):
    """A checkpoint file is wrong; the message names the file, the tensor, what was expected and what was found."""


class ConfigError(Error, ValueError):
    """A parameter is out of range; the message names it, its value and the allowed range."""


class CapacityError(Error, MemoryError):
    """Something does not fit; the message names what was needed and the limit."""


class BackendError(Error, RuntimeError):
    """A device, driver or library is missing or failed."""


def warn(text: str) -> None:
    """Warn at the caller's line: the nearest one outside of skipkv."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "skipkv":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
