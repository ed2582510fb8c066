"""Runs points on this machine, some at a time."""

import collections
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from ttt_jax.sweep.point_run import PointRun
from ttt_jax.sweep.points import Point
from ttt_jax.terminal.stopping import StopSignals

_POLL = 0.1  # seconds


def run(
    points: Sequence[Point],
    make: Callable[[Point, Mapping[str, str]], PointRun],
    environments: Sequence[Mapping[str, str]],
    tell: Callable[[str], None],
) -> signal.Signals | None:
    """Runs all points; returns the signal that stopped it, if one did.

    The first SIGINT or SIGTERM is passed on to the points, which save; the second one ends all at once.

    Args:
      make: a point and what to add to its environment, to its run.
      environments: of each of the points that run at a time.
      tell: is given a line of text.
    """
    waiting = collections.deque(points)
    running: dict[int, PointRun] = {}  # by place in environments
    passed_on = False
    with StopSignals() as stop:
        try:
            while running or (waiting and not stop.received):
                if stop.received and not passed_on:
                    passed_on = True
                    tell(f"{stop.received.name}: waits until {len(running)} points have saved; a second one does not")
                    for each in running.values():
                        each.stop(stop.received)
                for place, environment in enumerate(environments):
                    if place not in running and waiting and not stop.received:
                        running[place] = make(waiting.popleft(), environment)
                for place, each in list(running.items()):
                    if each.poll() is not None:
                        del running[place]
                time.sleep(_POLL)
        finally:
            for each in running.values():
                each.kill()
    return stop.received
