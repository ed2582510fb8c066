"""Train a byte-level BPE tokenizer on the documents of a train split, with Hugging Face ``tokenizers``."""

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
from ttt_jax.data.prepare.tokenize import UNFINISHED, check_empty
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.data.prepare.tokenizer import Tokenizer, from_huggingface
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store

BOS_TOKEN, EOS_TOKEN = "<s>", "</s>"
_GRACE = 0.5  # seconds that training may take to end after Ctrl-C
_LONGEST_WORD = 4096  # characters
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD}}}|\s{{{_LONGEST_WORD}}}")
MOST_BYTES = 1 << 30  # of text; more text does not make a better tokenizer
LEAST_VOCAB_SIZE = 258  # BOS, EOS and every byte
_TOKENIZER, _PURPOSE = f"{UNFINISHED}/tokenizer.json", f"{UNFINISHED}/tokenizer-made-for.json"
_DEPENDS_ON = ("text_key", "split_rule", "files")  # keys of a description


def load_or_train(
    output: Store, files: list[InputFile], vocab_size: int, job: Job, *, skip_problems: bool = False
) -> Tokenizer:
    """Return the tokenizer of a finished or unfinished dataset. If it has none yet, train one and save it there.

    Raises:
      ConfigError, DataError: as :func:`train` does.
    """
    of_train = request.describe(job, with_digests([file for file in files if file.split == "train"]), None)
    purpose = {"vocab_size": vocab_size, **{key: of_train[key] for key in _DEPENDS_ON}}
    if description := dataset.read_description(output):
        content = dataset.read_tokenizer(output, description) if description["tokenizer"].get("trained") else None
    else:
        content = _saved(output, purpose, of_train["contents"])
    if content is None:
        check_empty(output)
        print(f"training a BPE tokenizer of {vocab_size} tokens", file=sys.stderr)
        content = train(files, vocab_size, job, skip_problems=skip_problems)
        output.write(_TOKENIZER, content)
        sha256 = hashlib.sha256(content).hexdigest()
        made_for = {**purpose, "contents": of_train["contents"], "tokenizer_sha256": sha256}
        output.write_json(_PURPOSE, json_files.with_hash(made_for))
    return from_huggingface(content, "tokenizer.json", BOS_TOKEN, EOS_TOKEN)


def _saved(output: Store, purpose: dict[str, Any], digests: list[str]) -> bytes | None:
    """Return the tokenizer that an earlier run trained for the same purpose; None if there is none, or it is damaged.

    Earlier versions saved neither the digests of the files nor the hash of the tokenizer.
    """
    try:
        made_for = output.read_json(_PURPOSE)
    except DataError as error:
        json_files.warn_once(f"{error}; the tokenizer is trained anew")
        return None
    if not isinstance(made_for, dict):
        return None
    earlier, expected = made_for.pop("contents", []), made_for.pop("tokenizer_sha256", None)
    if made_for != purpose or request.first_changed(digests, earlier) is not None:
        return None
    content = output.read(_TOKENIZER)
    if content is not None and expected not in (None, hashlib.sha256(content).hexdigest()):
        json_files.warn_once(f"{output.path(_TOKENIZER)}: damaged; the tokenizer is trained anew")
        return None
    return content


def train(files: list[InputFile], vocab_size: int, job: Job, *, skip_problems: bool = False) -> bytes:
    """Train on the first :data:`MOST_BYTES` of the train split, and return the content of a ``tokenizer.json``.

    All bytes are in the vocabulary, so that every text has tokens. The same documents give the same tokenizer.

    Args:
      job: says which documents are in the train split.

    Raises:
      ConfigError: if the vocabulary is too small, or there is no train split.
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
    """Call a function that does not return to Python for minutes, without making Ctrl-C wait for it.

    The call is made in a daemon thread. Ctrl-C sets ``stop``, which ends the call if it still reads texts.
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
    """Yield a text, cut inside words of more than ``_LONGEST_WORD``: training takes time quadratic in their length."""
    begin = 0
    for found in _LONG_WORD.finditer(text):
        yield text[begin : found.end()]
        begin = found.end()
    if begin < len(text) or not text:
        yield text[begin:]
