"""Test checkpoints in a bucket, where no folder can be renamed: a file that is written last marks complete ones."""

import json
from pathlib import Path

import pytest
from fake_gcs import FakeGCS, printed

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
sys.path[:0] = sys.argv[1:3]
from small_checkpoints import abstract, check_restored, meta, state
from ttt_jax.training.checkpoint import Checkpoints

def restored():
    checkpoints = Checkpoints("gs://bucket/run", keep_last=2)
    try:
        newest = checkpoints.restore_newest(abstract())
        check_restored(newest, newest.step)
        return newest.step
    finally:
        checkpoints.finish(3, state(3), meta(3))
        checkpoints.close()

checkpoints = Checkpoints("gs://bucket/run", keep_last=2)
for step in (1, 2, 3):
    checkpoints.save(step, state(step), meta(step))
checkpoints.close()
folder = checkpoints.directory / "3"
steps = [restored()]
damaged = max((folder / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().length)
content = bytearray(damaged.read_bytes())
content[len(content) // 2] ^= 1
damaged.write_bytes(bytes(content))
steps += [restored(), restored()]
(folder / "commit_success.txt").unlink()
steps += [restored(), restored()]
print(json.dumps([steps, checkpoints.all_steps()]))
"""


@pytest.mark.slow
def test_checkpoints_in_a_bucket_are_saved_restored_and_passed_over():
    folder = Path(__file__).resolve().parent
    with FakeGCS() as gcs:
        restored, kept = json.loads(printed(gcs.start("-c", SCRIPT, folder, folder.parents[1])))
    assert restored == [3, 2, 3, 2, 3]  # as saved; one bit flipped; saved again; not complete; saved again
    assert kept == [2, 3]
    folders = {name.split("/")[3] for name in gcs.objects}
    assert folders == {"2", "3", "damaged-3"}
