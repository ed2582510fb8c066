"""Trained models for EleutherAI's lm-evaluation-harness (``pip install 'ttt_jax[harness]'``).

Importing this module registers the model type ``ttt_jax`` with the harness. ``ttt harness`` runs tasks; the harness's
own command, with this model type known to it, is

    python -m ttt_jax.interop.harness run --model ttt_jax --model_args workdir=runs/a --tasks lambada_openai
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.data import sources
from ttt_jax.data import tokenizer as tokenizer_lib
from ttt_jax.data.errors import DataError
from ttt_jax.data.tokenizer import Tokenizer
from ttt_jax.evaluation.likelihood import Scorer, Text
from ttt_jax.evaluation.trained import Trained, load, steps
from ttt_jax.workdir import at

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(f"lm-evaluation-harness: {error}; pip install 'ttt_jax[harness]'") from error

from tqdm import tqdm  # with the harness

NO_GENERATION = "text is not generated yet; expected tasks that ask for likelihoods: multiple_choice, loglikelihood or "
NO_GENERATION += "loglikelihood_rolling"
_RESAMPLES = 1000  # for the standard errors of metrics that are no means


@register_model("ttt_jax")
class TTTModel(TemplateLM):
    """A run of ttt_jax, with its own tokenizer.

    A text of any length is read whole, each token with all that comes before it: the state is carried from piece to
    piece. With models of a fixed context the harness reads windows instead; ``max_length`` gives that.

    Args:
      workdir: of the run.
      step: which checkpoint: newest, best or a number.
      tokenizer: ``byte``, or a ``.model`` or ``.json`` file, where the dataset does not hold its own.
      prefix_token: the id of the token before the first one of a text; by default the one that begins (or else ends)
        documents in the training data.
      add_bos_token: whether it stands before a text that has a context, too, as it does in training.
      max_length: reads windows of so many tokens: a context loses its beginning, and of a long document each window is
        read for itself. None is no limit.
      batch_size: texts of the training context at a time; by default, or with 'auto', as in training.
      max_batch_size, device: as the harness passes them; not used.

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
        if max_length is not None and int(max_length) < 1:
            raise ConfigError(f"max_length={max_length}: expected 1 or more")
        batch_size = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        chosen = steps(at(workdir), str(step))
        if len(chosen) > 1:
            raise ConfigError(f"--step {step}: several checkpoints; expected newest, best or a number")
        self.trained: Trained = load(workdir, chosen[0])
        source = self.trained.config.data.source
        self.tokenizer_of_run = tokenizer_lib.load(tokenizer) if tokenizer else sources.tokenizer_of(source)
        self._encode = self.tokenizer_of_run.encoder()
        self._prefix = _begin(self.trained, self.tokenizer_of_run) if prefix_token is None else int(prefix_token)
        self._add_bos_token = add_bos_token
        self._max_length = None if max_length is None else int(max_length)
        self._scorer = Scorer(self.trained, batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token before the first one of a text, where there is no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return f"{self.tokenizer_of_run.kind}-{self.tokenizer_of_run.sha256[:16]}"

    @property
    def max_length(self) -> int | None:
        return self._max_length

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
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
        """Tokens of a text; none is added.

        Raises:
          ConfigError: for one that the model does not know.
        """
        tokens, vocab_size = self._encode(string), self.trained.config.model.vocab_size
        if tokens.max(initial=0) >= vocab_size:
            raise ConfigError(
                f"tokenizer {self.tokenizer_of_run.name}: token {tokens.max()} of {string[:20]!r} is not among the "
                f"{vocab_size} of the model; expected the tokenizer of its training data"
            )
        return tokens.tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            if self._add_bos_token and context[:1] != [self._prefix]:
                context = [self._prefix, *context]
            tokens = np.array([*context, *continuation])
            if self._max_length is not None:
                tokens = tokens[-(self._max_length + 1) :]
            texts.append(Text(tokens, min(len(continuation), len(tokens) - 1)))
        found = [tuple(score) for score in self._score(texts, disable_tqdm)]
        for (request, *_), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document, its first token given the prefix."""
        texts, owners = [], []
        for i, request in enumerate(requests):
            for text in self._document(self.tok_encode(request.args[0])):
                texts.append(text)
                owners.append(i)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score.log_likelihood for score in self._score(texts, disable_tqdm)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError(f"ttt_jax: {NO_GENERATION}")

    def _document(self, tokens: list[int]) -> list[Text]:
        """A whole document, or the harness's windows of it."""
        if not tokens:
            return []
        if self._max_length is None:
            return [Text(np.array([self._prefix, *tokens]), len(tokens))]
        windows = utils.get_rolling_token_windows(tokens, self._prefix, self._max_length, 1)
        pairs = map(utils.make_disjoint_window, windows)
        return [Text(np.array([*context, *predicted]), len(predicted)) for context, predicted in pairs]

    def _score(self, texts: Sequence[Text], disable_tqdm: bool):
        with tqdm(total=len(texts), desc="Scoring texts", disable=disable_tqdm) as bar:
            return self._scorer.score(texts, bar.update)


def evaluate(
    model: TTTModel, tasks: Sequence[str], *, include_path: str | os.PathLike | None = None, **options: Any
) -> dict[str, Any]:
    """Runs tasks of the harness; returns its results.

    Args:
      tasks: names of tasks, groups or tags.
      include_path: a folder with more of them.
      options: further ones of :func:`lm_eval.simple_evaluate`.

    Raises:
      ConfigError: where there is no such task, or it asks for generated text.
      DataError: where a task or its data cannot be loaded.
    """
    from lm_eval import simple_evaluate

    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError(f"--include-path {include_path}: no such folder; expected one with YAML files of tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # reads thousands of files
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"--tasks {','.join(unknown)}: no such task; lm_eval ls tasks shows all of them")
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # of the harness, of datasets, of the Hub
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"--tasks {','.join(tasks)}: cannot be loaded: {reason}") from error
    generating = sorted(name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until")
    if generating:
        raise ConfigError(f"--tasks {','.join(generating)}: {NO_GENERATION}")
    within = set(itertools.chain(*loaded["group_map"].values()))
    found = [x for kind in ("groups", "tasks") for name, x in loaded[kind].items() if name not in within]
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstraps would fork this process, which JAX may not survive
    results = simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=_RESAMPLES, **options)
    assert results is not None  # of the only process
    return results


