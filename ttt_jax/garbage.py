"""Let Python collect cyclic garbage less often."""

import atexit
import gc

_OBJECTS = 10_000  # new objects between two collections; Python's default is 700, in later versions 2,000


def collect_rarely() -> None:
    """Collect cyclic garbage less often, and not at all when the process ends.

    Importing JAX and tracing a program make millions of objects, most of which stay. To go through them again and
    again, and once more at the end, takes a third of the CPU time of a short command.
    """
    if gc.get_threshold()[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
