"""List the operations of a compiled program: how often each runs, its bytes to and from HBM, and its origin."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ttt_jax.planning import hlo
from ttt_jax.planning.collectives import ON_DEVICE
from ttt_jax.planning.constants import Constants
from ttt_jax.planning.hlo import Computations, Instruction
from ttt_jax.planning.loops import trip_count

_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update


Words = tuple[tuple[int, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that runs: a single operation or a fusion of several.

    Attributes:
      name: name in the program, and of its schedule.
      times: executions per run of the program.
      hbm_bytes: bytes that one execution reads from and writes to HBM, padding included. An operand counts once; where
        it is only sliced, the slice counts, and where it is updated in place, the update. 0 for collectives.
      asynchronous: whether it runs beside others, such as a copy between HBM and VMEM, or waits for other chips.
      op_name: its place in the traced program, such as ``jit(step)/.../layers/mixer/wq/dot_general``; for operations
        that the compiler added, the place that uses the result.
      signature: what it computes, with shapes and layouts. The compiler makes one schedule for operations with equal
        signatures and names it after one of them.
      vmem_bytes: vector memory that it reserves while it runs.
      constants: the words of operands of a kernel that are constants of the program, with the number of the operand.
    """

    name: str
    opcode: str
    times: int
    hbm_bytes: int
    asynchronous: bool
    op_name: str
    signature: str
    vmem_bytes: int
    constants: Words = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """The operations of a program.

    Attributes:
      loops: ``op_name`` and trip count of each loop; a trip count of None is unknown and counts as one.
      conditionals: number of conditionals; all of their branches count.
    """

    operations: list[Operation]
    loops: list[tuple[str, int | None]]
    conditionals: int


def read(text: str) -> Program:
    """Return the operations of a program, in order.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = hlo.parse(text)
    constants = Constants(computations)
    program = Program([], [], 0)
    conditionals = 0

    def walk(name: str, times: int, caller: str) -> Iterator[Operation]:
        nonlocal conditionals
        shapes = {i.name: i.shape for i in computations[name]}
        names = _Names(computations[name])
        for instruction in computations[name]:
            op_name = instruction.op_name or names.near(instruction.name) or caller
            if instruction.opcode == "while":
                trips = trip_count(instruction, name, constants)
                program.loops.append((op_name, trips))
                body = instruction.attribute(r"body=%?([\w.$-]+)")
                yield from walk(body, times * (1 if trips is None else trips), op_name)
            elif instruction.opcode in ("call", "conditional"):
                conditionals += instruction.opcode == "conditional"
                for called in instruction.called:
                    if called in computations:
                        yield from walk(called, times, op_name)
            elif instruction.opcode not in _FREE:
                moved, asynchronous = _moved(computations, shapes, instruction)
                signature = _signature(computations, shapes, instruction)
                yield Operation(
                    instruction.name,
                    instruction.opcode,
                    times,
                    moved,
                    asynchronous,
                    op_name,
                    signature,
                    _scoped(instruction),
                    _constants(constants, name, instruction),
                )

    program.operations.extend(walk(entry, 1, ""))
    return dataclasses.replace(program, conditionals=conditionals)


def _constants(constants: Constants, computation: str, instruction: Instruction) -> Words:
    """Return the constants among the operands of a kernel, and which operands they are."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.rest:
        return ()
    words = [constants.words(computation, operand) for operand in instruction.operands]
    return tuple((number, found) for number, found in enumerate(words) if found is not None)


