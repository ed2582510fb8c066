"""Find operands that are constants of a compiled program, and lay their values out as words of memory.

The compiler moves a constant between memories, hoists it out of loops and hands it on inside of tuples, so an operand
is followed back through everything that leaves its bytes as they are.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from ttt_jax.planning.hlo import Computations, Instruction

_SAME_BYTES = ("copy", "copy-done", "bitcast", "optimization-barrier")
_DTYPES = {"pred": np.dtype(bool), **{f"{sign}{bits}": np.dtype(f"{name}{bits}") for bits in (8, 16, 32)
                                for sign, name in (("s", "int"), ("u", "uint"))}}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*):?((?:T\(\S*?\))?(?:\([\d,]+\))*))?")
_TRUTH = {"true": "1", "false": "0"}
_MOST_VALUES = 1 << 20


class Constants:
    """The constants among the operands of the instructions of a program."""

    def __init__(self, computations: Computations):
        self.computations = computations
        self._by_name = {name: {i.name: i for i in body} for name, body in computations.items()}
        self._callers: dict[str, list[tuple[str, Instruction]]] = {}
        for name, body in computations.items():
            for i in body:
                loop = re.findall(r"(?:body|condition)=%?([\w.$-]+)", i.rest) if i.opcode == "while" else []
                for each in (*i.called, *loop):
                    self._callers.setdefault(each, []).append((name, i))

    def root(self, computation: str) -> Instruction | None:
        """Return the instruction whose result a computation returns."""
        return next((i for i in self.computations.get(computation, []) if i.root), None)

    def instruction(self, computation: str, name: str) -> Instruction | None:
        """Return an instruction of a computation by its name."""
        return self._by_name[computation].get(name)

    def words(self, computation: str, name: str, *path: int) -> tuple[int, ...] | None:
        """Return the words of 32 bits of an array as it lies in memory; None where it is no constant of integers.

        Args:
          path: which element of a tuple, and of an element that is a tuple, the array is.
        """
        origin, rest = self._origin(computation, name, path)
        return literal(origin.shape, origin.rest) if origin and origin.opcode == "constant" and not rest else None

    def integer(self, computation: str, name: str, *path: int) -> int | None:
        """Return the value of a constant with a sign; None for other instructions."""
        words = self.words(computation, name, *path)
        return None if not words else words[0] - (words[0] >= 1 << 31) * (1 << 32)

    def _origin(self, computation: str, name: str, path: tuple[int, ...]) -> tuple[Instruction | None, tuple]:
        """Follow an element of a tuple, or an array, back to the instruction that makes it, or to a parameter."""
        i = self._by_name[computation].get(name)
        while i is not None:
            if i.opcode == "get-tuple-element":
                path = (int(i.attribute(r"index=(\d+)")), *path)
            elif i.opcode == "tuple":
                name, path = i.operands[path[0]], path[1:]
                i = self._by_name[computation].get(name)
                continue
            elif i.opcode == "copy-start":
                path = path[1:]
            elif i.opcode == "while":
                if not self._kept(i, path):
                    break
            elif i.opcode == "parameter":
                return self._argument(computation, i, path)
            elif i.opcode not in _SAME_BYTES or (i.opcode == "copy" and not self._same_layout(computation, i)):
                break
            i = self._by_name[computation].get(i.operands[0])
        return i, path

    def _argument(self, computation: str, parameter: Instruction, path: tuple[int, ...]):
        """Follow a parameter to the one place that calls its computation, if a loop does not change it."""
        callers = self._callers.get(computation, [])
        if len(callers) != 1 or callers[0][1].opcode not in ("while", "call"):
            return parameter, path
        caller, call = callers[0]
        if call.opcode == "while" and not self._kept(call, path):
            return parameter, path
        return self._origin(caller, call.operands[int(parameter.rest.partition(")")[0])], path)

    def _kept(self, loop: Instruction, path: tuple[int, ...]) -> bool:
        """Return whether a loop hands an element on as it is: whether the body returns its own parameter there."""
        body = self.computations.get(loop.attribute(r"body=%?([\w.$-]+)"), [])
        root = next((i for i in body if i.root), None)
        if root is None or root.opcode != "tuple" or not path:
            return False
        inside = {i.name: i for i in body}
        at = inside.get(root.operands[path[0]])
        while at is not None and at.opcode in ("copy", "bitcast") and at.operands:
            at = inside.get(at.operands[0])
        if at is None or at.opcode != "get-tuple-element" or at.attribute(r"index=(\d+)") != str(path[0]):
            return False
        source = inside.get(at.operands[0])
        return source is not None and source.opcode == "parameter"

    def _same_layout(self, computation: str, copy: Instruction) -> bool:
        source = self._by_name[computation].get(copy.operands[0])
        return source is not None and _without_memory(source.shape) == _without_memory(copy.shape)


def _without_memory(shape: str) -> str:
    return re.sub(r"S\(\d+\)", "", shape)


def literal(shape: str, rest: str) -> tuple[int, ...] | None:
    """Return the words of a constant, ``shape constant(rest``; None where they are not listed or not of integers.

    Args:
      shape: such as ``s8[1,8,8]{2,1,0:T(8,128)(4,1)}``: after the sizes, the dimensions from the fastest, then tiles,
        each of which splits the fastest dimensions of what is there into tiles and places inside a tile.
    """
    match = _SHAPE.match(shape)
    dtype = _DTYPES.get(match[1]) if match else None
    if match is None or dtype is None:
        return None
    sizes = [int(n) for n in match[2].split(",") if n]
    text = re.sub(r"/\*.*?\*/", "", rest.partition(")")[0])
    values = [int(_TRUTH.get(each, each)) for each in re.findall(r"-?\d+|true|false", text)]
    if "..." in text or not len(values) == math.prod(sizes) <= _MOST_VALUES:
        return None
    fastest_first = [int(d) for d in (match[3] or "").split(",") if d] or list(range(len(sizes)))[::-1]
    array = np.array(values, np.int64).astype(dtype).reshape(sizes).transpose(fastest_first[::-1])
    for tile in re.findall(r"\(([\d,]+)\)", match[4] or ""):
        array = _tiled(array, [int(n) for n in tile.split(",")])
    stored = array.tobytes()
    stored += bytes(-len(stored) % 4)
    return tuple(int(word) for word in np.frombuffer(stored, "<u4"))


def _tiled(array: np.ndarray, tile: Sequence[int]) -> np.ndarray:
    """Split the last dimensions into tiles, padded at their ends, and the places inside of a tile."""
    first = array.ndim - len(tile)
    if first < 0:
        array, first = array.reshape((1,) * -first + array.shape), 0
    padding = [(0, 0)] * first + [(0, -n % size) for n, size in zip(array.shape[first:], tile, strict=True)]
    array = np.pad(array, padding)
    split = [part for n, size in zip(array.shape[first:], tile, strict=True) for part in (n // size, size)]
    array = array.reshape(*array.shape[:first], *split)
    axes = range(first, array.ndim)
    return array.transpose(*range(first), *axes[::2], *axes[1::2])
