"""Tell which part of a model an operation belongs to, from its place in the traced program."""

import re
from collections.abc import Iterable

from ttt_jax.benchmark.tpu_schedule.schedule import Scheduled

INNER_LOOP, MIXER, FEED_FORWARD = "inner loop", "rest of the mixer", "feed-forward"
BLOCK, ENDS, OPTIMIZER, UNKNOWN = "rest of the blocks", "embedding, head, loss", "optimizer", "of unknown origin"
PARTS = (INNER_LOOP, MIXER, FEED_FORWARD, BLOCK, ENDS, OPTIMIZER, UNKNOWN)


def part_of(op_name: str) -> str:
    """Return the part of a training step, one of :data:`PARTS`, to which an operation belongs."""
    for pattern, part in (
        ("_inner_loop", INNER_LOOP),
        ("/mixer", MIXER),
        ("/mlp", FEED_FORWARD),
        ("/layers", BLOCK),
        (r"\(LanguageModel\)+/while", BLOCK),  # slices of what is stacked over layers
        (r"\(LanguageModel\)", ENDS),
        (r"jvp\(", ENDS),  # the loss
        (r"jit\(step\)", OPTIMIZER),
    ):
        if re.search(pattern, op_name):
            return part
    return UNKNOWN


def seconds_of_parts(operations: Iterable[Scheduled]) -> dict[str, float]:
    """Return the time of each part of a training step that takes any; nothing for other programs."""
    operations = list(operations)
    if not any("(LanguageModel)" in o.operation.op_name for o in operations):
        return {}
    total = dict.fromkeys(PARTS, 0.0)
    for o in operations:
        total[part_of(o.operation.op_name)] += o.seconds
    return {part: time for part, time in total.items() if time}


FORWARD, BACKWARD, AGAIN = "forward", "backward", "again"
_STRUCTURE = {
    *("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "shard_map", "pallas_call"),
    *("", "LanguageModel"),
}


def pass_of(op_name: str) -> str:
    """Return whether an operation is in the forward pass, the backward pass, or computed again for the latter."""
    if "rematted_computation" in op_name:
        return AGAIN
    return BACKWARD if "transpose(" in op_name else FORWARD if "jvp(" in op_name else ""


def place_of(op_name: str) -> str:
    """Return the module and the operation, such as ``layers/mixer/wq/dot_general``, without what JAX has put around.

    A method of a module stays only where no module or named function inside of it says more.
    """
    names = [re.sub(r"^(?:\w+\()+([^()]*)\)+$", r"\1", part) for part in op_name.split("/")]
    names = [name for name in names[len(names) > 1 :] if name not in _STRUCTURE]
    kept: list[str] = []
    for index, name in enumerate(names):
        module, dot, method = name.partition(".")
        of_a_module = dot and module in (*names[:index], *names[index + 1 : index + 2])
        if name not in kept[-1:] and not (of_a_module and index < len(names) - 2):
            kept.append(method if of_a_module else name)
    return "/".join(kept)