def by_task(results: dict[str, Any], model: TTTModel) -> dict[str, dict[str, Any]]:
    """What :func:`evaluate` found, for each task and group.

    Returns:
      ``metrics``: of each, by its name, ``value`` and ``standard_error`` (None where the harness gives none). Beside
      them what they are of: ``num_fewshot``, ``version`` and ``documents`` of the task, ``model_step`` and the like.
    """
    keys = {"num_fewshot": "n-shot", "version": "versions", "documents": "n-samples"}
    found = {}
    for task, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            name, _, kept = key.partition(",")  # the metric, and the harness's filter of answers
            if kept and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kept}")
                name += "" if kept == "none" else f",{kept}"
                metrics[name] = {"value": value, "standard_error": error if isinstance(error, float) else None}
        found[task] = {
            "task": task,
            "metrics": metrics,
            **{key: results.get(theirs, {}).get(task) for key, theirs in keys.items()},
            "lm_eval": results.get("lm_eval_version"),
            **model.get_model_info(),
        }
    return found


def _begin(trained: Trained, tokenizer: Tokenizer) -> int:
    """The token that stands before the first one of a document in the training data."""
    found = sources.from_config(trained.config, "train").bos
    for token in (tokenizer.bos, tokenizer.eos):
        found = token if found is None else found
    if found is None:
        raise ConfigError(f"tokenizer {tokenizer.name}: has neither BOS nor EOS; expected prefix_token=ID")
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
