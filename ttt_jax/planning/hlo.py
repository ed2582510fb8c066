"""Read optimized HLO text: instructions, and sizes of arrays."""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(rest``."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    def attribute(self, pattern: str) -> str:
        """Return the first group of a pattern in the operands and attributes, or "" where it does not match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Return the place in the traced program that the instruction comes from."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def operands(self) -> list[str]:
        """Return the names of the instructions whose results this one takes."""
        depth = 1
        for index, character in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if not depth:
                return re.findall(r"%([\w.$-]+)", self.rest[:index])
        return []

    @property
    def called(self) -> list[str]:
        """Return the names of the computations that the instruction calls, without those of loops."""
        return [name for match in _CALLED.finditer(self.rest) for name in re.findall(r"[\w.$-]+", match[1])]


Computations = dict[str, list[Instruction]]
_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = ")
_CALLED = re.compile(
    r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=\{?([^,}]+(?:, ?%[^,}]+)*)"
)


def parse(text: str) -> tuple[Computations, str]:
    """Return the instructions of each computation, and the name of the computation that the program starts with.

    Args:
      text: ``compiled.as_text()``.
    """
    computations: Computations = {}
    entry, instructions = "", []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            instructions = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := _ASSIGNMENT.match(line):
            shape, rest = _split_shape(line[match.end() :])
            opcode, _, rest = rest.partition("(")
            instructions.append(Instruction(match[2], shape, opcode.strip(), rest, bool(match[1])))
        elif line.strip() in ("", "}"):
            instructions = []
        elif instructions:  # an attribute with line breaks, as kernels have
            instructions[-1] = dataclasses.replace(instructions[-1], rest=f"{instructions[-1].rest}\n{line}")
    return computations, entry


def array_bytes(shape: str) -> int:
    """Return the bytes of an array ``bf16[8,256]{1,0}``, or of all arrays of a tuple, without padding."""
    bits = 0
    for dtype, size, dimensions in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        bits += (8 if dtype == "pred" else int(size)) * math.prod(int(n) for n in dimensions.split(",") if n)
    return bits // 8


def hbm_bytes(shape: str) -> int:
    """Return the bytes of those arrays of a shape that are in a TPU's HBM, with the padding of their tiles.

    A layout ``{1,0:T(8,128)(2,1)S(1)}`` lists dimensions from the fastest, then the tile of the fastest of them, then
    the memory, which is HBM where none is listed. Scalars do not count: they are in scalar memory.
    """
    in_hbm = [bool(match[2]) and not re.search(r"S\([1-9]", match[3] or "") for match in _ARRAY.finditer(shape)]
    return sum(size for size, counts in zip(padded_bytes(shape), in_hbm, strict=True) if counts)


def padded_bytes(shape: str) -> list[int]:
    """Return the bytes of each array of a shape, in any memory, with the padding of its tiles."""
    return [_padded_bytes(match[1], match[2], match[3] or "") for match in _ARRAY.finditer(shape)]


_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


def _padded_bytes(dtype: str, dimensions: str, layout: str) -> int:
    sizes = [int(n) for n in dimensions.split(",") if n]
    fastest_first = [sizes[int(d)] for d in layout.partition(":")[0].split(",") if d] or sizes[::-1]
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        for index, size in enumerate(reversed(tile[1].split(","))):
            if index < len(fastest_first):
                fastest_first[index] = -(-fastest_first[index] // int(size)) * int(size)
    digits = re.search(r"\d+", dtype)
    return (int(digits[0]) if digits else 8) * math.prod(fastest_first) // 8


def _split_shape(text: str) -> tuple[str, str]:
    """Split a text into the shape at its beginning, in which tuples have spaces, and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return text[: index + 1], text[index + 1 :].lstrip()
    return text, ""


def elements(shape: str) -> list[str]:
    """Return the elements of a tuple shape."""
    found, depth = [""], 0
    for character in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return found
