"""What a compiler says when there is no room, in bytes."""

import pytest

from ttt_jax.planning import plan

TPU = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (24.97G) exceeds available HBM (15.75G). HLO module: jit_step."
)
TPU_LATE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.59G of 15.75G "
    "hbm. Exceeded hbm capacity by 858.62M."
)


@pytest.mark.parametrize(("message", "needed"), [(TPU, 24.97), (TPU_LATE, 16.59)])
def test_too_large(message, needed):
    found = plan.read_too_large(message)
    assert found.needed == round(needed * 2**30)
    assert found.available == round(15.75 * 2**30)


def test_units():
    found = plan.read_too_large("Used 1.5T of 512.00M hbm.")
    assert (found.needed, found.available) == (3 * 2**39, 2**29)
    assert plan.read_too_large("Used 17 of 16 hbm.") == plan.TooLarge(17, 16)


def test_other_errors():
    assert plan.read_too_large("INTERNAL: Mosaic failed to compile") is None
    assert (
        plan.read_too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.") is None
    )
