"""Evaluate a trained model on a split: compute the loss of each token, by its position."""

import bisect
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ttt_jax import finite
from ttt_jax.data import named_sources
from ttt_jax.data import sequences as sequences_lib
from ttt_jax.data import token_source as source_lib
from ttt_jax.data.sequences import Sequences
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import catalogue, losses, result_files, statistics
from ttt_jax.evaluation.evaluations import Evaluation, from_summary
from ttt_jax.evaluation.result_files import PartialResults
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.evaluation.trained import Trained
from ttt_jax.models import counts, pattern


class Selection(NamedTuple):
    """The tokens to evaluate a model on.

    Attributes:
      context: T; windows have T tokens, documents up to T.
      split: of the dataset.
      most: the number of windows or documents, spread evenly over the split; all of them if it has fewer.
      by_document: read documents, each from its beginning and a fresh state, rather than windows.
      chains: if not 0, read documents in so many chains: each document starts from the state its predecessor left.
      source: a dataset other than that of the run.
    """

    context: int
    split: str = "validation"
    most: int = 256
    by_document: bool = False
    chains: int = 0
    source: str | None = None

    @property
    def documents(self) -> bool:
        """Return whether documents are read, rather than windows."""
        return self.by_document or bool(self.chains)

    def stem(self, step: int | None) -> str:
        """Return the name of the files of the evaluation (:func:`catalogue.name`)."""
        kind = {"by_document": self.documents, "carried": bool(self.chains)}
        return catalogue.name(self.split, self.context, source=self.source, step=step, **kind)


