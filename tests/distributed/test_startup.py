"""Check how the other processes are found, and how waiting for them ends.

Runs of several processes are tested in tests/training.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.distributed import startup
from ttt_jax.terminal.stopping import RESTART

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_PLATFORMS TPU_WORKER_HOSTNAMES MEGASCALE_NUM_SLICES "
    "TPU_SKIP_MDS_QUERY SLURM_STEP_NODELIST SLURM_NTASKS OMPI_COMM_WORLD_SIZE"
).split()


@pytest.fixture
def bare(monkeypatch):
    """Return a patched environment that names no other processes, on a machine without TPUs."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [])
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "surely"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "surely"),
        ({"MEGASCALE_NUM_SLICES": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}, "surely"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]", "JAX_PLATFORMS": "cpu"}, "surely"),
        ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc, not a step of srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "surely"),
    ],
)
def test_other_processes_are_found_by_the_environment(bare, environment, expected):
    for name, value in environment.items():
        bare.setenv(name, value)
    assert startup._cluster() == expected


@pytest.fixture
def on_tpu_host(bare):
    """Return an environment of a TPU host, which may not tell whether it is one of several: JAX asks its metadata."""
    bare.setattr(startup.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    bare.setattr(startup.importlib.util, "find_spec", lambda name: object())
    return bare


def fails(*arguments, **options):
    raise RuntimeError("no metadata\nhere")


def test_a_tpu_host_without_metadata_continues_alone(on_tpu_host, capsys):
    assert startup._cluster() == "perhaps"
    on_tpu_host.setattr(startup.jax.distributed, "initialize", fails)
    startup.start()
    assert "found no other processes (RuntimeError: no metadata here); continuing alone" in capsys.readouterr().err
    on_tpu_host.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert startup._cluster() is None


def test_processes_that_cannot_be_joined_are_an_error(bare):
    bare.setattr(startup.jax.distributed, "initialize", fails)
    with pytest.raises(ConfigError) as caught:
        startup.start("host:1", 2, 1)
    assert str(caught.value) == "process 1 of 2 cannot join the others at host:1: RuntimeError: no metadata here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("host:1", None, None),
            "--processes: missing; expected all of --coordinator, --processes, --process, or none",
        ),
        ((None, 2, 0), "--coordinator: missing; expected all of"),
        (("host", 2, 0), "--coordinator host: expected host:port"),
        (("host:x", 2, 0), "--coordinator host:x: expected host:port"),
        (("host:1", 2, 2), "--process 2: expected a number from 0 to below --processes, 2"),
    ],
)
def test_bad_arguments_are_refused(bare, arguments, message):
    with pytest.raises(ConfigError) as caught:
        startup.start(*arguments)
    assert str(caught.value).startswith(message)


def test_bad_environment_variables_are_refused(bare):
    bare.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='two': expected a whole number"):
        startup.start()


def test_a_single_process_does_not_wait(bare):
    bare.setattr(startup.jax.distributed, "initialize", lambda *_, **__: pytest.fail("waited for others"))
    startup.start()


@pytest.mark.slow
def test_the_compilation_cache_is_where_the_user_says_or_in_the_cache_folder(tmp_path):
    """Run processes of their own, because JAX reads its environment once."""
    program = "from ttt_jax.distributed import startup; import jax; startup.use_compilation_cache(); " + (
        "print(jax.config.jax_compilation_cache_dir)"
    )

    def place(**environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "XDG"))}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**kept, **environment}
        )
        return done.stdout.strip()

    assert place(JAX_COMPILATION_CACHE_DIR="gs://bucket/cache") == "gs://bucket/cache"
    assert place(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "ttt_jax" / "xla")


SLURM = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from ttt_jax.distributed import agreement, startup
startup.start(limit=60)
agreement.check_same({"a": 1})
print(json.dumps([jax.process_index(), jax.process_count()]))
"""


@pytest.mark.slow
def test_processes_of_a_slurm_step_find_each_other():
    """Start two processes with the variables that srun sets and JAX reads."""
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(int(time.time())),  # of which JAX makes the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM],
            env={**environment, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [json.loads(out.splitlines()[-1]) for out, _ in ends] == [[0, 2], [1, 2]], ends


WATCHED = """
import sys, time
from ttt_jax.distributed.startup import Watchdog
dog = Watchdog(float(sys.argv[1]), lambda seconds: f"heard nothing for {seconds:.1f} s", armed=sys.argv[2] == "armed")
for _ in range(int(sys.argv[3])):
    dog.heard(float(sys.argv[4]))
    time.sleep(0.2)
time.sleep(float(sys.argv[5]))
dog.close()
time.sleep(1)
print("ended by itself")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "armed", "heard", "took", "silence", "status"),
    [
        (0.5, "armed", 0, 0.0, 20, RESTART),
        (0.5, "armed", 5, 0.0, 0.1, 0),  # heard in time, then closed
        (0.5, "armed", 2, 0.0, 20, RESTART),
        (0.5, "unarmed", 0, 0.0, 1, 0),  # does not watch before the first word
        (0.5, "armed", 1, 1.0, 2, 0),  # what took 1 s may take 5
        (0.0, "armed", 0, 0.0, 1, 0),  # never watches
    ],
)
def test_the_watchdog_ends_a_silent_process(limit, armed, heard, took, silence, status):
    arguments = [str(x) for x in (limit, armed, heard, took, silence)]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status == RESTART:
        assert time.monotonic() - began < 15
        assert "heard nothing for 0." in done.stderr
        assert "Thread" in done.stderr  # where everybody stood
        assert done.stdout == ""
    else:
        assert done.stdout == "ended by itself\n"


def test_allocator_is_left_alone_with_huge_pages(bare):
    calls = []
    bare.setattr(startup.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *setting: calls.append(setting)))
    bare.setattr(startup.sys, "platform", "linux")
    bare.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    startup.keep_freed_memory()
    assert calls == []
    bare.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    startup.keep_freed_memory()
    assert [parameter for parameter, _ in calls] == [-8, -4, -1, -2]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """Allocate 10 buffers of 64 MiB in turn, in a process of its own; glibc keeps smaller ones by default."""
    program = """
import resource
from ttt_jax.distributed import startup
startup.glob.glob = lambda pattern: []
startup.keep_freed_memory()
for _ in range(10):
    len(bytes([1]) * 2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

    def faults(tunables):
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    given_back = faults("glibc.malloc.hugetlb=0")  # leaves the allocator alone
    assert given_back - faults("") > 8 * 2**26 // resource.getpagesize()
