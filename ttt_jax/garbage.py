"""How often Python looks for garbage in circles."""

import atexit
import gc

_OBJECTS = 10_000  # made since the last look; Python's own is 700, or 2,000


def collect_rarely() -> None:
    """Look for garbage in circles less often, and not at all as the process ends.

    Importing JAX and tracing a program make millions of objects, most of which stay. Looking through them again and
    again, and once more at the end, takes a third of the CPU time of a short command.
    """
    if gc.get_threshold()[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
