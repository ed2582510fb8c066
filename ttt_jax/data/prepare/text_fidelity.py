"""Keep text faithful through a tokenizer: lose no characters, and let no text spell a special token."""

import hashlib
import json
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

Encode = Callable[[str], np.ndarray]  # a text to its tokens, [N] unsigned, without BOS and EOS

_CONTROL = 3  # the type of a control symbol in a SentencePiece model
_DIFFERENCES = {  # a name, and two texts that differ in nothing else
    "line ends": ("a\nb", "a b"),
    "repeated spaces": ("a  b", "a b"),
    "spaces at the end": ("a ", "a"),
    "control characters": ("a\x01b", "ab"),
    "capitals": ("Ab", "ab"),
    "accents": ("ä", "a"),
    "compatibility characters": ("ﬁ", "fi"),
}


def strict_encoder(encode: Encode, special: set[int], lost: int | None = None, words: bool = False) -> Encode:
    """Return ``encode`` such that it raises ValueError rather than lose a character or return a special token.

    Args:
      special: the tokens that no text may get.
      lost: the token of characters without a token.
      words: whether tokens are words rather than parts of words.
    """

    def encode_strictly(text: str) -> np.ndarray:
        try:
            tokens = encode(text)
        except Exception as error:  # the libraries raise nothing more special
            raise ValueError(_without_token(encode, text, lost, words) or str(error)) from error
        if lost is not None and (tokens == lost).any():
            raise ValueError(_without_token(encode, text, lost, words) or "some characters have no token")
        for token in special:
            if (tokens == token).any():
                raise ValueError(f"the text has token {token}, which begins or ends documents")
        return tokens

    return encode_strictly


def _without_token(encode: Encode, text: str, lost: int | None, words: bool) -> str | None:
    """Return which character or word of a text has no token; None if each of them has some by itself."""
    for part in dict.fromkeys(text.split() if words else text):
        if _loses(encode, part, lost):
            return f"word {part!r} has no token" if words else f"character {part!r} (U+{ord(part):04X}) has no token"
    return None


def _loses(encode: Encode, text: str, lost: int | None) -> bool:
    try:
        return bool((encode(text) == lost).any())
    except Exception:  # the libraries raise nothing more special
        return True


def lost_differences(encode: Encode, unknown: int | None) -> list[str]:
    """Return the names of differences that an encoder loses: texts that differ in them alone get the same tokens.

    Characters without a token are not among them. They are counted while documents are tokenized.

    Args:
      unknown: the token for characters without a token; None if there is none.
    """
    found = []
    for what, texts in _DIFFERENCES.items():
        try:
            first, second = map(encode, texts)
        except ValueError:  # a character has no token, which makes a document that has it a bad record
            continue
        if np.array_equal(first, second) and unknown not in first:
            found.append(what)
    return found


# ---- Special tokens


def unreachable_in_huggingface(content: bytes, special: Collection[int]) -> tuple[bytes, int | None]:
    """Return a ``tokenizer.json`` in which no text spells a special token, and the id for lost characters.

    The models (BPE, Unigram, WordLevel, WordPiece) look up pieces of text in their vocabulary by their spelling.
    Special tokens keep their ids, and are given spellings that do not occur. A BPE without a token for unknown
    characters drops such characters; here it gets one, with the highest id, so that the loss can be seen.

    Args:
      content: of the ``tokenizer.json``.
      special: ids that are special in addition to those that are special in the file.
    """
    file = json.loads(content)
    model, added = file["model"], file.get("added_tokens") or []
    special = {token["id"] for token in added if token["special"]} | set(special)
    marker = "\U0010fffd" + hashlib.sha256(content).hexdigest()
    names = {id: f"{marker} {id}" for id in special}
    for token in added:
        if token["id"] in names:
            token.update(content=names[token["id"]], special=True)
    if isinstance(model["vocab"], list):  # Unigram: [[piece, score], ...]
        model["vocab"] = [[names.get(id, piece), score] for id, (piece, score) in enumerate(model["vocab"])]
    else:
        hidden = {piece for piece, id in model["vocab"].items() if id in names}
        if model.get("unk_token") in hidden:
            model["unk_token"] = names[model["vocab"][model["unk_token"]]]
        model["vocab"] = {names.get(id, piece): id for piece, id in model["vocab"].items()}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [merge for merge in model["merges"] if not _spells(merge, hidden, prefix)]
    lost = _mark_lost_characters(model, added, f"{marker} lost") if "merges" in model else None
    file["post_processor"] = None  # adds special tokens by their old names
    return json.dumps(file).encode(), lost


def unreachable_in_sentencepiece(content: bytes, special: Collection[int]) -> bytes:
    """Return a SentencePiece model in which special pieces are control symbols, which no text spells."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(content)
    for id in special:
        if model.pieces[id].type != model.pieces[id].UNKNOWN:
            model.pieces[id].type = _CONTROL
    return model.SerializeToString()


def _spells(merge: str | list[str], hidden: set[str], prefix: str) -> bool:
    """Return whether a merge joins or results in one of the hidden pieces."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return bool({first, second, first + second.removeprefix(prefix)} & hidden)


def _mark_lost_characters(model: dict[str, Any], added: list[dict[str, Any]], name: str) -> int | None:
    """Add a token for unknown characters to a BPE, and return its id; None if the BPE has one already."""
    if model.get("unk_token") is not None:
        return None
    # The library numbers added tokens from the end of the vocabulary unless the vocabulary has them.
    model["vocab"].update({token["content"]: token["id"] for token in added})
    lost = max(model["vocab"].values(), default=-1) + 1
    model["vocab"][name] = lost
    model["unk_token"] = name
    return lost
