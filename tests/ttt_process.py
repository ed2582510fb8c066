"""Run ``python -m ttt_jax ARGUMENTS`` with compiled programs that processes share.

JAX finds a program again by a key that differs between the CPU processes of one run, and lets process 0 alone keep
what it compiled, so that the others compile at each start. Here all of them find and keep programs alike.

JAX has no option for that, so this is the only file of the tests that uses ``jax._src``. It was tested with jax 0.10.2
and 0.12.0, whose ``_cache_write`` is not given host callbacks.
"""

import sys

from jax._src import cache_key, compilation_cache, compiler

from ttt_jax.cli import main


def _hash_devices(hash_obj, devices):
    cache_key._hash_devices(hash_obj, devices)  # their kinds; not which of them are of this process


def _keep(key, seconds, name, backend, executable, host_callbacks=()):
    if not host_callbacks:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


def share_compiled_programs() -> None:
    """Let this process find and keep programs as the others do."""
    cache_key._hash_accelerator_config = _hash_devices
    compiler._cache_write = _keep


if __name__ == "__main__":
    share_compiled_programs()
    sys.exit(main())
