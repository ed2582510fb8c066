"""Reach the client of JAX's coordination service, which has no public name.

This is the only module of the package that uses ``jax._src``. It was tested with jax 0.10.2, and checked against the
sources of 0.11.0 and 0.12.0. Orbax takes the client from the same place.
"""

from typing import Any

from jax._src import distributed


def client() -> Any:
    """Return the client of this process; None before ``jax.distributed.initialize``."""
    return distributed.global_state.client
