"""What runs between operations: the top-level program, which calls them one after the other, in loops."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ttt_jax.benchmark.tpu_schedule import listing as listing_lib


def called(listing: str) -> list[str]:
    """The operations that it calls, in order."""
    return [name for name in _calls(listing_lib.with_comments(listing)) if name]


def _calls(lines: Sequence[tuple[str, str]]) -> list[str]:
    """For each bundle, the operation that it calls, which a comment names: ``%fusion.1 = fusion(%x, %y)``."""
    return [
        match[1] if "inlined_call" in text and (match := re.search(r"%([\w.$-]+) = ", comments)) else ""
        for text, comments in lines
    ]


def cycles(listing: str, times: Mapping[str, int]) -> dict[str, int]:
    """Bundles of the top-level program that run, by the operation that they call or have called; of none, ``""``.

    Each runs as often as the operations that are called around it, in the same loop.

    Args:
      listing: its ``packed-bundles-post-ra``.
      times: executions of the operations that it calls, by name.

    Raises:
      ScheduleError: for a listing of an unknown form.
    """
    lines = listing_lib.with_comments(listing)
    branches = listing_lib.branches([text for text, _ in lines])
    loops = sorted((target - at, target, at) for at, (_, target) in branches.items() if target <= at)
    loop_of: list[int | None] = [None] * len(lines)
    for number, (_, first, last) in enumerate(loops):  # those around others first
        end = min(len(lines), last + 1 + listing_lib.DELAY_SLOTS)
        loop_of[first:end] = [number] * (end - first)
    calls = _calls(lines)
    following, before = (
        _nearest(reversed(range(len(lines))), calls, loop_of),
        _nearest(range(len(lines)), calls, loop_of),
    )
    found = Counter[str]()
    for index in range(len(lines)):
        name = following[index] or before[index]
        found[name] += times.get(name, 1)
    return dict(found)


def _nearest(order: Iterable[int], calls: Sequence[str], loop_of: Sequence[int | None]) -> dict[int, str]:
    """For each bundle the operation that was called last in its own loop, in this order."""
    last: dict[int | None, str] = {}
    nearest = {}
    for index in order:
        if calls[index]:
            last[loop_of[index]] = calls[index]
        nearest[index] = last.get(loop_of[index], "")
    return nearest
