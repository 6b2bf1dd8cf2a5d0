"""skipkv: compressed KV caches for reasoning models. Importing has no side effects."""

from .errors import BackendError, CapacityError, CheckpointError, ConfigError, Error
from .methods import H2O, RKV, Custom, Full, H2OLast, Method, Random, SkipKV, SnapKV, Streaming, parse_method
from .selection import Selection, select
from .sentences import Sentences, flag_repeats, segment

__all__ = [
    "BackendError", "CapacityError", "CheckpointError", "ConfigError", "Custom", "Error", "Full", "H2O", "H2OLast",
    "Method", "RKV", "Random", "Selection", "Sentences", "SkipKV", "SnapKV", "Streaming", "flag_repeats",
    "parse_method", "segment", "select",
]  # fmt: skip
