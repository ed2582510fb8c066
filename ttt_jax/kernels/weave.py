"""Evaluate a function for several packs of heads with interleaved operations.

The compiler of TPUs keeps close to the order in which a program is written. Packs that are written one after another
would each wait for their own latencies, a hundred cycles for a matrix product or a reduction over lanes. So the
function is traced once, and its operations are emitted for all packs in the order of a list scheduler with a coarse
model of the chip: among the operations that can start, the one with the longest way to the end comes first.
"""

import collections
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal
from jax.interpreters import partial_eval

_UNITS = ("lanes", "matrix", "vector")  # in the order in which operations are started, the busiest first
_INLINED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_MOVES = (
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "iota", "pad"),
    *("reshape", "slice", "split", "squeeze", "stop_gradient"),
)
_ROWS, _LANES = 8, 128  # the size of a vector register


class _Cost(NamedTuple):
    """The cost of an operation in cycles: the time its unit is busy, and the latency of the result after that."""

    unit: str
    busy: float
    latency: float


class Read(NamedTuple):
    """An argument that is read again at each use, and so occupies no registers in between."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], jax.Array]


class Write(NamedTuple):
    """The destination of a result: written as soon as the result is known and ``over``, which it overwrites, is not
    read any more."""

    write: Callable[[jax.Array], None]
    over: Read | None = None


def weave(function: Callable, arguments: Sequence[tuple], results: Sequence, stagger: float = 0.0) -> None:
    """Evaluate ``function(*x)`` for each x of ``arguments``, with interleaved operations, and write the results.

    Args:
      function: a function of trees of arrays that returns a tree of arrays.
      arguments: for each copy of the function, a tuple of trees of :class:`Read`, of the same shapes for all copies.
      results: for each copy, a tree of :class:`Write` with the structure of the result.
      stagger: cycles of the model by which each copy starts after the one before, so that not all copies need the same
        unit at once.
    """
    reads, tree = jax.tree.flatten(arguments[0], is_leaf=_is_read)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in reads]
    closed = jax.make_jaxpr(lambda *x: function(*jax.tree.unflatten(tree, x)))(*shapes)
    inlined = jax.make_jaxpr(lambda *x: _inline(closed.jaxpr, closed.consts, x))(*shapes)
    jaxpr, _ = partial_eval.dce_jaxpr(inlined.jaxpr, [True] * len(inlined.jaxpr.outvars), instantiate=True)
    copies = [
        _Copy(
            jaxpr,
            inlined.consts,
            jax.tree.leaves(each, is_leaf=_is_read),
            jax.tree.leaves(writes, is_leaf=lambda x: isinstance(x, Write)),
        )
        for each, writes in zip(arguments, results, strict=True)
    ]
    for operation, which in _schedule(jaxpr, len(copies), stagger):
        copies[which].evaluate(jaxpr.eqns[operation])
    for copy in copies:
        copy.finish()


def _is_read(x: Any) -> bool:
    return isinstance(x, Read)


class _Copy:
    """The values of one copy while it is evaluated."""

    def __init__(self, jaxpr: Jaxpr, constants: Sequence, reads: Sequence[Read], writes: Sequence[Write]):
        self._values: dict = dict(zip(jaxpr.constvars, constants, strict=True))
        self._reads = dict(zip(jaxpr.invars, reads, strict=True))
        used = [x for variables in (jaxpr.outvars, *(e.invars for e in jaxpr.eqns)) for x in variables]
        uses = collections.Counter(x for x in used if not isinstance(x, Literal) and x in self._reads)
        self._uses = {id(read): uses[variable] for variable, read in self._reads.items()}
        self._waiting = list(zip(jaxpr.outvars, writes, strict=True))
        self._write()

    def evaluate(self, equation: Any) -> None:
        results = _bind(equation, [self._value(x) for x in equation.invars])
        self._values.update(zip(equation.outvars, results, strict=True))
        self._write()

    def finish(self) -> None:
        self._write()
        assert not self._waiting, "a result is computed by no operation"

    def _value(self, x: Any) -> Any:
        if isinstance(x, Literal):
            return x.val
        if x not in self._reads:
            return self._values[x]
        read = self._reads[x]
        self._uses[id(read)] -= 1
        return read.read()

    def _write(self) -> None:
        def ready(variable, write):
            there = isinstance(variable, Literal) or variable in self._values or variable in self._reads
            return there and (write.over is None or not self._uses[id(write.over)])

        for variable, write in [x for x in self._waiting if ready(*x)]:
            write.write(self._value(variable))
        self._waiting = [x for x in self._waiting if not ready(*x)]


def _bind(equation: Any, values: Sequence) -> Sequence:
    results = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
    return results if equation.primitive.multiple_results else [results]


def _inline(jaxpr: Jaxpr, constants: Sequence, arguments: Sequence) -> list:
    """Evaluate a program and inline the functions that it calls, so that the cost of their operations is visible."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(variables):
        return [x.val if isinstance(x, Literal) else values[x] for x in variables]

    for equation in jaxpr.eqns:
        if equation.primitive.name in _INLINED:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            results: Sequence = _inline(inner.jaxpr, inner.consts, read(equation.invars))
        else:
            results = _bind(equation, read(equation.invars))
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars)


