"""Load tokenizers: bytes, a SentencePiece ``.model``, a Hugging Face ``tokenizer.json``.

A document that spells a special token gets the tokens of its characters, never the special token.
"""

import array
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ttt_jax import extras
from ttt_jax.data.prepare import files, text_fidelity
from ttt_jax.errors import ConfigError

Encode = text_fidelity.Encode
Decode = Callable[[np.ndarray], str]  # tokens to their text, without BOS, EOS and other special tokens

_BYTE_BOS, _BYTE_EOS = 256, 257
# Usual names of BOS and EOS, for tokenizers for which neither the user nor a tokenizer_config.json names them.
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|endoftext|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a value that can be sent to another process.

    Attributes:
      kind: byte, sentencepiece or huggingface.
      name: the name of its file; ``byte`` for bytes.
      content: the content of its file.
      vocab_size: all tokens are below it.
      bos, eos: ids of the tokens that begin and end a document; None if it has no such token.
    """

    kind: str
    name: str
    content: bytes = dataclasses.field(repr=False)
    vocab_size: int
    bos: int | None
    eos: int | None

    @functools.cached_property
    def sha256(self) -> str:
        """Return the hash of the content: equal hashes, equal tokens."""
        return hashlib.sha256(self.content).hexdigest()

    @functools.cached_property
    def unknown(self) -> int | None:
        """Return the id of the token for characters without a token; None if there is none."""
        if self.kind == "byte":
            return None
        if self.kind == "sentencepiece":
            return _sentencepiece(self.content, self.name).unk_id()
        model = json.loads(self.content)["model"]
        if isinstance(model["vocab"], list):
            return model.get("unk_id")
        return model["vocab"].get(model.get("unk_token"))

    def encoder(self) -> Encode:
        """Return a function that encodes, and raises ValueError for characters that it would drop, BOS and EOS."""
        if self.kind == "byte":
            return lambda text: np.frombuffer(text.encode(), np.uint8)
        special = {token for token in (self.bos, self.eos) if token is not None}
        if self.kind == "sentencepiece":
            processor = _sentencepiece(self.content, self.name)
            if not all(map(processor.is_control, special)):
                content = text_fidelity.unreachable_in_sentencepiece(self.content, special)
                processor = _sentencepiece(content, self.name)
            return text_fidelity.strict_encoder(lambda text: _ids(processor.encode(text)), special)
        _huggingface(self.content, self.name)  # raises for a file that is no tokenizer
        content, lost = text_fidelity.unreachable_in_huggingface(self.content, special)
        tokenizer = _huggingface(content, self.name)

        # The library's "fast" means without character offsets; a batch of one keeps memory to one document.
        def encode(text: str) -> np.ndarray:
            return _ids(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

        words = tokenizer.model.__class__.__name__ in ("WordLevel", "WordPiece")
        return text_fidelity.strict_encoder(encode, special, lost, words)

    def decoder(self) -> Decode:
        """Return a function that decodes; a part of a character at either end of the tokens becomes U+FFFD."""
        if self.kind == "byte":
            return lambda tokens: bytes(tokens[tokens < _BYTE_BOS].astype(np.uint8)).decode(errors="replace")
        if self.kind == "sentencepiece":
            processor = _sentencepiece(self.content, self.name)
            return lambda tokens: processor.decode(tokens.tolist())
        tokenizer = _huggingface(self.content, self.name)
        return lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def byte() -> Tokenizer:
    """Return the tokenizer of UTF-8 bytes, with BOS 256 and EOS 257."""
    return Tokenizer("byte", "byte", b"byte", 258, _BYTE_BOS, _BYTE_EOS)


def load(location: str, *, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """Return the tokenizer in a ``.model`` or ``.json`` file at a path or URL, or that of bytes for ``byte``.

    Args:
      bos_token, eos_token: spelling of the tokens that begin and end a document. By default a SentencePiece model says
        which they are. For a ``tokenizer.json``, the ``tokenizer_config.json`` or ``special_tokens_map.json`` in the
        same folder says it, and a token that is null there does not exist; without them, the usual names are tried.

    Raises:
      ConfigError: if there is no such tokenizer or token.
    """
    if location == "byte":
        if bos_token or eos_token:
            raise ConfigError("--bos-token, --eos-token: the byte tokenizer has no names for them; expected neither")
        return byte()
    suffix = os.path.splitext(location)[1]
    if suffix not in (".model", ".json"):
        raise ConfigError(
            f"--tokenizer {location}: expected byte, a SentencePiece .model or a Hugging Face tokenizer.json"
            + ("; pickles are not read" if suffix in (".pkl", ".pickle") else "")
        )
    content = files.read(location, "--tokenizer")
    name = os.path.basename(location)
    if suffix == ".model":
        processor = _sentencepiece(content, location)
        ids = {"bos": processor.bos_id(), "eos": processor.eos_id()}
        for key, token in (("bos", bos_token), ("eos", eos_token)):
            if token:
                ids[key] = processor.piece_to_id(token)
                if processor.id_to_piece(ids[key]) != token:
                    raise ConfigError(f"--{key}-token {token!r}: {location} has no such token")
        bos, eos = (None if ids[key] < 0 else ids[key] for key in ("bos", "eos"))
        return Tokenizer("sentencepiece", name, content, processor.get_piece_size(), bos, eos)
    return from_huggingface(content, location, bos_token, eos_token, _tokenizer_config(location))


def from_huggingface(
    content: bytes, location: str, bos_token: str | None, eos_token: str | None, config: dict[str, Any] | None = None
) -> Tokenizer:
    """Return the tokenizer in the content of a ``tokenizer.json``, as :func:`load` does.

    Args:
      config: the content of its ``tokenizer_config.json``.
    """
    tokenizer, config = _huggingface(content, location), config or {}
    bos = _special_token(tokenizer, location, "bos", bos_token, config, _BOS_NAMES)
    eos = _special_token(tokenizer, location, "eos", eos_token, config, _EOS_NAMES)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps
    if not vocab_size:
        raise ConfigError(f"{location}: not a Hugging Face tokenizer: it has no tokens")
    return Tokenizer("huggingface", os.path.basename(location), content, vocab_size, bos, eos)


def _special_token(
    tokenizer, location: str, key: str, wanted: str | None, config: dict[str, Any], usual: tuple[str, ...]
) -> int | None:
    configured = config.get(f"{key}_token")
    if configured is None and f"{key}_token" in config and not wanted:
        return None
    if isinstance(configured, dict):
        configured = configured.get("content")
    for name in [wanted] if wanted else [configured] if configured else usual:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    if wanted:
        raise ConfigError(f"--{key}-token {wanted!r}: {location} has no such token")
    return None


def _tokenizer_config(location: str) -> dict[str, Any]:
    """Return the config in the folder of a ``tokenizer.json``; ``tokenizer_config.json`` overrides the other file."""
    config: dict[str, Any] = {}
    if os.path.basename(location) != "tokenizer.json":
        return config
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = os.path.join(os.path.dirname(location), name)
        if not files.exists(beside):
            continue
        try:
            found = json.loads(files.read(beside, "--tokenizer"))
        except ValueError as error:
            raise ConfigError(f"{beside}: not JSON: {error}") from error
        config.update(found if isinstance(found, dict) else {})
    return config


def _ids(tokens: list[int]) -> np.ndarray:
    """Return a list as an array, by way of ``array.array``, which takes a third of the time of ``np.array``."""
    return np.frombuffer(array.array("I", tokens), np.uint32)


def _sentencepiece(content: bytes, name: str):
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(f"{name}: needs sentencepiece; {extras.install_command('sentencepiece')}") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        if content and processor.get_piece_size():  # for empty content the library raises no error
            return processor
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{name}: not a SentencePiece model") from error
    raise ConfigError(f"{name}: not a SentencePiece model")


def _huggingface(content: bytes, name: str):
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{name}: not a Hugging Face tokenizer: {error}") from error
    tokenizer.no_truncation()  # some files turn both on
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # encode them as text
    return tokenizer
