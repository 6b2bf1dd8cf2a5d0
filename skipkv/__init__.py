"""skipkv: compressed KV caches for reasoning models. Importing has no side effects."""

from .errors import BackendError, CapacityError, CheckpointError, ConfigError, Error
from .methods import (
    H2O,
    RKV,
    TOVA,
    Blend,
    Custom,
    Full,
    H2OLast,
    KeyDiff,
    KNorm,
    Method,
    Random,
    SkipKV,
    SnapKV,
    Streaming,
    parse_method,
)  # fmt: skip
from .model import Model, load
from .results import Event, Generation, Replay, Stats
from .run import Options, Sampling
from .selection import Selection, select
from .sentences import Sentences, flag_repeats, segment
from .steering import Steering
from .trace import Compaction, Sentence, Trace

__version__ = "0.1.0"

__all__ = [
    "BackendError", "Blend", "CapacityError", "CheckpointError", "Compaction", "ConfigError", "Custom", "Error",
    "Event", "Full", "Generation", "H2O", "H2OLast", "KNorm", "KeyDiff", "Method", "Model", "Options", "RKV",
    "Random", "Replay", "Sampling", "Selection", "Sentence", "Sentences", "SkipKV", "SnapKV", "Stats", "Steering",
    "Streaming", "TOVA", "Trace", "flag_repeats", "load", "parse_method", "segment", "select",
]  # fmt: skip
