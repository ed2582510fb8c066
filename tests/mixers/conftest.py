"""Draw parameters for the tests of all mixers."""

import functools

import numpy as np
import pytest
from mixer_cases import TOKENS, WIDTH, mixer


@pytest.fixture(scope="session")
def params_of(random_params):
    """Return a function of a case: random parameters of its module."""

    def draw(case):
        params = random_params(mixer(case), np.zeros((1, TOKENS, WIDTH), np.float32))
        if "tau" in params:
            params["tau"] *= 0.2  # so that no position of a mini-batch has a rate of 0
        return params

    return functools.cache(draw)
