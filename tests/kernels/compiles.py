"""Compile functions for a TPU without having one, and print the compiled text of each as JSON.

The arguments are a topology, ``MODULE:NAME`` of the builder of the functions, and a JSON list of settings for it.
"""

import json
import sys

from ttt_jax import garbage
from ttt_jax.benchmark.tpu_schedule import compile
from ttt_jax.planning import topology as topology_lib

if __name__ == "__main__":
    name, build, settings = *sys.argv[1:3], json.loads(sys.argv[3])
    garbage.collect_rarely()
    topology = topology_lib.parse(name)
    topology_lib.prepare(topology)
    devices = topology_lib.devices(topology)
    print(json.dumps([compile._function(build, each, devices).as_text() for each in settings]))
