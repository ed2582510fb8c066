#!/usr/bin/env python
"""Measure the compile time of the programs of a kernel's self-check, for a TPU that need not be present.

    python scripts/kernel_check_seconds.py [v5e:1x1 [heads ...]]

Prints seconds of processor time, which other programs on the machine do not change, for tracing and compiling each of
the three programs, and their sum. A check compiles the three in parallel.
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

    on_device = jax.sharding.SingleDeviceSharding(device)
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
                    shapes = jax.tree.map(
                        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), arguments
                    )
                    began = time.process_time()
                    jax.jit(function).lower(*shapes).compile()
                    seconds.append(time.process_time() - began)
                named = f"{kind}, {number} heads, {dtype}"
                print(f"{named:24}" + "".join(f"{x:11.1f}" for x in (*seconds, sum(seconds))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
