"""Read the trip counts of the loops of a compiled program."""

from ttt_jax.planning.constants import Constants
from ttt_jax.planning.hlo import Instruction


def trip_count(loop: Instruction, computation: str, constants: Constants) -> int | None:
    """Return the trip count of a loop, or None.

    It is what the compiler states, or else follows from the counter: where it begins, what a turn adds to it, and the
    constant that it stays below. A loop of products beside which chips exchange parts of an operand or of the result
    adds 2, as a turn computes two parts in each direction.

    Args:
      computation: name of the computation that contains the loop.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = loop.attribute(r"condition=%?([\w.$-]+)")
    root = constants.root(condition)
    if root is None or len(root.operands) != 2 or "LT" not in _directions(root, constants):
        return None
    counter = constants.instruction(condition, root.operands[0])
    limit = constants.integer(condition, root.operands[1])
    if counter is None or counter.opcode != "get-tuple-element" or limit is None:
        return None
    index = int(counter.attribute(r"index=(\d+)"))
    start, step = constants.integer(computation, loop.operands[0], index), _step(loop, index, constants)
    return None if start is None or not step else max(0, -(-(limit - start) // step))


def _directions(root: Instruction, constants: Constants) -> list[str]:
    """Return the directions of comparisons in the result of a condition, which may be in a fusion."""
    inside = [i for name in root.called for i in constants.computations.get(name, [])]
    return [i.attribute(r"direction=(\w+)") for i in (root, *inside) if i.opcode == "compare"]


def _step(loop: Instruction, index: int, constants: Constants) -> int | None:
    """Return what a turn of a loop adds to an element of its state, or None."""
    body = loop.attribute(r"body=%?([\w.$-]+)")
    result = constants.root(body)
    if result is None or result.opcode != "tuple":
        return None
    added = constants.instruction(body, result.operands[index])
    if added is None:
        return None
    if added.opcode == "fusion":
        body = added.called[0]
        added = constants.root(body)
    if added is None or added.opcode != "add":
        return None
    steps = [step for operand in added.operands if (step := constants.integer(body, operand)) is not None]
    return steps[0] if len(steps) == 1 else None
