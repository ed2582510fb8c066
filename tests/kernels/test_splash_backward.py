"""Check which pairs of blocks the backward kernel of splash attention visits."""

import numpy as np
import pytest
from float64_attention import seen

from ttt_jax.kernels.splash_backward import visible_pairs


@pytest.mark.parametrize("window", [None, 1, 2, 8, 9, 10, 17, 18, 100])
def test_pairs_are_those_of_blocks_of_which_something_is_seen(window):
    """Take blocks of 8 tokens: pairs go through the keys, and for each through the queries from its own block on."""
    blocks, block = 5, 8
    visible = seen(blocks * block, window).reshape(blocks, block, blocks, block).any((1, 3))  # [queries, keys]
    np.testing.assert_array_equal(visible_pairs(blocks, block, window), np.argwhere(visible.T).T)
