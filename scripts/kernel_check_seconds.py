#!/usr/bin/env python
"""Measure how long the programs compile that a fused kernel is checked with, for a TPU that need not be there.

    python scripts/kernel_check_seconds.py [v5e:1x1 [heads ...]]

Prints seconds of processor time, which other programs on the machine do not change: tracing and compiling, of each of
the programs and in all. A check compiles the three side by side.
"""

import sys
import time

from ttt_jax.planning import topology as topology_lib


def main(topology: str = "v5e:1x1", *heads: str) -> None:
    parsed = topology_lib.parse(topology)
    topology_lib.prepare(parsed)
    device = topology_lib.devices(parsed)[0]
    import jax

    from ttt_jax.benchmark import inner_loop

    here = jax.sharding.SingleDeviceSharding(device)
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in (*inner_loop.PARTS, "in all")))
    for kind in ("linear", "mlp"):
        for number in heads or ("12", "32"):
            for dtype in ("bf16", "f32"):
                seconds = []
                for part in inner_loop.PARTS:
                    function, arguments = inner_loop.build_self_check(
                        kind, int(number), dtype=dtype, part=part, device=device.device_kind
                    )
                    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
                    began = time.process_time()
                    jax.jit(function).lower(*shapes).compile()
                    seconds.append(time.process_time() - began)
                named = f"{kind}, {number} heads, {dtype}"
                print(f"{named:24}" + "".join(f"{x:11.1f}" for x in (*seconds, sum(seconds))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
