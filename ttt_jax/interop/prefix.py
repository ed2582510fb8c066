"""The token before the first one of a text: one that stood between documents when the model was trained."""

import ml_collections
import numpy as np

from ttt_jax.data import dataset, named_sources, task_source
from ttt_jax.data.prepare.tokenizer import Tokenizer
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError
from ttt_jax.storage.store import Store

_READ = 1 << 20  # tokens of the training data that are looked through, where nothing describes it


def prefix_token_of(config: ml_collections.ConfigDict, tokenizer: Tokenizer, asked: int | None = None) -> int:
    """Return the token that begins documents in the training data of a run, or else the one that ends them.

    Args:
      config: of the run.
      tokenizer: of the texts. Its BOS and EOS are looked for in training data that does not say what it has.
      asked: the token that the user wants instead.

    Raises:
      ConfigError: where there is no such token in the data, or it is none of the model's.
    """
    token = asked
    if token is None:
        token = _in_data(config, named_sources.from_config(config, "train"), tokenizer)
    if token is None:
        raise ConfigError(
            f"data.source={config.data.source!r}: no token begins or ends its documents; expected prefix_token=ID "
            "(--prefix-token ID), the token to put before the first one of a text"
        )
    if token >= config.model.vocab_size:
        raise ConfigError(f"prefix_token={token}: expected a token of the model, below {config.model.vocab_size}")
    return token


def _in_data(config: ml_collections.ConfigDict, source: TokenSource, tokenizer: Tokenizer) -> int | None:
    if source.bos is not None:
        return source.bos
    if task_source.named(config.data.source):
        return None
    description = dataset.read_description(Store(config.data.source))
    if description is not None:
        return description["eos"]
    tokens = np.asarray(source.tokens[0 : min(_READ, len(source.tokens))])
    return next((token for token in (tokenizer.bos, tokenizer.eos) if token is not None and token in tokens), None)
