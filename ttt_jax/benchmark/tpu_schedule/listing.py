"""A schedule as the TPU compiler lists it: bundles with their instructions, comments and branches."""

import re
from collections.abc import Iterator

DELAY_SLOTS = 4  # bundles after a branch that run in any case
_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})? *:[> ]*\{(.*)\}")


class ScheduleError(RuntimeError):
    """A schedule that is not there or not in the form known here; one line."""


def parse(listing: str) -> list[str]:
    """The instructions of each bundle, without comments; empty where there are none.

    Raises:
      ScheduleError: where there are no bundles, or some are missing.
    """
    return [text for text, _ in with_comments(listing)]


def with_comments(listing: str) -> list[tuple[str, str]]:
    """The instructions of each bundle, and its comments; raises as :func:`parse`."""
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
    """Lines without comments, and their comments. Comments have lines in them, and comments."""
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
    """Bundles that branch: the predicate, empty where there is none and ``!`` before it where it is negated, and the
    bundle that is next where it holds.

    Raises:
      ScheduleError: for a branch of another form.
    """
    found = {}
    for index, bundle in enumerate(bundles):
        if "sbr." not in bundle:
            continue
        match = re.search(r"= sbr\.rel (?:\((!?%\w+)\) )?target bundleno = (\d+)", bundle)
        if match is None:
            raise ScheduleError(f"bundle {index:x}: a branch of an unknown form: {bundle[:80]}")
        found[index] = (match[1] or "", int(match[2]))
    return found