def _schedule(jaxpr: Jaxpr, copies: int, stagger: float = 0.0) -> list[tuple[int, int]]:
    """Return the order of all operations of all copies, as (operation, copy)."""
    costs = [_cost(equation) for equation in jaxpr.eqns]
    made_by = {variable: i for i, equation in enumerate(jaxpr.eqns) for variable in equation.outvars}
    needs = [
        {made_by[x] for x in equation.invars if not isinstance(x, Literal) and x in made_by} for equation in jaxpr.eqns
    ]
    needed_by: list[list[int]] = [[] for _ in costs]
    for i, sources in enumerate(needs):
        for source in sources:
            needed_by[source].append(i)
    way_to_end = [0.0] * len(costs)
    for i in reversed(range(len(costs))):
        behind = max((way_to_end[j] for j in needed_by[i]), default=0.0)
        way_to_end[i] = costs[i].busy + costs[i].latency + behind

    missing = [[len(sources) for sources in needs] for _ in range(copies)]
    ready_at = [[0.0] * len(costs) for _ in range(copies)]
    waiting = [(copy * stagger, i, copy) for copy in range(copies) for i, sources in enumerate(needs) if not sources]
    heapq.heapify(waiting)
    ready: dict[str, list] = {unit: [] for unit in _UNITS}
    free_at = dict.fromkeys(_UNITS, 0.0)
    order, now = [], 0.0
    while waiting or any(ready.values()):
        while waiting and waiting[0][0] <= now:
            _, i, copy = heapq.heappop(waiting)
            heapq.heappush(ready[costs[i].unit], (-way_to_end[i], i, copy))
        started = [unit for unit in _UNITS if ready[unit] and free_at[unit] <= now]
        for unit in started:
            _, i, copy = heapq.heappop(ready[unit])
            order.append((i, copy))
            free_at[unit] = now + costs[i].busy
            done = free_at[unit] + costs[i].latency
            for j in needed_by[i]:
                missing[copy][j] -= 1
                ready_at[copy][j] = max(ready_at[copy][j], done)
                if not missing[copy][j]:
                    heapq.heappush(waiting, (ready_at[copy][j], j, copy))
        if not started:
            later = [waiting[0][0]] if waiting else []
            now = min(later + [free_at[unit] for unit in _UNITS if ready[unit]])
    return order


def _cost(equation: Any) -> _Cost:
    """Return the approximate cost of an operation.

    On v5e a result takes some 130 cycles from a matrix unit, 115 from a reduction over lanes and 170 from a transpose.
    Three times these latencies mix the operations best, measured with ``ttt bench tpu-schedule``.
    """
    name = equation.primitive.name
    written = sum(_registers(x.aval.shape) for x in equation.outvars)
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        depth = math.prod(left[i] for i in contracted)
        passes = math.ceil(depth / _LANES) * math.ceil(out[-1] / _LANES)
        return _Cost("matrix", passes * max(out[0], 64) / 4, 3 * 131)
    if name == "reduce_sum":
        read = equation.invars[0].aval
        if len(read.shape) - 1 in equation.params["axes"]:
            return _Cost("lanes", _registers(read.shape) * 8 / 3, 3 * 115)
        return _Cost("vector", _registers(read.shape) / 4, 3 * 10)
    if name == "transpose":
        return _Cost("lanes", written * 8 / 3, 3 * 170)
    if name in ("tanh", "rsqrt", "logistic", "exp"):
        return _Cost("vector", written, 3 * 30)
    if name in _MOVES:
        return _Cost("vector", written / 8, 3 * 2)
    return _Cost("vector", written / 3, 3 * 6)


def _registers(shape: tuple[int, ...]) -> int:
    rows, lanes = (1, 1, *shape)[-2:]
    return math.ceil(rows / _ROWS) * math.ceil(lanes / _LANES) * math.prod(shape[:-2])
