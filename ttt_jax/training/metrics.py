"""Where metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases when asked for."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ttt_jax.config import ConfigError


class MetricsWriter:
    """Appends one JSON object per record to ``metrics.jsonl``.

    Opening it for a run that resumes at ``step`` drops the records after that step (they are computed again, and equal)
    and a last line that was cut short.
    """

    def __init__(self, workdir: Path, step: int, *, tensorboard: bool = False, wandb: dict[str, Any] | None = None):
        self._path = workdir / "metrics.jsonl"
        _keep_records(self._path, step)
        self._file = self._path.open("a", buffering=1)
        self._others: list[tuple[Callable, Callable]] = []  # write and close of each
        if tensorboard:
            self._others.append(_tensorboard(workdir))
        if wandb:
            self._others.append(_wandb(workdir, wandb))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for write_other, _ in self._others:
            write_other(step, values)

    def close(self) -> None:
        """Flushes to disk, and ends what the others began."""
        self._file.close()
        for _, close_other in self._others:
            close_other()


def read(workdir: Path) -> list[dict[str, float]]:
    """All complete records of a run."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in _complete_lines(path)] if path.exists() else []


def _complete_lines(path: Path) -> list[str]:
    lines = path.read_text().split("\n")
    return lines[:-1]  # what follows the last line break was cut short, or is empty


def _keep_records(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _tensorboard(workdir: Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("log.tensorboard=true: needs tensorboardX; pip install 'ttt_jax[tensorboard]'") from error
    writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(workdir: Path, settings: dict[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("log.wandb_project: needs wandb; pip install 'ttt_jax[wandb]'") from error
    identity = hashlib.blake2b(str(workdir.resolve()).encode(), digest_size=8).hexdigest()  # resumes with the workdir
    run = wandb.init(dir=workdir, name=workdir.name, id=identity, resume="allow", **settings)
    return (lambda step, values: run.log(dict(values), step=step)), run.finish