def evaluate(
    trained: Trained,
    selection: Selection,
    *,
    batch_size: int | None = None,
    piece_length: int | None = None,
    stem: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
) -> Evaluation | None:
    """Return the loss by token index of one checkpoint; None on all processes but the first.

    Results do not depend on batch size, piece length or mesh. Losses are kept in the workdir until all are computed, so
    that the same call resumes after an interruption. All processes must make the same call.

    Args:
      batch_size: sequences per batch; by default, about as many tokens as a training step has.
      piece_length: tokens per piece, the state carried from piece to piece; by default, the training context.
      stem: the name of the files that will hold the evaluation.
      progress: called with the number of tokens done and the total.
      check: called by the first process before it writes to the workdir; raises if it must not write.

    Raises:
      ConfigError: if the data does not exist, has nothing to predict, or cannot be read by the model in this way.
    """
    data = _data(trained, selection)
    sequences, counted, skipped = _with_targets(
        data, _sequences(trained, data, selection), documents=selection.documents
    )
    # Sequences of about the same length are read side by side.
    longest_first = sorted(range(len(sequences)), key=lambda i: -sequences_lib.length(sequences[i]))
    order = [sequences[i] for i in longest_first]
    lengths = [sequences_lib.length(sequence) for sequence in order]
    piece_length = min(piece_length or trained.config.data.sequence_length, lengths[0])
    if batch_size is None:
        c = trained.config.data
        batch_size = max(1, c.batch_size * c.sequence_length // piece_length)

    spans = hashlib.blake2b(repr(sequences).encode(), digest_size=8).hexdigest()
    identity = {"step": trained.step, "data": data.fingerprint(), "sequences": spans, "checkpoint": trained.fingerprint}
    if source := trained.config.model.ttt.learner_source:  # may change without a new checkpoint
        identity["learner"] = source
    folder = result_files.partial_folder(
        trained.workdir / "eval", stem or selection.stem(None), identity, ("data", "sequences")
    )
    partial = PartialResults(folder, identity, lengths, check)
    first = jax.process_index() == 0
    found: list[np.ndarray] = []

    def restore():
        found.extend(partial.restore())
        return len(found)

    done = Exchange("evaluation", ConfigError).on_first(restore)
    tokens, total = sum(lengths[:done]), sum(lengths)
    progress(tokens, total)
    try:
        if done < len(order):
            for nll in losses.of_sequences(
                trained, data, order[done:], piece_length=piece_length, batch_size=batch_size
            ):
                tokens += len(nll)
                progress(tokens, total)
                if first:
                    found.append(nll)
                    partial.add(nll)
    finally:
        if first and len(found) < len(order):
            partial.flush()
    if not first:
        return None
    by_sequence = [found[place] for place in np.argsort(longest_first)]
    summary = statistics.summarise(_segments(data, sequences, by_sequence, counted), selection.context)
    evaluation = from_summary(_about(trained, selection, data, sequences, summary, skipped), summary)
    partial.remove()
    return evaluation


def _data(trained: Trained, selection: Selection) -> TokenSource:
    model = trained.config.model
    if selection.source is None:
        data = named_sources.from_config(trained.config, selection.split)
    else:
        data = named_sources.load(selection.source, selection.split, vocab_size=model.vocab_size, named_by="--source ")
    length = 1 if selection.documents else selection.context
    source_lib.check(data, model.vocab_size, length, length_key="--context ")
    return data


def _sequences(trained: Trained, data: TokenSource, selection: Selection) -> Sequences:
    if selection.chains:
        if any("time" in axes for axes in jax.tree.leaves(trained.model.state_axes())):
            raise ConfigError(
                f"--carry-state: {trained.workdir} is a {pattern.describe(trained.config.model)}, whose state grows "
                "with the number of tokens read; expected a model with a state of fixed size, such as "
                "model.mixer=ttt_linear"
            )
        found = sequences_lib.chains(data, selection.context, selection.most, selection.chains)
    elif selection.by_document:
        found = sequences_lib.documents(data, selection.context, selection.most)
    else:
        return sequences_lib.windows(data, selection.context, selection.most)
    if not found:
        raise ConfigError(f"{data.name}: has no document of {sequences_lib.LEAST_TOKENS} tokens or more")
    return found


def _with_targets(
    data: TokenSource, sequences: Sequences, *, documents: bool
) -> tuple[Sequences, list[np.ndarray], int]:
    """Return the sequences that have targets, the mask of targets of each, and the number of sequences left out.

    Raises:
      ConfigError: if no sequence has a target.
    """
    counted = [sequences_lib.counted(data, sequence) for sequence in sequences]
    kept = [place for place, of_sequence in enumerate(counted) if of_sequence.any()]
    if not kept:
        raise ConfigError(
            f"{data.name}: nothing to predict in its {len(sequences):,} {'documents' if documents else 'windows'} "
            f"(all targets are token {data.bos}, which begins documents); expected text"
        )
    skipped = sum(map(len, sequences)) - sum(len(sequences[place]) for place in kept)
    skipped += sequences_lib.too_short(data) if documents else 0
    return [sequences[place] for place in kept], [counted[place] for place in kept], skipped


def _segments(
    data: TokenSource, sequences: Sequences, nll: list[np.ndarray], counted: list[np.ndarray]
) -> list[Segment]:
    """Return losses by document; each span counts as a document if the source does not know its documents."""
    known = data.documents is not None or data.bos is not None
    starts = sequences_lib.document_starts(data).tolist() if known else []
    found = []
    for sequence, losses_of_sequence, counted_of_sequence in zip(sequences, nll, counted, strict=True):
        place = 0
        for span in sequence:
            where = slice(place, place + len(span))
            of_span = losses_of_sequence[where], counted_of_sequence[where]
            place += len(span)
            if not known:
                found.append(Segment(span.start, 0, *of_span))
                continue
            document = bisect.bisect_right(starts, span.start) - 1
            first = span.start
            while first < span.stop:
                stop = min(span.stop, starts[document + 1]) if document + 1 < len(starts) else span.stop
                where = slice(first - span.start, stop - span.start)
                found.append(Segment(document, where.start, *(x[where] for x in of_span)))
                first, document = stop, document + 1
    return found


def _about(
    trained: Trained,
    selection: Selection,
    data: TokenSource,
    sequences: Sequences,
    found: statistics.Summary,
    skipped: int,
) -> dict:
    c = trained.config
    spans = sum(len(sequence) for sequence in sequences)
    mean, error, low, high, _ = (float(x) for x in found.all)
    numbers = {
        "loss": mean,
        "loss_standard_error": error,
        "loss_low": low,
        "loss_high": high,
        "perplexity": finite.exp(mean),
        "perplexity_low": finite.exp(low),
        "perplexity_high": finite.exp(high),
    }
    return {
        **trained.description,
        "step": trained.step,
        "checkpoint": trained.fingerprint,
        "training_tokens": trained.step * c.data.batch_size * c.data.sequence_length,
        "training_flops": trained.step * counts.flops_per_step(c.model, c.data.sequence_length, c.data.batch_size),
        "source": data.name,
        "source_path": catalogue.absolute(selection.source or c.data.source),
        "fingerprint": data.fingerprint(),
        "split": selection.split,
        "of": "documents" if selection.documents else "windows",
        "carried": bool(selection.chains),
        "chains": selection.chains,
        "context": selection.context,
        "windows": spans,
        "max_windows": selection.most,
        "documents": len(found.document_sums),
        "tokens": int(found.tokens.sum()),
        "not_finite": found.not_finite,  # of the tokens
        "skipped": skipped,  # windows or documents with nothing to predict
        **finite.for_json(numbers)[0],
        "config": c.to_dict(),
    }
