"""Print the collectives of training steps, compiled for eight TPU chips, as JSON. No TPU is needed."""

import json
import os
import re
import sys

from ttt_jax import garbage
from ttt_jax.planning import topology as topology_lib

os.environ.pop("XLA_FLAGS", None)  # those of tests are for CPUs, and libtpu ends at one that it does not know
garbage.collect_rarely()
topology = topology_lib.parse("v5e:2x4")
topology_lib.prepare(topology)

from ttt_jax import config as config_lib  # noqa: E402
from ttt_jax.distributed import sharding  # noqa: E402
from ttt_jax.planning import collectives as collectives_lib  # noqa: E402
from ttt_jax.training.step import build_program  # noqa: E402


def collectives(mixer, shape, kernel):
    config = config_lib.default()
    if mixer == "attention":
        config.model.attention.kernel = kernel
    else:
        config.model.ttt.kernel = kernel
    config.model.update(mixer=mixer, vocab_size=512, width=256, num_heads=4, num_layers=3, mlp_width=512, remat="block")
    config.model.dtype = "bfloat16"
    config.data.update(sequence_length=128, batch_size=8)
    config.mesh.update(dict(zip(sharding.MESH_AXES, shape, strict=True)))
    config_lib.validate(config)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, 8), topology_lib.devices(topology))
    text = build_program(config, mesh).compiled_step().as_text()
    return {
        "kernels": re.findall(r" custom-call\(.*?/(ttt_\w+?)\W*/", text)
        + re.findall(r"%\w*?(splash_[a-z]+(?:_[a-z]+)*)\S* = ", text),
        "collectives": [[c.kind, c.bytes, c.times, c.loops, c.op_name] for c in collectives_lib.read(text)],
        "inner_loops": sum("_inner_loop" in line for line in text.splitlines() if " while(" in line),
    }


if __name__ == "__main__":
    shape = tuple(map(int, sys.argv[2].split("x")))
    print(json.dumps(collectives(sys.argv[1], shape, sys.argv[3])))
