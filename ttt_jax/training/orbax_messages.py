"""Keep what Orbax prints about saves off the terminal: :mod:`ttt_jax.training.checkpoint` reports failures, once.

Tested with orbax-checkpoint 0.12.8 and tensorstore 0.1.86 on Python 3.11.7. When a file of a checkpoint cannot be
written, Orbax ends the event loop in which it waits for all files. TensorStore then finishes the other files, and its
calls into the closed loop fail where nothing can catch them. Neither package has an option for that, so the public
``sys.unraisablehook`` leaves out this one message.
"""

import functools
import logging
import sys


@functools.cache
def silence() -> None:
    """Leave out, in this process, messages of Orbax about single files and about event loops that are closed."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
