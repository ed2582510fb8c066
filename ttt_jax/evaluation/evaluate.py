"""Evaluates a trained model on a split: the loss of each token, by its position."""

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
from ttt_jax.evaluation import catalogue, losses, statistics
from ttt_jax.evaluation import partial_results as unfinished_lib
from ttt_jax.evaluation.catalogue import name
from ttt_jax.evaluation.evaluations import Evaluation, from_summary
from ttt_jax.evaluation.partial_results import Unfinished
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.evaluation.trained import Trained
from ttt_jax.models import counts, pattern


class What(NamedTuple):
    """What is to be evaluated.

    Attributes:
      context: T. Windows of T tokens, or documents up to T tokens.
      split: of the dataset.
      most: windows or documents, spread evenly over the split; all, where it has no more.
      by_document: documents, each from its beginning and a fresh state, rather than windows.
      chains: where not 0, documents in so many chains: each begins with the state that the one before it left.
      source: another dataset than the run's own.
    """

    context: int
    split: str = "validation"
    most: int = 256
    by_document: bool = False
    chains: int = 0
    source: str | None = None

    def stem(self, step: int | None) -> str:
        """The name of its files."""
        by_document, carried = self.by_document or bool(self.chains), bool(self.chains)
        return name(self.split, self.context, by_document=by_document, carried=carried, source=self.source, step=step)


def evaluate(
    trained: Trained,
    what: What,
    *,
    batch_size: int | None = None,
    piece_length: int | None = None,
    stem: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
) -> Evaluation | None:
    """The loss by token index of one checkpoint, whatever the sizes of batches and pieces and the mesh.

    What is found is kept in the workdir meanwhile, so that the same call goes on where it was stopped. On many
    processes all make the same call.

    Args:
      batch_size: sequences at a time; None is about as many tokens as a training step has.
      piece_length: tokens at a time, the state carried from piece to piece; None is the training context.
      stem: of the files that are going to be written.
      progress: is called with tokens done and tokens in all.
      check: is called by the first process before it writes something down, and raises where it must not.

    Returns:
      None on all processes but the first.

    Raises:
      ConfigError: where there is no such data, nothing in it is to be predicted, or the model cannot read it so.
    """
    data = _data(trained, what)
    sequences, counted, skipped = _with_targets(data, _sequences(trained, data, what), what)
    longest_first = sorted(range(len(sequences)), key=lambda i: -sequences_lib.length(sequences[i]))
    order = [sequences[i] for i in longest_first]  # those that are read side by side are about as long
    lengths = [sequences_lib.length(sequence) for sequence in order]
    piece_length = min(piece_length or trained.config.data.sequence_length, lengths[0])
    if batch_size is None:
        c = trained.config.data
        batch_size = max(1, c.batch_size * c.sequence_length // piece_length)

    spans = hashlib.blake2b(repr(sequences).encode(), digest_size=8).hexdigest()
    identity = {"step": trained.step, "data": data.fingerprint(), "sequences": spans, "checkpoint": trained.fingerprint}
    if source := trained.config.model.ttt.learner_source:  # which may change while the checkpoint stays
        identity["learner"] = source
    folder = unfinished_lib.folder(trained.workdir / "eval", stem or what.stem(None), identity, ("data", "sequences"))
    unfinished = Unfinished(folder, identity, lengths, check)
    first = jax.process_index() == 0
    found: list[np.ndarray] = []

    def restore():
        found.extend(unfinished.restore())
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
                    unfinished.add(nll)
    finally:
        if first and len(found) < len(order):
            unfinished.flush()
    if not first:
        return None
    by_sequence = [found[place] for place in np.argsort(longest_first)]
    summary = statistics.summarise(_segments(data, sequences, by_sequence, counted), what.context)
    evaluation = from_summary(_about(trained, what, data, sequences, summary, skipped), summary)
    unfinished.remove()
    return evaluation


def _data(trained: Trained, what: What) -> TokenSource:
    model = trained.config.model
    if what.source is None:
        data = named_sources.from_config(trained.config, what.split)
    else:
        data = named_sources.load(what.source, what.split, vocab_size=model.vocab_size, named_by="--source ")
    length = 1 if what.by_document or what.chains else what.context
    source_lib.check(data, model.vocab_size, length, length_is="--context ")
    return data


def _sequences(trained: Trained, data: TokenSource, what: What) -> Sequences:
    if what.chains:
        if any("time" in axes for axes in jax.tree.leaves(trained.model.state_axes())):
            raise ConfigError(
                f"--carry-state: {trained.workdir} is a {pattern.describe(trained.config.model)}, whose state grows "
                "with all that it has read; "
                "expected a model with a state of one size, such as model.mixer=ttt_linear"
            )
        found = sequences_lib.chains(data, what.context, what.most, what.chains)
    elif what.by_document:
        found = sequences_lib.documents(data, what.context, what.most)
    else:
        return sequences_lib.windows(data, what.context, what.most)
    if not found:
        raise ConfigError(f"{data.name}: has no document of {sequences_lib.LEAST_TOKENS} tokens or more")
    return found


def _with_targets(data: TokenSource, sequences: Sequences, what: What) -> tuple[Sequences, list[np.ndarray], int]:
    """Return the sequences with something to predict, which of their targets count, and how many have nothing.

    Raises:
      ConfigError: where none has.
    """
    documents = what.by_document or bool(what.chains)
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
    """Return losses by document. Where a source does not know its documents, each span is taken for one."""
    known = data.documents is not None or data.bos is not None
    starts = sequences_lib.starts(data).tolist() if known else []
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
    what: What,
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
        "workdir": trained.name,
        "model": pattern.describe(c.model),
        "parameters": sum(x.size for x in jax.tree.leaves(trained.params)),
        "step": trained.step,
        "checkpoint": trained.fingerprint,
        "training_tokens": trained.step * c.data.batch_size * c.data.sequence_length,
        "training_flops": trained.step * counts.flops_per_step(c.model, c.data.sequence_length, c.data.batch_size),
        "source": data.name,
        "source_path": catalogue.absolute(what.source or c.data.source),
        "fingerprint": data.fingerprint(),
        "split": what.split,
        "of": "documents" if what.by_document or what.chains else "windows",
        "carried": bool(what.chains),
        "chains": what.chains,
        "context": what.context,
        "training_context": c.data.sequence_length,
        "windows": spans,
        "max_windows": what.most,
        "documents": len(found.document_sums),
        "tokens": int(found.tokens.sum()),
        "not_finite": found.not_finite,  # of the tokens
        "skipped": skipped,  # windows or documents with nothing to predict
        **finite.for_json(numbers)[0],
        "config": c.to_dict(),
    }
