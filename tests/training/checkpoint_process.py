"""Run one process of test_checkpoint_processes.py: ``checkpoint_process.py INDEX COUNT PORT SCENARIO WORKDIR``."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax.errors import CheckpointError
from ttt_jax.training.checkpoint import Checkpoints

ROWS = {"params": {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}, "step": PartitionSpec()}
COLUMNS = {"params": {"kernel": PartitionSpec(None, "x"), "bias": PartitionSpec("x")}, "step": PartitionSpec()}


def numbers(seed):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.standard_normal((64, 32)), "bias": rng.standard_normal(32)}
    return {"params": jax.tree.map(np.float32, params), "step": np.int32(seed)}


def state(seed, specs=ROWS):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))

    def place(x, spec):
        return jax.make_array_from_callback(np.shape(x), NamedSharding(mesh, spec), lambda part: np.asarray(x)[part])

    return jax.tree.map(place, numbers(seed), specs)


def abstract(specs=ROWS):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, specs))


def check(restored, specs=ROWS):
    """Check that every shard of this process holds its numbers; return the step."""

    def shards(x, expected):
        assert x.addressable_shards
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(expected)[shard.index])

    jax.tree.map(shards, restored.state, numbers(restored.step))
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, abstract(specs))
    assert restored.meta == {"next_batch": restored.step}
    return restored.step


def save(workdir):
    checkpoints = Checkpoints(workdir, keep_last=2)
    assert checkpoints.restore_newest(abstract()) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"next_batch": step})
    checkpoints.wait()
    return checkpoints.all_steps()


def restore(workdir):
    checkpoints = Checkpoints(workdir, keep_last=2)
    steps = [check(checkpoints.restore_newest(abstract(specs)), specs) for specs in (ROWS, COLUMNS)]
    params = checkpoints.restore_params(steps[0], abstract(COLUMNS)["params"])
    kernel = params["kernel"].addressable_shards[0]
    np.testing.assert_array_equal(np.asarray(kernel.data), numbers(steps[0])["params"]["kernel"][kernel.index])
    checkpoints.finish(3, state(3), {"next_batch": 3})
    steps.append(check(checkpoints.restore_newest(abstract())))
    checkpoints.close()
    return steps


def restore_none(workdir):
    try:
        Checkpoints(workdir).restore_newest(abstract())
    except CheckpointError as error:
        return str(error)


def storage_fails_for_process_1(workdir):
    """Make the folder read-only for process 1, which has a mount of its own."""

    def mount(how):
        if jax.process_index() == 1:
            subprocess.run(["mount", "-o", f"remount,bind,{how}", workdir], check=True)

    checkpoints = Checkpoints(workdir, save_again_after=(0.1, 0.1))
    checkpoints.finish(1, state(1), {"next_batch": 1})
    mount("ro")
    checkpoints.save(2, state(2), {"next_batch": 2})
    step, wanted = 2, []
    while not wanted:
        step += 1
        time.sleep(0.01)
        if checkpoints.wants_save(step):
            wanted.append(step)
    mount("rw")
    checkpoints.save(step, state(step), {"next_batch": step})
    checkpoints.wait()
    assert not checkpoints.wants_save(10 * step)
    steps = checkpoints.all_steps()
    mount("ro")
    try:
        checkpoints.finish(10 * step, state(10 * step), {})
    except CheckpointError as error:
        message = str(error)
    checkpoints.close()
    return wanted, steps, check(checkpoints.restore_newest(abstract())), message


def main(index, count, port, scenario, workdir):
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    print(json.dumps(globals()[scenario](workdir)))


if __name__ == "__main__":
    main(*sys.argv[1:])
