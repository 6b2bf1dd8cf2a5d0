"""skipkv: compressed KV caches for reasoning models. Importing has no side effects."""

from .errors import BackendError, CapacityError, CheckpointError, ConfigError, Error

__all__ = ["BackendError", "CapacityError", "CheckpointError", "ConfigError", "Error"]
