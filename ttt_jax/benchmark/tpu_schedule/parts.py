"""The parts of a training step, by where in the model its operations come from."""

import re
from collections.abc import Iterable

from ttt_jax.benchmark.tpu_schedule.schedule import Scheduled

INNER_LOOP, MIXER, FEED_FORWARD = "inner loop", "rest of the mixer", "feed-forward"
BLOCK, ENDS, OPTIMIZER, UNKNOWN = "rest of the blocks", "embedding, head, loss", "optimizer", "of unknown origin"
PARTS = (INNER_LOOP, MIXER, FEED_FORWARD, BLOCK, ENDS, OPTIMIZER, UNKNOWN)


def of(op_name: str) -> str:
    """One of :data:`PARTS`."""
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


def seconds(operations: Iterable[Scheduled]) -> dict[str, float]:
    """Time of each part of a step, those that take any; empty of other programs."""
    operations = list(operations)
    if not any("(LanguageModel)" in o.operation.op_name for o in operations):
        return {}
    total = dict.fromkeys(PARTS, 0.0)
    for o in operations:
        total[of(o.operation.op_name)] += o.seconds
    return {part: time for part, time in total.items() if time}
