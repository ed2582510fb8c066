"""Connect to a Ray cluster, and shorten the errors of Ray."""

import logging
import socket

from ttt_jax.errors import ConfigError


def connect(address: str | None) -> None:
    """Connect this process to a Ray cluster; None starts one of this machine.

    Raises:
      ConfigError: where there is no such cluster.
    """
    import ray

    if address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        return
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray-address {address}: no such cluster ({last_line(error)})") from error


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray, whose messages are long, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check_reachable(address: str) -> None:
    """Raise ConfigError where nothing answers: Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ConfigError(f"--ray-address {address}: no such cluster ({error})") from error
