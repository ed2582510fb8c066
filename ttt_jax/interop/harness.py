"""Make trained models known to EleutherAI's lm-evaluation-harness (``pip install 'lm-eval>=0.4.13'``).

Importing this module registers the model type ``ttt_jax`` with the harness. ``ttt harness`` runs tasks. To run the
harness's own command with this model type:

    python -m ttt_jax.interop.harness run --model ttt_jax --model_args workdir=runs/a --tasks lambada_openai
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ttt_jax.data import dataset, named_sources, synthetic
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.data.prepare.tokenizer import Tokenizer
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError, NonFiniteLossError
from ttt_jax.evaluation.losses import Scorer, Text
from ttt_jax.evaluation.trained import Trained, loaded, steps
from ttt_jax.storage.store import Store
from ttt_jax.storage.workdir import at

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ConfigError(f"lm-evaluation-harness: {error}; pip install 'lm-eval>=0.4.13'") from error

from tqdm import tqdm  # installed with the harness

NO_GENERATION = (
    "generation of text is not supported; expected tasks that ask for likelihoods: multiple_choice, loglikelihood or "
    "loglikelihood_rolling"
)
_MOST_SEARCHED = 1 << 20  # tokens of training data without a description, in which BOS and EOS are looked for
_LOG = logging.getLogger(__name__)


@register_model("ttt_jax")
class TTTModel(TemplateLM):
    """A run of ttt_jax as a model of the harness, with the tokenizer of its data.

    A text of any length is read whole, each token with everything before it: the state is carried from piece to piece.
    For models of a fixed context the harness reads windows instead; ``max_length`` does that here.

    Args:
      workdir: workdir of the run.
      step: checkpoint: newest, best or a number.
      tokenizer: ``byte``, or a ``.model`` or ``.json`` file; needed where the dataset has none.
      prefix_token: id of the token before the first one of a text. By default the one that begins, or else ends,
        documents in the training data; see :func:`prefix_token_of`.
      add_bos_token: whether the prefix token also stands before a text that has a context, as it does in training.
      max_length: number of tokens of a window: a context loses its beginning, and each window of a long document is
        read on its own. An answer of more tokens is refused. None is no limit.
      batch_size: texts to read at a time, each of the training context. By default, or with 'auto', as in training.
      max_batch_size, device: accepted because the harness passes them; not used.

    Raises:
      ConfigError: where there is no such run, checkpoint or tokenizer.
    """

    def __init__(
        self,
        workdir: str,
        step: str | int = "newest",
        tokenizer: str | None = None,
        prefix_token: int | None = None,
        add_bos_token: bool = True,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        del max_batch_size, device
        self._max_length = None if max_length is None else _integer("max_length", max_length, 1)
        automatic = batch_size is None or str(batch_size).startswith("auto")
        rows = None if automatic else _integer("batch_size", batch_size, 1)
        chosen = steps(at(workdir), str(step))
        if len(chosen) > 1:
            raise ConfigError(f"--step {step}: several checkpoints; expected newest, best or a number")
        self.trained: Trained = next(loaded(workdir, str(step)))
        source = self.trained.config.data.source
        self.tokenizer_of_run = tokenizer_lib.load(tokenizer) if tokenizer else named_sources.tokenizer_of(source)
        self._encode = self.tokenizer_of_run.encoder()
        chosen_prefix = None if prefix_token is None else _integer("prefix_token", prefix_token, 0)
        self._prefix = prefix_token_of(self.trained.config, self.tokenizer_of_run, chosen_prefix)
        self._add_bos_token = add_bos_token
        self._scorer = Scorer(self.trained, rows)
        self._asked: dict[str, Any] = {}  # hash of the requested texts, by task

    @property
    def eot_token_id(self) -> int:
        """Return the token before the first one of a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer_of_run.kind}-{self.tokenizer_of_run.sha256[:16]}"

    @property
    def max_length(self) -> int | None:
        return self._max_length

    def get_model_info(self) -> dict[str, Any]:
        """Return what results record about the model."""
        trained = self.trained
        return {
            "model_workdir": trained.name,
            "model_step": trained.step,
            "model_fingerprint": trained.fingerprint,
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(trained.params)),
            "training_context": trained.config.data.sequence_length,
            "max_length": self._max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Return the tokens of a text, without adding any.

        Raises:
          ConfigError: where a token is not in the vocabulary of the model.
        """
        tokens, vocab_size = self._encode(string), self.trained.config.model.vocab_size
        if tokens.max(initial=0) >= vocab_size:
            raise ConfigError(
                f"tokenizer {self.tokenizer_of_run.name}: token {tokens.max()} of {string[:20]!r} is not among the "
                f"{vocab_size} of the model; expected the tokenizer of its training data"
            )
        return tokens.tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each answer after its context, and whether greedy decoding produces it.

        Raises:
          ConfigError: for an answer that has no token of its own, or more tokens than ``max_length``.
          NonFiniteLossError: where the model gives NaN or infinity.
        """
        self._record(requests)
        encoded, joined = [], 0
        for context, continuation in (request.args for request in requests):
            before, answer, joins = self._encode_both(context, continuation)
            encoded.append(((context, continuation), before, answer))
            joined += joins
        if joined:
            _LOG.warning(
                f"{joined} of {len(requests)} answers share a token with their context; as in the harness's models, "
                "an answer begins after as many tokens as its context has alone"
            )
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, answer, _ = self._encode_both(context, continuation)
        return before, answer

    def _encode_both(self, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
        """Return the tokens of context and answer as ``TemplateLM._encode_pair`` does, and whether they share a token.

        White space at the end of the context belongs to the answer. The tokens of the answer are those of the whole
        text after as many as the context has alone.
        """
        stripped = context.rstrip()
        before = self.tok_encode(stripped)
        whole = self.tok_encode(context + continuation)
        return before, whole[len(before) :], whole[: len(before)] != before

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        texts = []
        for request, context, continuation in requests:
            self._check_answer(_shown(request), continuation)
            if not context or (self._add_bos_token and context[:1] != [self._prefix]):
                context = [self._prefix, *context]
            tokens = np.array([*context, *continuation])
            if self._max_length is not None:
                tokens = tokens[-(self._max_length + 1) :]
            texts.append(Text(tokens, len(continuation)))
        names = [_shown(request) for request, *_ in requests]
        scores = [tuple(score) for score in self._score(texts, names, disable_tqdm)]
        for (request, *_), score in zip(requests, scores, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, score)
        return scores

    def _check_answer(self, shown: str, continuation: list[int]) -> None:
        """Raise ConfigError for an answer that would be scored with none, or only some, of its tokens."""
        if not continuation:
            raise ConfigError(
                f"tokenizer {self.tokenizer_of_run.name}: {shown} has no token of its own; expected answers that have "
                "some, such as answers that begin with a space"
            )
        if self._max_length is not None and len(continuation) > self._max_length:
            raise ConfigError(
                f"max_length={self._max_length}: {shown} has {len(continuation)} tokens; expected max_length "
                f"{len(continuation)} or more"
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each document after the prefix token, 0 for an empty document.

        Raises:
          ConfigError: for a document whose characters have no tokens, and for a task without any text.
          NonFiniteLossError: where the model gives NaN or infinity.
        """
        self._record(requests)
        texts, owners, with_text = [], [], set()
        for i, request in enumerate(requests):
            (document,) = request.args
            tokens = self.tok_encode(document)
            if document and not tokens:
                raise ConfigError(
                    f"tokenizer {self.tokenizer_of_run.name}: the document {document[:40]!r} has no tokens; expected "
                    "documents whose characters it can encode"
                )
            with_text |= {request.task_name} if tokens else set()
            for text in self._document(tokens):
                texts.append(text)
                owners.append(i)
        for task in {request.task_name for request in requests} - with_text - {None}:
            raise ConfigError(f"--tasks {task}: all of its documents are empty; expected some text")
        totals = np.zeros(len(requests))
        names = [f"the document {requests[i].args[0][:40]!r}" for i in owners]
        np.add.at(totals, owners, [score.log_likelihood for score in self._score(texts, names, disable_tqdm)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError(f"ttt_jax: {NO_GENERATION}")

    def _document(self, tokens: list[int]) -> list[Text]:
        """Return a document as one text, or as the harness's windows of it."""
        if not tokens:
            return []
        if self._max_length is None:
            return [Text(np.array([self._prefix, *tokens]), len(tokens))]
        windows = utils.get_rolling_token_windows(tokens, self._prefix, self._max_length, 1)
        pairs = map(utils.make_disjoint_window, windows)
        return [Text(np.array([*context, *predicted]), len(predicted)) for context, predicted in pairs]

    def _score(self, texts: Sequence[Text], names: Sequence[str], disable_tqdm: bool):
        with tqdm(total=len(texts), desc="Scoring texts", disable=disable_tqdm) as bar:
            scores = self._scorer.score(texts, bar.update)
        for score, name in zip(scores, names, strict=True):
            if not math.isfinite(score.log_likelihood):
                raise NonFiniteLossError(
                    f"{self.trained.workdir}, step {self.trained.step}: the log-likelihood of {name} is "
                    f"{score.log_likelihood}; expected a model that gives finite numbers"
                )
        return scores

    def _record(self, requests) -> None:
        """Add the requested texts to the hash of each task."""
        for request in requests:
            digest = self._asked.setdefault(request.task_name, hashlib.blake2b(digest_size=8))
            digest.update(json.dumps([request.request_type, *request.args]).encode())

    def forget_requests(self) -> None:
        """Forget the texts that tasks have requested, so that :meth:`identity` covers those requested from now on."""
        self._asked.clear()

    def identity(self, tasks: Sequence[str]) -> str:
        """Return a short hash of everything that the results of tasks depend on, except the model and the metrics."""
        asked = [self._asked[task].hexdigest() for task in tasks if task in self._asked]
        reading = [self.tokenizer_of_run.sha256, self._prefix, bool(self._add_bos_token), self._max_length]
        return hashlib.blake2b(json.dumps([asked, reading]).encode(), digest_size=4).hexdigest()


def _shown(request: tuple[str | None, str | None] | None) -> str:
    """Return an answer and the end of its context, for messages."""
    context, answer = request or (None, None)
    return "an answer" if answer is None else f"the answer {answer[:40]!r} after {(context or '')[-40:]!r}"


def _integer(name: str, value: Any, least: int) -> int:
    try:
        if int(value) >= least:
            return int(value)
    except ValueError:
        pass
    raise ConfigError(f"{name}={value}: expected {least} or more")


def prefix_token_of(config: ml_collections.ConfigDict, tokenizer: Tokenizer, asked: int | None = None) -> int:
    """Return the token that begins documents in the training data of a run, or else the one that ends them.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the texts. Training data without a description is searched for its BOS and EOS.
      asked: a token that the user has chosen instead.

    Raises:
      ConfigError: where the data has no such token, or the token is not in the vocabulary of the model.
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
    if synthetic.is_task(config.data.source):
        return None
    description = dataset.read_description(Store(config.data.source))
    if description is not None:
        return description["eos"]
    tokens = np.asarray(source.tokens[0 : min(_MOST_SEARCHED, len(source.tokens))])
    return next((token for token in (tokenizer.bos, tokenizer.eos) if token is not None and token in tokens), None)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
