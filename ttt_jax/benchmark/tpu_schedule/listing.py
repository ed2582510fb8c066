"""Read schedules as the TPU compiler lists them: bundles with their instructions, comments, branches and calls."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

DELAY_SLOTS = 4  # bundles after a branch that run whether it is taken or not
_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})? *:[> ]*\{(.*)\}")


class ScheduleError(RuntimeError):
    """A schedule that is missing or in an unknown form. The message is one line."""


def parse(listing: str) -> list[str]:
    """Return the instructions of each bundle, without comments; "" for an empty bundle.

    Raises:
      ScheduleError: where there are no bundles, or some are missing.
    """
    return [text for text, _ in with_comments(listing)]


def with_comments(listing: str) -> list[tuple[str, str]]:
    """Return the instructions and the comments of each bundle, with the errors of :func:`parse`."""
    bundles: list[tuple[str, str]] = []
    for text, comments in _lines(listing):
        if match := _BUNDLE.match(text):
            if int(match[1], 16) != len(bundles):
                raise ScheduleError(f"bundle {match[1]} in the place of bundle {len(bundles):x}; expected all in order")
            bundles.append((match[2].strip(), comments))
    if not bundles:
        raise ScheduleError("no bundles in the schedule; expected lines such as '0x1 : { %3 = vadd ... }'")
    return bundles


def _lines(listing: str) -> Iterator[tuple[str, str]]:
    """Yield lines without comments, and their comments, which may contain line breaks and further comments."""
    text: list[str] = []
    comments: list[str] = []
    depth = 0
    for part in re.split(r"(/\*|\*/|\n)", listing):
        if part == "/*":
            depth += 1
        elif part == "*/":
            depth -= 1
        elif depth > 0:
            comments.append(part)
        elif part == "\n":
            yield "".join(text), "".join(comments)
            text, comments = [], []
        else:
            text.append(part)
    yield "".join(text), "".join(comments)


def branches(bundles: list[str]) -> dict[int, tuple[str, int]]:
    """Return the predicate and the target of each bundle that branches.

    The predicate is "" for an unconditional branch, and begins with ``!`` where it is negated.

    Raises:
      ScheduleError: for a branch of another form.
    """
    targets = {}
    for index, bundle in enumerate(bundles):
        if "sbr." not in bundle:
            continue
        match = re.search(r"= sbr\.rel (?:\((!?%\w+)\) )?target bundleno = (\d+)", bundle)
        if match is None:
            raise ScheduleError(f"bundle {index:x}: a branch of an unknown form: {bundle[:80]}")
        targets[index] = (match[1] or "", int(match[2]))
    return targets


def called(listing: str) -> list[str]:
    """Return the operations that the listing of a whole program calls, in order."""
    return [name for name in _calls(with_comments(listing)) if name]


def _calls(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return the operation that each bundle calls, from a comment such as ``%fusion.1 = fusion(%x, %y)``, else ""."""
    return [
        match[1] if "inlined_call" in text and (match := re.search(r"%([\w.$-]+) = ", comments)) else ""
        for text, comments in lines
    ]


def cycles(listing: str, times: Mapping[str, int]) -> dict[str, int]:
    """Count the cycles between operations, by the operation that is called next in the same loop, else before.

    The top-level program calls operations one after the other, in loops. Its own bundles run as often as the operations
    around them. Bundles without an operation in their loop count for the name "".

    Args:
      listing: the ``packed-bundles-post-ra`` of the top-level program.
      times: executions of the operations that it calls, by name.

    Raises:
      ScheduleError: for a listing of an unknown form.
    """
    lines = with_comments(listing)
    jumps = branches([text for text, _ in lines])
    loops = sorted((target - at, target, at) for at, (_, target) in jumps.items() if target <= at)
    loop_of: list[int | None] = [None] * len(lines)
    for number, (_, first, last) in enumerate(loops):  # outer loops first: inner ones overwrite them
        end = min(len(lines), last + 1 + DELAY_SLOTS)
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
    """Return for each bundle the operation that was called last in its own loop, in the given order."""
    last: dict[int | None, str] = {}
    nearest = {}
    for index in order:
        if calls[index]:
            last[loop_of[index]] = calls[index]
        nearest[index] = last.get(loop_of[index], "")
    return nearest
