"""The records of a run while they are written."""

import math
import os
from collections.abc import Iterable
from typing import Any

from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric


class Follower:
    """What a run's ``metrics.jsonl`` says of a metric, record by record; each step once, also where a run goes back to
    a checkpoint and computes some again.

    Args:
      path: of the file, which need not be there yet.
      name: of the metric.
      milestones: steps of which the first record from there on is always told of.
    """

    def __init__(self, path: Workdir, name: str, milestones: Iterable[float] = ()):
        self._path, self._name = path, name
        self._milestones = sorted(milestones)
        self._told = 0
        self._seen: tuple[float | None, ...] = (None,)

    def news(self) -> list[dict[str, Any]]:
        """Step and metric of the records since the last call that reach a milestone, and of the newest one."""
        seen = (files.written(self._path), os.path.getsize(self._path) if os.path.exists(self._path) else None)
        if seen == self._seen:
            return []
        self._seen = seen
        records = files.records(self._path)
        found = []
        for index, record in enumerate(records):
            step = record["step"]
            if step <= self._told:
                continue
            reached = [milestone for milestone in self._milestones if self._told < milestone <= step]
            if reached or index == len(records) - 1:
                value = metric.of_records(records[: index + 1], self._name).number
                if value is not None and not math.isfinite(value):  # comparisons with NaN would call it good
                    value = -math.inf if metric.higher_is_better(self._name) else math.inf
                found.append({"step": step, **({} if value is None else {self._name: value})})
                self._told = step
        return found
