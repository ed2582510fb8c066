"""One decision for all processes, without stopping to ask."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """The largest of the numbers that the processes vote for.

    A vote is a tiny program on the devices, in line with the steps: cast before a step, its outcome is known once the
    step before that has ended, and is the same everywhere.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, wish: Callable[[], int]) -> Callable[[], int]:
        """Votes for the number that ``wish`` gives now; what it returns waits for the outcome.

        A lone process need not ask, and its outcome is what it wishes at that time.
        """
        if self._alone:
            return wish
        mine = np.array([wish()], np.int32)
        outcome = self._largest(jax.make_array_from_callback((self._devices,), self._place, lambda _: mine))
        return lambda: int(outcome)
