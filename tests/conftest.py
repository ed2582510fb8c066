"""Provide what all tests share: the CPU, a compilation cache that outlives the run, comparisons that fail at NaN."""

import atexit
import collections
import functools
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import hypothesis
import jax
import numpy as np
import pytest

from ttt_jax.distributed import startup

ROOT = Path(__file__).resolve().parents[1]

# Compiling is most of the time. The tests and all processes that they start share compiled programs, and compile them
# with little optimisation and XLA's older emitter of fused loops, which together take a third of the time. XLA ends a
# process at a flag that it does not know; the older emitter is gone since jax 0.11.1.
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11, 1):
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

startup.keep_freed_memory()

# Tracing makes millions of objects, few of them in circles: with Python's thresholds a tenth of the time went to
# looking for circles.
gc.set_threshold(100_000, 20, 50)
atexit.register(gc.freeze)  # nor at the end

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores it for what it runs in the background, and so would the processes that tests send it to.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples for everybody, and no deadline: the first example of a shape is the one that compiles.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


_WORTH_SHARING = 60.0  # seconds of tests
_MINUTES = ("test_kills_leave_no_trace", "test_every_script_tiny")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how the time of the tests is shared among their folders."""
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds["/".join(report.nodeid.split("::")[0].split("/")[:2])] += report.duration
    total = sum(seconds.values())
    if total < _WORTH_SHARING:
        return
    terminalreporter.section(f"{total:.0f} s of tests, by folder")
    for folder, spent in seconds.most_common():
        if spent >= total / 200:
            terminalreporter.write_line(f"{spent:7.1f} s  {100 * spent / total:4.1f} %  {folder}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes: in the end, one process would continue with one of them alone."""
    items.sort(key=lambda item: not item.name.startswith(_MINUTES))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs the compiler of TPUs where there is none for this system; on Linux the extra dev installs it."""
    if item.get_closest_marker("tpu_compiler") and sys.platform != "linux":
        pytest.skip("libtpu is for Linux")


def pytest_collection_finish() -> None:
    """Leave out of all further garbage collections what has been imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Callable]:
    """jax.jit with little optimisation, which takes 0.6 of the time to compile; what is computed is the same."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def sent_to_a_process() -> Callable[[Any], Any]:
    """Return ``sent_to_a_process(value)``: the copy of a value that a worker process gets."""
    return lambda value: ForkingPickler.loads(ForkingPickler.dumps(value))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Take back what a test, or a command that it runs in this process, does to the environment variables."""
    with unittest.mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def for_libtpu() -> Iterator[None]:
    """Take away from the processes of a module the flags of XLA above: libtpu ends at one that it does not know."""
    jax.devices()  # this process has read them then, and compiles as those do that other modules start
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        yield


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Return ``assert_close(actual, desired, tolerance)`` for trees; relative to the largest value of each array."""

    def check(actual: Any, desired: Any, tolerance: float = 1e-5) -> None:
        def arrays(actual, desired):
            actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
            assert actual.shape == desired.shape
            size = max(np.abs(desired).max(initial=0.0), 1e-3)
            np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * size, equal_nan=False)

        jax.tree.map(arrays, actual, desired)

    return check


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return ``load_script(name)``, which imports a program of ``scripts/`` without running it."""

    @functools.cache
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """Return ``random_params(module, *args)``: parameters drawn by NumPy, large enough that each has an effect.

    Initialisation would compile something and leave half of the parameters at 0 or 1.
    """

    def draw(module: nn.Module, *args: Any, seed: int = 0, stddev: float = 0.5) -> Any:
        shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
        rng = np.random.default_rng(seed)

        def leaf(path, x):
            is_scale = path[-1].key.endswith("scale")
            return (is_scale + stddev * rng.standard_normal(x.shape)).astype(np.float32)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope="session")
def save_run(random_params) -> Callable[..., dict[int, Any]]:
    """Return ``save_run(workdir, config, steps)``, which makes a workdir with checkpoints of random parameters without
    compiling anything, and returns the parameters by step."""
    from ttt_jax import config as config_lib
    from ttt_jax.distributed import sharding
    from ttt_jax.models.language_model import build_model
    from ttt_jax.training.checkpoint import Checkpoints
    from ttt_jax.training.step import build_program

    def save(
        workdir: Path,
        config: Any,
        steps: tuple[int, ...] = (5,),
        stddev: float = 0.5,
        meta: dict[str, Any] | None = None,
    ) -> dict[int, Any]:
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(json.dumps(config.to_dict()))
        mesh = sharding.make_mesh(config_lib.mesh_shape(config, 1), jax.devices()[:1])
        abstract = build_program(config, mesh).abstract_state
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        checkpoints, model, found = Checkpoints(workdir, keep_last=len(steps)), build_model(config.model), {}
        for step in steps:
            found[step] = random_params(model, np.zeros((1, 1), np.int32), seed=step, stddev=stddev)
            checkpoints.save(step, empty._replace(step=np.int32(step), params=found[step]), meta or {})
        checkpoints.close()
        return found

    return save


@pytest.fixture(scope="session")
def in_one_process(tmp_path_factory) -> Callable[[list[str]], dict[str, list]]:
    """Return ``in_one_process(commands)``: status, stdout and stderr of each command of ttt. One process runs them in
    an empty folder; it must neither load JAX (nor other ``unwanted`` modules) nor leave a file."""

    def run(commands: list[str], unwanted: tuple[str, ...] = ("jax",)) -> dict[str, list]:
        program = f"""
import contextlib, io, json, os, sys
from ttt_jax import cli
printed = {{}}
for command in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(command.split())
        except SystemExit as end:
            status = end.code
    printed[command] = [status, out.getvalue(), err.getvalue()]
print(json.dumps([printed, [name for name in {unwanted!r} if name in sys.modules], os.listdir()]))
"""
        folder = tmp_path_factory.mktemp("empty")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found, loaded, files = json.loads(done.stdout)
        assert not loaded
        assert not files
        return found

    return run


@pytest.fixture(scope="session")
def mount_namespace() -> list[str]:
    """Return the command that starts another with the right to mount; skip the test where there is none."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            trial = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
            if subprocess.run(trial, capture_output=True).returncode == 0:
                return command
        except FileNotFoundError:
            break
    pytest.skip("no right to mount a small disk here: unshare -m and unshare -rm are both refused")
