"""Compile a program for TPUs in a process of its own, which writes the program and its schedule to a folder.

The compiler reads its flags once, when it is loaded, so it needs a new process:

    python -m ttt_jax.benchmark.tpu_schedule.compile FOLDER        with FOLDER/request.json
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_collections

import ttt_jax
from ttt_jax import garbage
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
from ttt_jax.errors import ConfigError

LISTING = "packed-bundles-post-ra"  # the final bundles leave out waits for results
UTILIZATION = "pre-delay_hlo-static-per-bundle-utilization"
_REQUEST, _COMPILED, _PROGRAM, DUMP = "request.json", "compiled.json", "program.hlo.txt", "schedule"


@dataclasses.dataclass(frozen=True)
class Function:
    """A function to compile, by name.

    Attributes:
      name: ``MODULE:NAME``, where MODULE is an importable module or a Python file. ``NAME(**settings)`` returns the
        function and a tuple of its arguments, trees of ``jax.ShapeDtypeStruct``. It runs on one chip, or on all chips
        of the topology where arguments are sharded over a ``jax.sharding.AbstractMesh`` of as many devices.
      settings: keyword arguments of NAME: int, float, bool or str.
    """

    name: str
    settings: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step of a validated config, over all chips of the topology; ``name`` is for reports."""

    config: ml_collections.ConfigDict
    name: str = "training step"

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      text: optimized HLO.
      seconds: time of the compilation.
      arguments, outputs, temporaries: bytes of HBM on one chip; outputs without those that reuse an argument's memory.
    """

    text: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int


def run(target: Function | Step, topology: str, folder: Path) -> Compiled:
    """Compile a target, and leave its schedule in ``folder / DUMP``.

    Raises:
      ConfigError: where the target or the topology does not exist, or they do not fit together.
      ScheduleError: where the compiler fails.
    """
    request: dict[str, Any] = {"topology": topology}
    if isinstance(target, Step):
        request["config"] = target.config.to_dict()
    else:
        request |= {"function": target.name, "settings": target.settings}
    (folder / _REQUEST).write_text(json.dumps(request))
    (folder / DUMP).mkdir(exist_ok=True)
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(folder)]
    done = subprocess.run(command, env=_environment(folder / DUMP), capture_output=True, text=True, errors="replace")
    try:
        answer = json.loads((folder / _COMPILED).read_text())
    except FileNotFoundError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = " ".join(lines[-1].split())[:300] if lines else "without a message"
        raise ScheduleError(f"the compiler ended with status {done.returncode}: {last}") from None
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    if "failed" in answer:
        raise ScheduleError(answer["failed"])
    return Compiled(text=(folder / _PROGRAM).read_text(), **answer)


def _environment(dump: Path) -> dict[str, str]:
    flags = (
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_hlo_text=false",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_html=false",
        f"--xla_jf_dump_llo_pass_label_regex=({LISTING}|{UTILIZATION})",
    )
    package = str(Path(ttt_jax.__file__).resolve().parents[1])
    return {
        **os.environ,
        "LIBTPU_INIT_ARGS": " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip(),
        "TPU_LOG_DIR": os.environ.get("TPU_LOG_DIR", "disabled"),
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def main(folder: Path) -> None:
    """Compile what the request in a folder asks for, and write the answer beside it."""
    request = json.loads((folder / _REQUEST).read_text())
    from ttt_jax.planning import topology as topology_lib

    try:
        topology = topology_lib.parse(request["topology"])
        topology_lib.prepare(topology)
        devices = topology_lib.devices(topology)
        start = time.perf_counter()
        if "config" in request:
            compiled = _step(request["config"], devices)
        else:
            compiled = _function(request["function"], request["settings"], devices)
        analysis = compiled.memory_analysis()
        answer: dict[str, Any] = {
            "seconds": time.perf_counter() - start,
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
        }
        (folder / _PROGRAM).write_text(_text(compiled))
    except ConfigError as error:
        answer = {"refused": str(error)}
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {_first_line(error)}"}
    (folder / _COMPILED).write_text(json.dumps(answer))


def _text(compiled) -> str:
    """Return the optimized HLO with the values of all constants, of which ``as_text`` leaves out all but the smallest.

    JAX has no public name for the options of printing; they are in the module of what is printed.
    """
    (module,) = compiled.runtime_executable().hlo_modules()
    options = sys.modules[type(module).__module__].HloPrintOptions()
    options.print_large_constants = True
    return module.to_string(options)


def _step(values: dict[str, Any], devices: list):
    from ttt_jax import config as config_lib
    from ttt_jax.distributed import sharding
    from ttt_jax.training.step import build_program

    config = config_lib.default()
    config.update(values)
    config_lib.validate(config)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, len(devices)), devices)
    return build_program(config, mesh).compiled_step()


def _function(name: str, settings: dict[str, Any], devices: list):
    """Compile the function for the first of the devices, or for all of them where its arguments are sharded."""
    import jax
    import numpy as np

    build = _named(name)
    try:
        inspect.signature(build).bind(**settings)
    except TypeError as error:
        known = f"{name.rpartition(':')[2]}{inspect.signature(build)}"
        raise ConfigError(f"--function {name}: {error}; expected settings of {known}") from error
    function, arguments = build(**settings)

    def placed(x):
        if x.sharding is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
        mesh = x.sharding.mesh
        if mesh.size != len(devices):
            raise ConfigError(f"--topology: has {len(devices)} chips; {name} expects {mesh.size}")
        mesh = jax.sharding.Mesh(np.reshape(devices, mesh.axis_sizes), mesh.axis_names, mesh.axis_types)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, x.sharding.spec))

    return jax.jit(function).lower(*jax.tree.map(placed, arguments)).compile()


def _named(name: str):
    """Return the function that ``MODULE:NAME`` names."""
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.is_file():
            raise ConfigError(f"--function {name}: no such file; expected MODULE:NAME or FILE.py:NAME")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # every .py file has one
        assert spec.loader is not None
        sys.path.insert(0, str(path.resolve().parent))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--function {name}: {error}; expected MODULE:NAME or FILE.py:NAME") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ConfigError(f"--function {name}: no such function; {module_name} has {', '.join(known) or 'none'}")
    return function


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", next((line for line in str(error).splitlines() if line.strip()), ""))[:500]


if __name__ == "__main__":
    garbage.collect_rarely()
    with contextlib.suppress(KeyboardInterrupt):
        main(Path(sys.argv[1]))
