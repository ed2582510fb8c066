"""A kernel that is as quick to compile as the scan of which it is made, right or wrong on purpose.

``python tests/kernel_by_scan.py ARGUMENTS`` is ``tests/ttt_process.py`` where CPUs count as accelerators, and the
kernel is wrong on the last of the processes.
"""

import sys
import unittest.mock

import jax
import ttt_process

from ttt_jax.cli import main
from ttt_jax.kernels import run
from ttt_jax.ttt import scan


def right(loop, parameters, start, tokens, **_):
    """Compute what a kernel does; its options change nothing."""
    result = scan.run(loop, parameters._replace(w0=start), tokens)
    return result.z, result.state.weights


def outputs_shifted(*arguments, **_):
    """Every output has a wrong feature, which no gradient of the kernel's shows."""
    z, end = right(*arguments)
    return z.at[..., 0].add(10.0), end


def wrong_on_the_last_process(*arguments, **_):
    """Compute what a kernel does, but not on the last process."""
    last = jax.process_index() == jax.process_count() - 1
    return (outputs_shifted if last else right)(*arguments)


if __name__ == "__main__":
    ttt_process.share_compiled_programs()
    with (
        unittest.mock.patch.object(run, "run", wrong_on_the_last_process),
        unittest.mock.patch.object(run, "interpreted", return_value=False),
    ):
        sys.exit(main())
