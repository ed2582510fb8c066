"""Make the prompts of needle probes in tokens: a needle at a given depth in a haystack that fills the context.

Shapes: T tokens of an example, prompt and answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from ttt_jax.data import named_sources
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.data.prepare.tokenizer import Encode, Tokenizer
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes import needle as needle_lib
from ttt_jax.evaluation.probes.needle import TASKS, Haystack, Needle, Task

_MOST_TEXT = 64  # tokens of text to read, at most, for each token of a prompt


class Example(NamedTuple):
    """A prompt with its answer.

    Attributes:
      needle: the hidden needle.
      tokens: [T], int32: the prompt, then the answer.
      candidates: the tokens of each candidate; the first are the last of ``tokens``.
      depth: the position of the needle in percent of the haystack's tokens.
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
    """Return example ``index`` at each of the depths, T = ``context``.

    The needle does not depend on depth and context, so that they are compared on the same needles, and so are models
    with the same tokenizer. The haystack is cut at its end, so that T is exact.

    Args:
      depths: in percent. The needle is put between two sentences, as close to the depth as possible.
      candidates: the number of values to rank, the answer among them.

    Raises:
      ConfigError: if a prompt without haystack is too long already, or the haystack has hardly any text.
    """
    rng = np.random.default_rng([seed, list(TASKS.values()).index(task), index])
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
    """Return units with so many tokens in total; the last is cut."""
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
    """Return the tokens of the question, and of each answer to it.

    The space between the two is part of the question if it has its own token, and part of the answer if it shares a
    token with the following characters: answers begin at the first token that differs from the question alone.
    """
    alone = _following(encode, question + " ")
    whole = [_following(encode, f"{question} {value}") for value in values]
    same = min(_common(alone, each) for each in whole)
    return whole[0][:same], [each[same:].astype(np.int32) for each in whole]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def _following(encode: Encode, text: str) -> np.ndarray:
    """Return the tokens of a text that follows other text: some tokenizers put a space before the first word."""
    line, both = encode("\n"), encode("\n" + text)
    return both[len(line) :] if np.array_equal(both[: len(line)], line) else encode(text)


class Texts(NamedTuple):
    """The tokenizer and the haystacks for the prompts of one run.

    Attributes:
      tokenizer: of all text.
      bos: the first token of prompts; None for none.
      haystacks: by task.
    """

    tokenizer: Tokenizer
    bos: int | None
    haystacks: dict[str, Haystack]


def texts_of_run(
    config: ml_collections.ConfigDict,
    tasks: Sequence[str],
    *,
    tokenizer: str | None = None,
    haystack: str | None = None,
    split: str = "validation",
) -> Texts:
    """Return the texts that fit the data of a run.

    Args:
      config: of the run.
      tasks: of :data:`TASKS`.
      tokenizer: ``byte``, or a file; by default, the tokenizer of the run's data.
      haystack: a text file; by default, the documents of the run's data.
      split: of the data.

    Raises:
      ConfigError: if no tokenizer or text is known, or a file is not valid.
      DataError: if the data cannot be read.
    """
    chosen = tokenizer_lib.load(tokenizer) if tokenizer else named_sources.tokenizer_of(config.data.source)
    bos = named_sources.from_config(config, "train").bos  # the BOS that the model was trained with
    haystacks, prose = {}, None
    for task in tasks:
        if TASKS[task].noise:
            haystacks[task] = needle_lib.noise_haystack()
        else:
            haystacks[task] = prose = prose or _prose(config, haystack, split)
    return Texts(chosen, bos, haystacks)


def _prose(config: ml_collections.ConfigDict, haystack: str | None, split: str) -> Haystack:
    if haystack:
        return needle_lib.haystack_of_file(haystack)
    source = named_sources.from_config(config, split)
    try:
        decode = named_sources.tokenizer_of(config.data.source).decoder()
    except ConfigError as error:
        raise ConfigError(
            f"data.source={config.data.source!r}: holds no text that could be read; expected --haystack FILE"
        ) from error
    return needle_lib.haystack_of_source(source, decode)
