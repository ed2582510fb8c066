"""Probe a run with needles in haystacks: accuracy by context and depth.

Answers are scored by their likelihood. Prompts are read in pieces, the state carried from one to the next, so that
memory grows with the context only by what the state holds. Then each candidate is read from the state behind the
prompt.

Shapes: B examples side by side, T tokens of an example, C candidates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.data.prepare.tokenizer import Tokenizer
from ttt_jax.distributed import sharding
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes import needle, prompt
from ttt_jax.evaluation.probes.cells import Cell, Cells, finite_or_none, share
from ttt_jax.evaluation.probes.needle import Haystack
from ttt_jax.evaluation.probes.prompt import Example, Texts
from ttt_jax.evaluation.trained import Trained
from ttt_jax.storage.workdir import Workdir

# Everything that the numbers of a cell depend on: a cell with the same values is not computed again.
CONDITIONS = ("step", "checkpoint", "seed", "samples", "candidates", "haystack", "tokenizer", "bos")
PLACE = ("context", "depth")


def cells(workdir: Workdir, task: str, defaults: dict[str, Any] | None = None) -> Cells:
    """Return the cells of a task of a run, in ``WORKDIR/probe/needle-TASK.json`` and ``.csv``.

    Args:
      defaults: the BOS of prompts in cells of earlier versions, which do not hold it: the BOS of the tokenizer.
    """
    return Cells(workdir, f"needle-{task}", (*CONDITIONS, *PLACE), {"bos": None} if defaults is None else defaults)


def probe(
    trained: Trained,
    task: str,
    texts: Texts,
    *,
    contexts: Sequence[int],
    depths: Sequence[float],
    samples: int = 20,
    candidates: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    scored: Callable[[int], None] = lambda tokens: None,
) -> list[Cell]:
    """Measure the accuracy of a trained model on one task, at every context and depth; save each cell when it is known.

    Args:
      task: of :data:`needle.TASKS`.
      texts: of the run.
      depths: in percent of the haystack.
      samples: examples per cell.
      candidates: the number of values to rank, the answer among them: chance is one in ``candidates``.
      batch_size: examples per batch; by default, the batch size of training.
      progress: called with a description of the current work.
      scored: called with the number of tokens of the prompts that have just been read.

    Returns:
      The cells. ``accuracy`` is the share of examples whose answer greedy decoding would give, token by token;
      ``ranked_first`` is the share of examples whose answer is likelier than all other candidates; each has a 95 %
      interval. ``log_likelihood`` is the log-likelihood of the whole answer, in nats, and ``advantage`` its distance to
      the mean of the other candidates, 0 for a model that remembers nothing; both are means over examples, with
      standard errors. Values that depend on a NaN or infinite score are None, and ``not_finite`` is the number of
      examples with such scores.

    Raises:
      ConfigError: if a prompt does not fit a context, or its tokens do not fit the model.
    """
    tokenizer, haystack = texts.tokenizer, texts.haystacks[task]
    conditions = _conditions(trained, task, texts, samples=samples, candidates=candidates, seed=seed)
    kept = cells(trained.workdir, task, defaults={"bos": tokenizer.bos})
    about = _about(trained, task, haystack, tokenizer)
    encode = tokenizer.encoder()
    scorer = Scorer(trained, batch_size=min(batch_size or trained.config.data.batch_size, samples))
    with kept.locked():
        known = {tuple(cell[key] for key in PLACE): cell for cell in kept.find(**conditions)}
        for context in contexts:
            missing = [depth for depth in depths if (context, depth) not in known]
            if not missing:
                continue
            progress(f"{task}, context {context}: making prompts")
            drawn = [
                prompt.examples(
                    needle.TASKS[task],
                    haystack,
                    encode,
                    texts.bos,
                    context=context,
                    depths=missing,
                    index=index,
                    candidates=candidates,
                    seed=seed,
                )
                for index in range(samples)
            ]
            _check_vocabulary(trained, drawn, tokenizer)
            for depth, examples in zip(missing, zip(*drawn, strict=True), strict=True):
                progress(f"{task}, context {context}, depth {depth:g} %")
                cell = {**conditions, "context": context, "depth": depth, **_summary(scorer, examples, context, scored)}
                kept.add(cell, about)
                known[context, depth] = cell
    return [known[context, depth] for context in contexts for depth in depths]


def tokens_to_read(
    trained: Trained,
    task: str,
    texts: Texts,
    *,
    contexts: Sequence[int],
    depths: Sequence[float],
    samples: int,
    candidates: int,
    seed: int,
) -> int:
    """Return the number of tokens of all prompts that :func:`probe` would read."""
    conditions = _conditions(trained, task, texts, samples=samples, candidates=candidates, seed=seed)
    kept = cells(trained.workdir, task, defaults={"bos": texts.tokenizer.bos}).find(**conditions)
    known = {tuple(cell[key] for key in PLACE) for cell in kept}
    return sum(samples * context for context in contexts for depth in depths if (context, depth) not in known)


class Scores(NamedTuple):
    """The scores of N examples of C candidates.

    Attributes:
      log_likelihood: [N, C], the sum over the tokens of a candidate, in nats.
      matched: [N], whether each token of the answer is the likeliest one; meaningless where the ``log_likelihood`` of
        the answer is NaN or infinite.
    """

    log_likelihood: np.ndarray
    matched: np.ndarray


class Scorer:
    """A trained model that scores answers.

    Args:
      piece_length: tokens per piece; by default, the context of training.
      batch_size: examples per batch, rounded up to a multiple of ``trained.rows``.
    """

    def __init__(self, trained: Trained, *, batch_size: int, piece_length: int | None = None):
        self._trained = trained
        self._batch_size = -(-batch_size // trained.rows) * trained.rows
        self._piece_length = piece_length or trained.config.data.sequence_length
        model = trained.model

        @functools.partial(jax.jit, donate_argnums=1)
        def read(params, state, tokens):
            return model.apply({"params": params}, tokens, state)[1]

        @jax.jit
        def answer(params, state, inputs, targets, mask):
            logits, _ = model.apply({"params": params}, inputs, state)
            found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            # Greedy decoding gives the answer if and only if each of its tokens is the likeliest one after the true
            # tokens before it: the first token that is not would be the first that decoding gets wrong.
            likeliest = (logits.argmax(-1) == targets) | (mask == 0)
            return jnp.where(mask > 0, found, 0).sum(-1), likeliest.all(-1)

        self._read, self._answer = read, answer
        self._start = jax.jit(lambda length: model.initial_state(self._batch_size, length), static_argnums=0)

    def score(self, examples: Sequence[Example], progress: Callable[[int], None] = lambda done: None) -> Scores:
        """Score examples of one context.

        Args:
          progress: called with the number of examples scored so far.
        """
        longest = max(len(candidate) for example in examples for candidate in example.candidates)
        found = []
        for first in range(0, len(examples), self._batch_size):
            group = examples[first : first + self._batch_size]
            found.append(self._of_batch(group, -(-longest // 8) * 8))  # few lengths, so that few programs are compiled
            progress(first + len(group))
        return Scores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _of_batch(self, group: Sequence[Example], longest: int) -> Scores:
        rows = [*group, *[group[-1]] * (self._batch_size - len(group))]
        tokens = np.stack([example.tokens for example in rows])  # [B, T]
        # Answers end at T and begin at different positions; the tokens before all of them are read once.
        common = max(0, tokens.shape[1] - longest - 1)
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            state = self._start(common + 2 * longest)
            for start in range(0, common, self._piece_length):
                piece = tokens[:, start : min(start + self._piece_length, common)]
                state = self._read(self._trained.params, state, self._on_devices(piece))
            scores = [self._candidate(rows, state, i, common, longest) for i in range(len(rows[0].candidates))]
        log_likelihood = np.stack([np.asarray(total) for total, _ in scores], 1)
        return Scores(log_likelihood[: len(group)], np.asarray(scores[0][1])[: len(group)])

    def _candidate(self, rows: Sequence[Example], state, index: int, common: int, longest: int):
        """Return the log-likelihood [B] of candidate ``index``, and whether all of its tokens are the likeliest [B]."""
        shape = len(rows), 2 * longest
        inputs, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, example in enumerate(rows):
            answer = example.candidates[index]
            prompt = example.tokens[common : len(example.tokens) - len(example.candidates[0])]
            tail = np.concatenate([prompt, answer])
            n = len(tail) - 1
            inputs[row, :n], targets[row, :n] = tail[:-1], tail[1:]
            mask[row, len(prompt) - 1 : n] = 1
        return self._answer(self._trained.params, state, *map(self._on_devices, (inputs, targets, mask)))

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._trained.batch_sharding)


def _conditions(
    trained: Trained, task: str, texts: Texts, *, samples: int, candidates: int, seed: int
) -> dict[str, Any]:
    return {
        "step": trained.step,
        "checkpoint": trained.fingerprint,
        "seed": seed,
        "samples": samples,
        "candidates": candidates,
        "haystack": texts.haystacks[task].fingerprint,
        "tokenizer": texts.tokenizer.sha256[:16],
        "bos": texts.bos,
    }


def _summary(
    scorer: Scorer, examples: Sequence[Example], context: int, scored: Callable[[int], None]
) -> dict[str, Any]:
    done = 0

    def progress(now: int) -> None:
        nonlocal done
        scored((now - done) * context)
        done = now

    scores, n = scorer.score(examples, progress), len(examples)
    finite = np.isfinite(scores.log_likelihood)  # [N, C]
    correct = int(scores.matched.sum()) if finite[:, 0].all() else None
    others = scores.log_likelihood[:, 1:].max(1, initial=-np.inf)
    first = int((scores.log_likelihood[:, 0] > others).sum()) if finite.all() else None
    accuracy, low, high = share(correct, n)
    ranked_first, ranked_low, ranked_high = share(first, n)
    found = scores.log_likelihood[:, 0].astype(np.float64)
    with np.errstate(invalid="ignore"):
        advantage = found - scores.log_likelihood[:, 1:].astype(np.float64).mean(1)
    return {
        "actual_depth": float(np.mean([example.depth for example in examples])),
        "answer_tokens": float(np.mean([len(example.candidates[0]) for example in examples])),
        "not_finite": int((~finite.all(1)).sum()),
        "correct": correct,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "ranked_first": ranked_first,
        "ranked_low": ranked_low,
        "ranked_high": ranked_high,
        "log_likelihood": finite_or_none(found.mean()),
        "log_likelihood_error": _error(found),
        "advantage": finite_or_none(advantage.mean()),
        "advantage_error": _error(advantage),
    }


def _error(values: np.ndarray) -> float | None:
    """Return the standard error of a mean; None if it is not known."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _about(trained: Trained, task: str, haystack: Haystack, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "probe": "needle",
        "task": task,
        "ruler_task": needle.TASKS[task].name,
        "haystacks": haystack.name,
        "tokenizers": f"{tokenizer.kind} {tokenizer.name}",
        **trained.description,
        "config": trained.config.to_dict(),
    }


def _check_vocabulary(trained: Trained, drawn: list[list[Example]], tokenizer: Tokenizer) -> None:
    largest = max(int(tokens.max()) for row in drawn for one in row for tokens in (one.tokens, *one.candidates))
    vocab_size = trained.config.model.vocab_size
    if largest >= vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.name}: has token {largest}; {trained.workdir} knows {vocab_size} tokens; "
            "expected the tokenizer of its data"
        )
