"""What prompts for a run are made of: its tokenizer, and haystacks."""

from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from ttt_jax.data import named_sources
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.data.prepare.tokenizer import Tokenizer
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes import haystack as haystack_lib
from ttt_jax.evaluation.probes.haystack import Haystack
from ttt_jax.evaluation.probes.needle import TASKS


class Texts(NamedTuple):
    """For the prompts of one run.

    Attributes:
      tokenizer: of all text.
      bos: the token that prompts begin with; None for none.
      haystacks: of each task.
    """

    tokenizer: Tokenizer
    bos: int | None
    haystacks: dict[str, Haystack]


def of_run(
    config: ml_collections.ConfigDict,
    tasks: Sequence[str],
    *,
    tokenizer: str | None = None,
    haystack: str | None = None,
    split: str = "validation",
) -> Texts:
    """The texts that fit the data of a run.

    Args:
      config: of the run.
      tasks: of :data:`TASKS`.
      tokenizer: ``byte``, or a file; None for that of the run's data.
      haystack: a text file; None for the documents of the run's data.
      split: of the data.

    Raises:
      ConfigError: where no tokenizer or text is known, or a file is not what it should be.
      DataError: where the data cannot be read.
    """
    found = tokenizer_lib.load(tokenizer) if tokenizer else named_sources.tokenizer_of(config.data.source)
    bos = named_sources.from_config(config, "train").bos  # of the data, whichever tokenizer is given: the model saw it
    haystacks, prose = {}, None
    for task in tasks:
        if TASKS[task].noise:
            haystacks[task] = haystack_lib.noise()
        else:
            haystacks[task] = prose = prose or _prose(config, haystack, split)
    return Texts(found, bos, haystacks)


def _prose(config: ml_collections.ConfigDict, haystack: str | None, split: str) -> Haystack:
    if haystack:
        return haystack_lib.of_file(haystack)
    source = named_sources.from_config(config, split)
    try:
        decode = named_sources.tokenizer_of(config.data.source).decoder()
    except ConfigError as error:
        raise ConfigError(
            f"data.source={config.data.source!r}: holds no text that could be read; expected --haystack FILE"
        ) from error
    return haystack_lib.of_source(source, decode)
