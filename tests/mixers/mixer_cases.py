"""Define the mixers and the padding and documents with which the tests of all mixers run.

A new mixer is tested by being registered.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from inner_loops import POINTS

from ttt_jax import config as config_lib
from ttt_jax.mixers import MIXERS

ROWS, WIDTH, HEADS = 3, 8, 2
PIECE = 6  # tokens
TOKENS = 2 * PIECE
SECTIONS = {"ttt": {"mini_batch": 4}, "attention": {"window": 3}}  # a piece holds more than one mini-batch or window
CASES = {
    **{name: (name, {}) for name in MIXERS},
    **{f"{name}-grouped": (name, {"num_kv_heads": 1, "qk_norm": True}) for name in ("attention", "sliding")},
    **{f"{name}-transformer": (name, {"backbone": "transformer"}) for name in ("ttt_linear", "ttt_mlp")},
    **{f"ttt-{point}": ("ttt", choices) for point, choices in POINTS.items()},
}
del CASES["ttt"]  # the same as ttt_linear


# Cases whose gradients take seconds to compile, and that differ from faster ones only in parts that other tests check:
# tests/ttt/test_scan_rows.py checks padding and documents for all inner loops, these tests the layer around them.
# sliding-grouped has all parts of attention.
SLOW = {"ttt_linear-transformer", "ttt_mlp", "ttt_mlp-transformer", "ttt-lact", "ttt-decay"}
SLOW |= {"attention-grouped", "sliding"}
mostly_fast = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else [])
        for case in CASES
        if case not in ("ttt_mlp-transformer", "ttt-lact")
    ],
)
one_that_learns = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if MIXERS[name].learns else [])
        for case, (name, _) in CASES.items()
        if case == "ttt_linear" or not MIXERS[name].learns
    ],
)
every_mixer = pytest.mark.parametrize("case", CASES)
every_mixer_but_slow_ones = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)


def position(state):
    """Return the leaf ``position`` of a state."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    (found,) = (x for path, x in leaves if jax.tree_util.keystr(path, simple=True, separator="/").endswith("position"))
    return found


@functools.cache
def mixer(case, dtype="float32"):
    """Return the Flax module of a case."""
    name, choices = CASES[case]
    model = config_lib.default().model
    model.update(mixer=name, width=WIDTH, num_heads=HEADS, dtype=dtype)
    if section := MIXERS[name].section:
        model[section].update({**SECTIONS.get(section, {}), **choices})
    MIXERS[name].check(model)
    return MIXERS[name].module(model)()


class Masks(NamedTuple):
    """Valid tokens, and tokens that begin documents: [B, T] each, or None for all and for none."""

    valid: np.ndarray | None
    reset: np.ndarray | None

    def documents(self):
        """Return the places (row, token) of each document."""
        found = []
        for row in range(ROWS):
            document = []
            for t in range(TOKENS):
                if self.valid is not None and not self.valid[row, t]:
                    continue
                if self.reset is not None and self.reset[row, t] and document:
                    found.append(document)
                    document = []
                document.append((row, t))
            found.append(document)
        return [document for document in found if document]

    def positions(self, end):
        """Return the number of valid tokens that each row has read of its document after ``end`` tokens."""
        found = []
        for row in range(ROWS):
            valid, reset = self.valid[row, :end], self.reset[row, :end]
            begin = max((t for t in range(end) if valid[t] and reset[t]), default=0)
            found.append(valid[begin:].sum())
        return found


def masks():
    """Return padding and documents of many kinds, by name."""
    t = np.arange(TOKENS)
    nowhere, everywhere = np.zeros((ROWS, TOKENS), bool), np.ones((ROWS, TOKENS), bool)
    left, right = t >= np.array([[0], [5], [11]]), t < np.array([[12], [7], [1]])
    starts = nowhere.copy()
    starts[:, [0, PIECE]] = True
    found = {
        "nothing": Masks(everywhere, nowhere),
        "padding on the left": Masks(left, nowhere),
        "padding on the right": Masks(right, nowhere),
        "padding within": Masks((t % np.array([[2], [3], [4]])) > 0, nowhere),
        "rows and pieces of padding": Masks((t >= PIECE) & np.array([[True], [True], [False]]), nowhere),
        "documents of one token": Masks(everywhere, everywhere),
        "documents that begin with pieces": Masks(left, starts),
        "resets at padding": Masks(left & right, ~(left & right)),
    }
    for seed in range(6):
        rng = np.random.default_rng(seed)
        density = rng.random((2, ROWS, 1))
        found[f"any, {seed}"] = Masks(*(rng.random((2, ROWS, TOKENS)) < density * [[[1.5]], [[0.7]]]))
    return found


MASKS = masks()
RNG = np.random.default_rng(0)
X, COTANGENT = RNG.standard_normal((2, ROWS, TOKENS, WIDTH)).astype(np.float32)
