"""Every exception that skipkv raises on purpose. The C core's status codes map to these, one to one."""


class Error(Exception):
    """Base of all skipkv exceptions."""


class CheckpointError(Error):
    """A checkpoint file is wrong; the message names the file, the tensor, what was expected and what was found."""


class ConfigError(Error, ValueError):
    """A parameter is out of range; the message names it, its value and the allowed range."""


class CapacityError(Error, MemoryError):
    """Something does not fit; the message names what was needed and the limit."""


class BackendError(Error, RuntimeError):
    """A device, driver or library is missing or failed."""
