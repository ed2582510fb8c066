"""A tiny model planned for TPUs that are not there; prints the plan, and what the compiler says when asked again."""

import json

from ttt_jax import config as config_lib
from ttt_jax.planning import topology as topology_lib

topology = topology_lib.parse("v5e:2x2")
topology_lib.prepare(topology)

from ttt_jax.parallel import sharding  # noqa: E402
from ttt_jax.planning import plan, report  # noqa: E402
from ttt_jax.training import program  # noqa: E402

config = config_lib.default()
config.model.update(mixer="ttt_linear", vocab_size=64, width=32, num_heads=2, num_layers=3, mlp_width=48)
config.model.ttt.mini_batch = 4
config.data.update(sequence_length=32, batch_size=8)
config.mesh.update(data=1, fsdp=2, tensor=2)
config_lib.validate(config)

if __name__ == "__main__":
    devices = topology_lib.devices(topology)
    planned = report.as_dict(plan.plan(config, str(topology), devices), price=2.0)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, 4), devices)
    analysis = program.make(config, mesh).compiled_step().memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
    print(json.dumps({"plan": planned, "analysis": sizes}))