class _Names:
    """Names of places in the traced program, for instructions of one computation that have none of their own."""

    def __init__(self, instructions: list[Instruction]):
        self._by_name = {i.name: i for i in instructions}
        self._users: dict[str, list[str]] = {}
        for i in instructions:
            for operand in i.operands:
                self._users.setdefault(operand, []).append(i.name)

    def near(self, name: str) -> str:
        """Return the ``op_name`` of the nearest instruction that uses the result, else of one that makes an operand."""
        users = self._search(name, lambda at: self._users.get(at, []))
        return users or self._search(name, lambda at: self._by_name[at].operands)

    def _search(self, start: str, following: Callable[[str], list[str]]) -> str:
        seen, level = {start}, [start]
        while level:
            level = [n for at in level for n in following(at) if n in self._by_name and n not in seen]
            seen.update(level)
            for name in level:
                if self._by_name[name].opcode != "parameter" and self._by_name[name].op_name:
                    return self._by_name[name].op_name
        return ""


def _moved(computations: Computations, shapes: dict[str, str], instruction: Instruction) -> tuple[int, bool]:
    """Return the bytes of HBM that one execution reads and writes, and whether it runs beside others."""
    opcode = instruction.opcode
    if _is_collective(opcode):
        return 0, True
    if _allocates(instruction):
        return 0, False
    if any(name.startswith("all-reduce-scatter") for name in instruction.called):
        return 0, True
    if opcode.endswith("-done") or opcode.endswith("-update"):
        return 0, True
    if opcode.endswith("-start"):
        return _asynchronous(instruction.shape), True
    return _read_and_written(_flat(computations, shapes, instruction), instruction), False


def _scoped(instruction: Instruction) -> int:
    listed = instruction.attribute(r'"used_scoped_memory_configs":\[([^\]]*)\]')
    return sum(int(size) for size in re.findall(r'"memory_space":"1",[^}]*"size":"(\d+)"', listed))


def _is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start").removesuffix("-done") in ON_DEVICE


def _allocates(instruction: Instruction) -> bool:
    """Return whether an instruction only allocates memory for a result."""
    return 'custom_call_target="AllocateBuffer"' in instruction.rest


def _asynchronous(shape: str) -> int:
    """Return the bytes that an asynchronous operation moves, from the shape of its start.

    The shape is ``(destination, source, ...)`` for copies and ``((operands), result, ...)`` for others. The smaller of
    the two moves, and counts once for each side that is in HBM.
    """
    parts = hlo.elements(shape)[:2]
    padded = [sum(hlo.padded_bytes(part)) for part in parts]
    return sum(min(padded) for part in parts if hlo.hbm_bytes(part)) if len(parts) == 2 else 0


def _signature(computations: Computations, shapes: dict[str, str], instruction: Instruction) -> str:
    """Return a text that is equal for instructions that compute the same with the same shapes, under any names."""
    if _allocates(instruction):
        return "AllocateBuffer"  # for every shape, as it computes nothing
    inside = "".join(_canonical(computations, name) for name in instruction.called if name in computations)
    kernel = instruction.attribute(r'"body": ?"([^"]*)"')
    operands = " ".join(shapes.get(name, "") for name in instruction.operands)
    return f"{instruction.shape} {instruction.opcode}({operands}){_attributes(instruction)}{kernel}{inside}"


def _canonical(computations: Computations, name: str) -> str:
    """Return the text of a computation with numbers in place of names, in the order in which its result needs them."""
    by_name = {i.name: i for i in computations[name]}
    numbers: dict[str, int] = {}
    lines = []
    left = [(i.name, False) for i in computations[name] if i.root]
    while left:
        at, operands_done = left.pop()
        if at in numbers or at not in by_name:
            continue
        i = by_name[at]
        if not operands_done:
            left += [(at, True), *((operand, False) for operand in reversed(i.operands))]
            continue
        numbers[at] = len(numbers)
        inside = "".join(_canonical(computations, called) for called in i.called if called in computations)
        operands = ",".join(str(numbers.get(o, "?")) for o in i.operands) or i.rest.partition(")")[0]
        lines.append(f"{i.shape} {i.opcode}({operands}){_attributes(i)}{inside}")
    return "{" + ";".join(lines) + "}"


