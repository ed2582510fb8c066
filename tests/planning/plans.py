"""Plan a tiny model for absent TPUs, and run the ttt commands that the argument names.

Prints the plan, the compiler's analysis of the same step, and status and JSON of the commands.
"""

import contextlib
import io
import json
import sys

from ttt_jax import config as config_lib
from ttt_jax import garbage
from ttt_jax.planning import topology as topology_lib

garbage.collect_rarely()
topology = topology_lib.parse("v5e:2x2")
topology_lib.prepare(topology)

from ttt_jax import cli  # noqa: E402
from ttt_jax.planning import plan, report  # noqa: E402

config = config_lib.default()
config.model.update(mixer="ttt_linear", vocab_size=64, width=32, num_heads=2, num_layers=3, mlp_width=48)
config.model.ttt.mini_batch = 4
config.data.update(sequence_length=32, batch_size=8)
config.mesh.update(data=1, fsdp=2, tensor=2)
config_lib.validate(config)


def run(command):
    """Return the status and the JSON of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(command)
    return status, json.loads(out.getvalue())


def sizes(compiled):
    """Return the compiler's analysis of the memory of a step."""
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {name: getattr(compiled.memory_analysis(), f"{name}_size_in_bytes") for name in names}


if __name__ == "__main__":
    compiled, compile_step = [], plan._compile
    plan._compile = lambda run: compiled.append(compile_step(run)) or compiled[-1]
    planned = report.as_dict(plan.plan(config, str(topology), topology_lib.devices(topology)), price=2.0)
    plan._compile = compile_step
    commands = {name: run(command) for name, command in json.loads(sys.argv[1]).items()}
    print(json.dumps({"plan": planned, "analysis": sizes(compiled[0]), "commands": commands}))
