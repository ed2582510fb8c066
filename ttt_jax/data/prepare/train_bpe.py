"""A byte-level BPE tokenizer, trained on the documents of a train split with Hugging Face ``tokenizers``."""

import concurrent.futures
import hashlib
import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ttt_jax.data import dataset
from ttt_jax.data.prepare import records, request
from ttt_jax.data.prepare.files import InputFile, with_digests
from ttt_jax.data.prepare.job import Job
from ttt_jax.data.prepare.tokenize import UNFINISHED, check_empty
from ttt_jax.data.prepare.tokenizer import Tokenizer, from_huggingface
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store

BOS_TOKEN, EOS_TOKEN = "<s>", "</s>"
_GRACE = 0.5  # seconds that a training has to end after Ctrl-C
_LONGEST_WORD = 4096  # characters
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")
MOST_BYTES = 1 << 30  # of text; more does not make it better
LEAST_VOCAB_SIZE = 258  # BOS, EOS and every byte
_KEPT, _PURPOSE = f"{UNFINISHED}/tokenizer.json", f"{UNFINISHED}/tokenizer-made-for.json"
_OF = ("text_key", "split_rule", "files")  # what of a description the training depends on


def kept_or_trained(
    output: Store, files: list[InputFile], vocab_size: int, job: Job, *, skip_problems: bool = False
) -> Tokenizer:
    """Return the tokenizer of a dataset that is finished or has been begun; train and keep it where there is none yet.

    Raises:
      as :func:`train`.
    """
    of_train = request.describe(job, with_digests([file for file in files if file.split == "train"]), None)
    purpose = {"vocab_size": vocab_size, **{key: of_train[key] for key in _OF}}
    if description := dataset.read_description(output):
        kept = dataset.read_tokenizer(output, description) if description["tokenizer"].get("trained") else None
    else:
        kept = _kept(output, purpose, of_train["contents"])
    if kept is None:
        check_empty(output)
        print(f"training a BPE tokenizer of {vocab_size} tokens", file=sys.stderr)
        kept = train(files, vocab_size, job, skip_problems=skip_problems)
        output.write(_KEPT, kept)
        made_for = {**purpose, "contents": of_train["contents"], "tokenizer_sha256": hashlib.sha256(kept).hexdigest()}
        output.write_json(_PURPOSE, json_files.with_hash(made_for))
    return from_huggingface(kept, "tokenizer.json", BOS_TOKEN, EOS_TOKEN)


def _kept(output: Store, purpose: dict[str, Any], contents: list[str]) -> bytes | None:
    """Return the tokenizer that was trained for this earlier; None where there is none, or it is damaged.

    What earlier versions kept knows neither contents nor a hash.
    """
    try:
        there = output.read_json(_PURPOSE)
    except DataError as error:
        json_files.warn_once(f"{error}; the tokenizer is trained anew")
        return None
    if not isinstance(there, dict):
        return None
    earlier, expected = there.pop("contents", []), there.pop("tokenizer_sha256", None)
    if there != purpose or request.other_content(contents, earlier) is not None:
        return None
    kept = output.read(_KEPT)
    if kept is not None and expected not in (None, hashlib.sha256(kept).hexdigest()):
        json_files.warn_once(f"{output.path(_KEPT)}: damaged; the tokenizer is trained anew")
        return None
    return kept


def train(files: list[InputFile], vocab_size: int, job: Job, *, skip_problems: bool = False) -> bytes:
    """Train on the first :data:`MOST_BYTES` of the documents that ``job`` puts into the train split.

    Return the content of a ``tokenizer.json``. Every text has tokens: all bytes are in the vocabulary. The same
    documents give the same tokenizer.

    Raises:
      ConfigError: where the vocabulary is too small, or there is no train split.
      DataError: for a record that cannot be read, unless ``skip_problems``.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < LEAST_VOCAB_SIZE:
        raise ConfigError(f"--train-bpe {vocab_size}: expected {LEAST_VOCAB_SIZE} or more: BOS, EOS and all bytes")
    documents = [file for file in files if file.split == "train"]
    if not documents:
        raise ConfigError("--train-bpe: there is no --train to train it on")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stop = threading.Event()
    texts = itertools.takewhile(lambda text: not stop.is_set(), _texts(documents, job, skip_problems))
    _interruptible(lambda: tokenizer.train_from_iterator(texts, trainer), stop)
    return tokenizer.to_str().encode()


def _interruptible(work: Callable[[], object], stop: threading.Event) -> None:
    """Call a function of a library that does not return to Python for minutes, such that Ctrl-C need not wait for it.

    The call is made in a thread that does not outlive the process. At Ctrl-C it is told to stop, which it can as long
    as it reads texts.
    """
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    thread = threading.Thread(target=run, name="train-bpe", daemon=True)
    thread.start()
    try:
        done.result()
    except KeyboardInterrupt:
        stop.set()
        thread.join(_GRACE)
        raise


def _texts(files: list[InputFile], job: Job, skip_problems: bool) -> Iterator[str]:
    size = 0
    for index, unit, _ in records.units(files, records.Position(), 1 << 20, job.text_key):
        for record in records.texts(unit, job.text_key):
            if isinstance(record, records.Problem):
                if skip_problems:
                    continue
                raise DataError(f"{files[index].location}, record {record.record}: {record.what}")
            text = record[1].encode()
            if job.split_of("train", text) == "train":
                size += len(text)
                yield from _bounded(record[1])
            if size >= MOST_BYTES:
                return


def _bounded(text: str) -> Iterator[str]:
    """Yield a text cut inside words beyond ``_LONGEST_WORD``: the time of training is quadratic in their length."""
    begin = 0
    for found in _LONG_WORD.finditer(text):
        yield text[begin : found.end()]
        begin = found.end()
    if begin < len(text) or not text:
        yield text[begin:]
