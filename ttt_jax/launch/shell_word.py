"""A word for a bash command that goes through other hands first."""

import re
import shlex


def plain(word: str) -> str:
    """Quotes a word for bash in one line of printable ASCII without a dollar that Kubernetes could take for a variable:
    a command in a manifest is read as YAML, and ``$(NAME)`` and ``$$`` in it are replaced, before bash sees it."""
    if re.fullmatch(r"[ -#%-~]*", word):
        return shlex.quote(word)
    return "$'" + "".join(_escaped(byte) for byte in word.encode()) + "'"


def _escaped(byte: int) -> str:
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in "$'\\" else f"\\x{byte:02x}"
