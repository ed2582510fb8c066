"""What runs between operations: the top-level program, which calls them one after the other, in loops."""

import re
from collections.abc import Mapping

from ttt_jax.benchmark.tpu_schedule import bundles

_CALL = re.compile(r"inlined_call\b[^/]*/\* %([\w.$-]+) = ")


def called(listing: str) -> list[str]:
    """The operations that it calls, in order."""
    return _CALL.findall(listing)


def cycles(listing: str, times: Mapping[str, int]) -> int:
    """Bundles of the top-level program that run, each as often as the operations that are called around it.

    Args:
      listing: its ``packed-bundles-post-ra``.
      times: executions of the operations that it calls, by name.

    Raises:
      ScheduleError: for a listing of an unknown form.
    """
    lines = bundles.raw_bundles(listing)
    calls = {index: match[1] for index, line in enumerate(lines) if (match := _CALL.search(line))}
    branches = bundles.branches(bundles.parse(listing))
    loops = sorted((target, at) for at, (_, target) in branches.items() if target <= at)
    weights = [1] * len(lines)
    for first, last in sorted(loops, key=lambda loop: loop[0] - loop[1]):  # inner ones after those around them
        inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
        own = [
            times.get(name, 1)
            for index, name in calls.items()
            if first <= index <= last and not any(a <= index <= b for a, b in inner)
        ]
        for index in range(first, min(len(lines), last + 1 + bundles.DELAY_SLOTS)):
            weights[index] = max(own, default=weights[first])
    return sum(weights)
