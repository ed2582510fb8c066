"""Small train states, and checks of what is restored, for the tests of checkpoints."""

import jax
import numpy as np


def state(seed, shape=(64, 32)):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.standard_normal(shape), "bias": rng.standard_normal(shape[1])}
    arrays = {"params": params, "step": np.array(seed)}
    return jax.tree.map(lambda x: jax.device_put(x.astype(np.int32 if x.ndim == 0 else np.float32)), arrays)


def abstract(shape=(64, 32)):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, shape))


def meta(step):
    return {"data": {"next_batch": step}, "config": {"seed": 10}}


def check_restored(restored, step):
    assert restored is not None
    assert restored.step == step
    assert restored.meta == meta(step)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(step))


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())
