"""Define every error that a user may see. This module imports nothing, so that every other one can raise them."""


class ConfigError(ValueError):
    """A config that cannot be run: one line that names the key and what would be accepted."""


class DataError(Exception):
    """Data that cannot be used, or a place that cannot be read or written: one line that names file and offset."""


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be written or read: one message that names folders and says what to do."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or not a number."""


class LaunchError(Exception):
    """The machines or the tools that reach them failed: one line that says what, where, and what still exists."""
