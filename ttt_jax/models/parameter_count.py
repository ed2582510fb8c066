"""How many parameters a model has, by part."""

import collections
import math
from typing import Any

import jax

_PARTS = ("embedding", "head", "mixers", "W0 of inner loops", "feed-forward", "norms and convolutions")


def by_part(params: Any) -> dict[str, int]:
    """Return the number of parameters of each part that there is, of arrays or their shapes.

    ``mixers`` are projections, learned rates and all else in a mixer but its norms and convolutions, and but what its
    inner loop begins with (``inner_kernel_0`` and such), which is a part of its own.
    """
    found: collections.Counter[str] = collections.Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]  # and not those of Flax's boxes
        found[_part(keys)] += math.prod(leaf.shape)
    return {part: found[part] for part in _PARTS if found[part]}


def in_words(params: Any) -> str:
    """Return the parts in one line, the largest first."""
    parts = sorted(by_part(params).items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {count:,}" for part, count in parts)


def _part(keys: list[str]) -> str:
    if keys[0] in ("embedding", "head"):
        return keys[0]
    if keys[-1].startswith("inner_"):
        return "W0 of inner loops"
    if any("norm" in key or key.startswith("conv") for key in keys):
        return "norms and convolutions"
    return "feed-forward" if any(key.startswith("mlp") for key in keys) else "mixers"
