"""Errors that a user may see. This module imports nothing, so that every other one can raise them."""


class ConfigError(ValueError):
    """A config that cannot be run: one line that names the key and what would be accepted."""
