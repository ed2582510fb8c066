"""Provide kernels made of the scan, right ones and wrong ones, which compile as quickly as the scan.

``python tests/kernel_by_scan.py ARGUMENTS`` does the same as ``tests/ttt_process.py``, but CPUs count as accelerators,
and the kernel is wrong on the last process.
"""

import sys
import unittest.mock

import jax
import ttt_process

from ttt_jax.cli import main
from ttt_jax.kernels import run
from ttt_jax.ttt import scan


def right(loop, parameters, start, tokens, **_):
    """Compute the results of a kernel; its options change nothing."""
    result = scan.run(loop, parameters._replace(w0=start), tokens)
    return result.z, result.state.weights


def outputs_shifted(*arguments, **_):
    """Compute outputs with one wrong feature, which does not show in any gradient."""
    z, end = right(*arguments)
    return z.at[..., 0].add(10.0), end


def wrong_on_the_last_process(*arguments, **_):
    """Compute the results of a kernel, but wrong ones on the last process."""
    last = jax.process_index() == jax.process_count() - 1
    return (outputs_shifted if last else right)(*arguments)


if __name__ == "__main__":
    ttt_process.share_compiled_programs()
    with (
        unittest.mock.patch.object(run, "run", wrong_on_the_last_process),
        unittest.mock.patch.object(run, "interpreted", return_value=False),
    ):
        sys.exit(main())
