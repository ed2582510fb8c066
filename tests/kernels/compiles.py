"""Compiles functions for a TPU that is not there; prints the text of each as compiled, as JSON.

Takes a topology, ``MODULE:NAME`` of what makes a function, and a list of settings for it, as JSON.
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
