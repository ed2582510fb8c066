"""Shows what a command prints while it runs, and asks meanwhile whether there is more to come."""

import codecs
import os
import selectors
import sys
import time
from collections.abc import Callable, Sequence

from ttt_jax.launch.commands import Commands

LAST_WORDS = 10.0  # seconds in which a command may show what it has still


def show(commands: Commands, argv: Sequence[str], over: Callable[[], bool], poll: float) -> float:
    """Copies the standard output of a command to that of this process, until the command ends.

    Args:
      over: asked every ``poll`` seconds; once it is true the command is given a little time and then ended, for what
        reads the log of a machine that has died may never end by itself.

    Returns:
      For how many seconds nothing more had come when it ended.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with commands.follow(argv) as process, selectors.DefaultSelector() as selector:
        assert process is not None
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        heard = asked = time.monotonic()
        until = None
        while until is None or time.monotonic() < until:
            if selector.select(min(poll, LAST_WORDS)):
                new = os.read(process.stdout.fileno(), 65536)
                if not new:
                    break
                heard = time.monotonic()
                sys.stdout.write(decoder.decode(new))
                sys.stdout.flush()
            if until is None and time.monotonic() - asked >= poll:
                if over():
                    until = time.monotonic() + LAST_WORDS
                asked = time.monotonic()
        return time.monotonic() - heard
