"""Examples in tokens: a haystack of the length that is left, with its needle at the depth that is asked for.

Shapes: T tokens of an example, prompt and answer.
"""

from typing import NamedTuple

import numpy as np

from ttt_jax.data.prepare.tokenizer import Encode
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes import needle as needle_lib
from ttt_jax.evaluation.probes.haystack import Haystack
from ttt_jax.evaluation.probes.needle import Needle, Task

_MOST_TEXT = 64  # tokens of text that are read, at most, for each token of a prompt


class Example(NamedTuple):
    """A prompt with its answer.

    Attributes:
      needle: what is hidden in it.
      tokens: [T], int32: the prompt, then the answer.
      candidates: tokens of each value that could be the answer; the first are the last of ``tokens``.
      depth: where in the haystack the needle is, in percent of the haystack's tokens.
    """

    needle: Needle
    tokens: np.ndarray
    candidates: list[np.ndarray]
    depth: float


def examples(
    task: Task,
    haystack: Haystack,
    encode: Encode,
    bos: int | None,
    *,
    context: int,
    depths: list[float],
    index: int,
    candidates: int = 8,
    seed: int = 0,
) -> list[Example]:
    """Example ``index`` at each of the depths, T = ``context``.

    Depth and context change what lies around a needle, not the needle: they are compared on the same ones, and so are
    models with the same tokenizer. The haystack is cut where it ends, so that T is exact.

    Args:
      depths: in percent. The needle stands between two sentences, where that is nearest.
      candidates: values that could be the answer, its own among them.

    Raises:
      ConfigError: where a prompt without haystack is too long already, or the haystack has hardly any text.
    """
    rng = np.random.default_rng([seed, list(needle_lib.TASKS.values()).index(task), index])
    hidden, place = needle_lib.draw(rng, task, candidates), rng.random()
    start = [] if bos is None else [np.array([bos])]
    start += [encode(hidden.introduction), *([] if task.noise else [_following(encode, "\n")])]
    sentence = _following(encode, haystack.before_needle + hidden.sentence)
    question, answers = _question(encode, "\n" + hidden.question, hidden.values)
    rest = sum(map(len, start)) + len(sentence) + len(question) + len(answers[0])
    if context <= rest:
        raise ConfigError(f"--context {context}: a prompt without haystack has {rest} tokens; expected more")
    units = _haystack(haystack, encode, place, context - rest)
    ends = np.cumsum([0, *map(len, units)])
    text = np.concatenate(units)
    found = []
    for depth in depths:
        end = ends[np.argmin(np.abs(ends - depth / 100 * len(text)))]
        parts = [*start, text[:end], sentence, text[end:], question, answers[0]]
        tokens = np.concatenate(parts).astype(np.int32)
        found.append(Example(hidden, tokens, answers, 100 * end / len(text)))
    return found


def _haystack(haystack: Haystack, encode: Encode, place: float, tokens: int) -> list[np.ndarray]:
    """Units of so many tokens together; of the last, only the beginning."""
    size = tokens + 1024
    while size <= _MOST_TEXT * (tokens + 1024):
        units, total = [], 0
        for text in haystack.units(place, size):
            units.append(_following(encode, text))
            total += len(units[-1])
            if total >= tokens:
                return [*units[:-1], units[-1][: len(units[-1]) - (total - tokens)]]
        size *= 2
    raise ConfigError(f"--haystack: {haystack.name} has hardly any text; expected enough for {tokens} tokens")


def _question(encode: Encode, question: str, values: tuple[str, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of the question, and of each answer to it.

    A space stands between the two. It is part of the question where it has a token of its own, and of the answer where
    it shares one with what follows: answers begin at the first token that is not the same for the question alone.
    """
    alone = _following(encode, question + " ")
    whole = [_following(encode, f"{question} {value}") for value in values]
    same = min(_common(alone, each) for each in whole)
    return whole[0][:same], [each[same:].astype(np.int32) for each in whole]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _following(encode: Encode, text: str) -> np.ndarray:
    """Tokens of a text that stands behind other text: some tokenizers put a space before the first word of a text."""
    line, both = encode("\n"), encode("\n" + text)
    return both[len(line) :] if np.array_equal(both[: len(line)], line) else encode(text)