def _attributes(instruction: Instruction) -> str:
    """Return the attributes of an instruction that determine what it computes."""
    named = r"(dimensions|dim_labels|window|slice|index|direction|iota_dimension|kind|padding|custom_call_target"
    sizes = r"|\w+_dims|slice_sizes|dynamic_slice_sizes|feature_group_count|batch_group_count)=(\{.*?\}|\S+)"
    rest = re.sub(r"/\*.*?\*/", "", instruction.rest)  # such as /*index=5*/
    return " ".join("=".join(found) for found in re.findall(r"\b" + named + sizes, rest))


class _Line(NamedTuple):
    """An instruction inside a fusion."""

    shape: str
    opcode: str
    operands: list[str]


def _flat(computations: Computations, shapes: dict[str, str], outer: Instruction) -> dict[str, _Line]:
    """Return the lines of an instruction with nested fusions inlined, its operands as parameters, its result last."""
    lines = {name: _Line(shapes.get(name, ""), "parameter", []) for name in outer.operands}

    def open_(instruction: Instruction, operands: list[str]) -> None:
        body = computations.get(instruction.called[0]) if instruction.opcode == "fusion" else None
        if body is None:
            lines[instruction.name] = _Line(instruction.shape, instruction.opcode, operands)
            return
        renamed: dict[str, str] = {}
        for i in body:
            if i.opcode == "parameter":
                renamed[i.name] = operands[int(i.rest.partition(")")[0])]
            else:
                open_(i, [renamed.get(name, name) for name in i.operands])
            if i.root:
                lines[instruction.name] = _Line(i.shape, "bitcast", [renamed.get(i.name, i.name)])

    open_(outer, outer.operands)
    return lines


def _read_and_written(lines: dict[str, _Line], outer: Instruction) -> int:
    """Return the bytes of HBM that an instruction reads and writes."""
    moved = 0
    for name in set(outer.operands):
        if whole := hlo.hbm_bytes(lines[name].shape):
            moved += min(whole, _read(lines, name))
    last = _through_views(lines, outer.name, ("bitcast",))
    if lines[last].opcode == "tuple":
        names, results = lines[last].operands, hlo.elements(outer.shape)
    else:
        names, results = [last], [outer.shape]
    for name, shape in zip(names, results, strict=True):
        if whole := hlo.hbm_bytes(shape):
            moved += min(whole, _written(lines, name, whole))
    return moved


def _read(lines: dict[str, _Line], array: str) -> int:
    """Return the bytes that are read of an array: its slices if it is only sliced, 0 if it is only updated in place."""
    read = 0
    for name, use in lines.items():
        places = [index for index, operand in enumerate(use.operands) if operand == array]
        if not places or use.opcode == "tuple" or _is_collective(use.opcode):
            continue
        if use.opcode in _SLICES and places == [0]:
            read += sum(hlo.padded_bytes(use.shape))
        elif use.opcode == "bitcast":
            read += _read(lines, name)
        elif use.opcode not in _UPDATES or places != [0]:
            return sum(hlo.padded_bytes(lines[array].shape))
    return read


def _written(lines: dict[str, _Line], result: str, whole: int) -> int:
    """Return the bytes that are written of a result.

    Where an array is updated in place, only the update counts. An operand that only passes through counts 0, as does
    the result of a collective, which some fusions run beside their own work.
    """
    passed = lines[_through_views(lines, result, ("bitcast",))].opcode
    if passed == "parameter" or _is_collective(passed):
        return 0
    line = lines[_through_views(lines, result, _VIEWS)]
    if line.opcode not in _UPDATES:
        return whole
    update = line.operands[_UPDATES[line.opcode]]
    return sum(hlo.padded_bytes(lines[update].shape)) if update in lines else whole


def _through_views(lines: dict[str, _Line], name: str, views: tuple[str, ...]) -> str:
    """Return the array of which another is a view."""
    while lines[name].opcode in views and lines[name].operands and lines[name].operands[0] in lines:
        name = lines[name].operands[0]
    return name
