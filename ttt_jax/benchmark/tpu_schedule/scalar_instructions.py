"""Read the scalar instructions of a schedule: what they compute, and which of them branches depend on."""

import dataclasses
import re
from collections.abc import Callable, Sequence

WORD = 1 << 32


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A scalar instruction; ``predicate`` and ``operands`` are names, ``!`` before negated ones, or numbers."""

    result: str
    opcode: str
    predicate: str
    otherwise: str  # the result of a move where the predicate does not hold
    operands: tuple[str, ...]
    memory: str  # the allocation from which the word at the sum of the operands is loaded


def _signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


def _or(a: int | None, b: int | None) -> int | None:
    return 1 if a or b else (None if a is None or b is None else 0)


def _and(a: int | None, b: int | None) -> int | None:
    return 0 if 0 in (a, b) else (None if a is None or b is None else 1)


def _not(a: int | None) -> int | None:
    return None if a is None else int(not a)


THREE_VALUED: dict[str, Callable[..., int | None]] = {
    "por": _or,
    "pand": _and,
    "pnor": lambda a, b: _not(_or(a, b)),
    "pnand": lambda a, b: _not(_and(a, b)),
    "pneg": _not,
    "pmov": lambda a: a,
}
OPCODES: dict[str, Callable[..., int]] = {
    "smov.u32": lambda a: a,
    "sld": lambda a: a,
    "sst": lambda a: a,
    "sadd.s32": lambda a, b: a + b,
    "ssub.s32": lambda a, b: a - b,
    "smul.u32": lambda a, b: a * b,
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "sshll.u32": lambda a, b: a << b if b < 32 else 0,
    "sshrl.u32": lambda a, b: a >> b if b < 32 else 0,
    "sshra.s32": lambda a, b: _signed(a) >> min(b, 31),
    "smin.u32": min,
    "smax.u32": max,
    **{
        f"scmp.{name}.{kind}": (lambda a, b, compare=compare, sign=sign: compare(sign(a), sign(b)))
        for kind, sign in (("s32.totalorder", _signed), ("u32.totalorder", int), ("s32", _signed), ("u32", int))
        for name, compare in (
            ("eq", int.__eq__), ("ne", int.__ne__), ("lt", int.__lt__),
            ("le", int.__le__), ("gt", int.__gt__), ("ge", int.__ge__),
        )
    },
}  # fmt: skip
_RESULT = re.compile(r"(?:(%\w+) = )?((?:s|p)[a-z][\w.]*) ?(.*)")
_PREDICATE = re.compile(r"\((!?%\w+)(?:, (%\w+))?\),? ?")
_SPILLED = re.compile(r"\[smem:\[(#allocation\d+_spill)\]\]")
_LOADED = re.compile(r"\[smem:\[(#allocation\d+)((?: \+ (?:%\w+|\$0x[0-9a-f]+))*)\]\]")
_COPIED = re.compile(r"dma\.\w+_to_smem (%\w+), \d+, (%\w+|\[#allocation\d+\]), ")
_OPERAND = re.compile(r"inlined_call_operand\.\w+ \[.*\bindex: (\d+), kind: input,")


def _instruction(text: str) -> Instruction | None:
    """Parse a scalar instruction; return None for others. A spilled register gets the name of its place in memory."""
    match = _RESULT.fullmatch(text.strip())
    if match is None:
        return None
    result, opcode, rest = match[1] or "", match[2], match[3]
    predicate = otherwise = memory = ""
    if found := _PREDICATE.search(rest):
        predicate, otherwise = found[1], found[2] or ""
        rest = rest[: found.start()] + rest[found.end() :]
    spilled = _SPILLED.search(rest)
    if opcode == "sst":
        result, rest = (spilled[1], rest[spilled.end() :]) if spilled else ("", "")
    elif opcode == "sld" and (loaded := _LOADED.search(rest)):
        memory = loaded[1]
        offsets = loaded[2].split(" + ")[1:]
        rest = ",".join(str(int(o[1:], 16)) if o.startswith("$") else o for o in offsets)
    elif opcode == "sld":
        rest = spilled[1] if spilled else "?"
    operands = tuple(part.strip() for part in rest.split(",") if part.strip())
    return Instruction(result, opcode, predicate, otherwise, operands, memory) if result else None


def needed(bundles: list[str], predicates: list[str]) -> tuple[dict[int, list[Instruction]], dict[str, int]]:
    """Return the instructions that predicates depend on, by bundle, and the bundle in which each name is defined."""
    by_result: dict[str, list[tuple[int, Instruction]]] = {}
    for place, bundle in enumerate(bundles):
        for text in bundle.split(";;"):
            if instruction := _instruction(text):
                by_result.setdefault(instruction.result, []).append((place, instruction))
    needed: dict[int, list[Instruction]] = {}
    left, seen = [p.lstrip("!") for p in predicates], set[str]()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for place, instruction in by_result.get(name, []):
            needed.setdefault(place, []).append(instruction)
            operands = (*instruction.operands, instruction.predicate, instruction.otherwise)
            left += [operand.lstrip("!") for operand in operands]
    return needed, {name: uses[0][0] for name, uses in by_result.items()}


def copied_operands(bundles: Sequence[str]) -> dict[str, int]:
    """Return which operand of a kernel an allocation of scalar memory holds from its first bundles on.

    An allocation into which the kernel itself stores is not among them, nor one that is copied to in a loop.
    """
    if not any("_to_smem" in bundle for bundle in bundles):
        return {}
    texts = [text.strip() for bundle in bundles for text in bundle.split(";;")]
    made_from = {name: rest for name, equals, rest in (text.partition(" = ") for text in texts) if equals}
    found: dict[str, int] = {}
    for text in texts:
        if match := _COPIED.search(re.sub(r" +", " ", text)):
            allocation = re.search(r"#allocation\d+", made_from.get(match[2], match[2]))
            operand = _operand(match[1], made_from)
            if allocation and operand is not None:
                found[allocation[0]] = operand
    stored = {match[1] for text in texts if "sst " in text and (match := _LOADED.search(text))}
    return {allocation: operand for allocation, operand in found.items() if allocation not in stored}


def _operand(name: str, made_from: dict[str, str]) -> int | None:
    """Return the operand of the kernel to which a register points."""
    for _ in range(8):  # a pointer is made in a step or two
        made = made_from.get(name, "")
        if match := _OPERAND.search(made):
            return int(match[1])
        name = next(iter(re.findall(r"%\w+", made)), "")
    return None
