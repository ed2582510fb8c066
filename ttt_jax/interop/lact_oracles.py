"""Check the inner loop against numbers of the LaCT authors' fast-weight operation.

Files are ``op_*.npz`` in the format that ``tests/oracles/lact/README.md`` describes. :func:`inner_loop` expresses the
operation as an inner loop. Its weights are called w0 (gate), w2 (values) and w1 (output), [..., out, in]; ours are
[..., in, out], in the order in which the learner calls them. It adds steps that we subtract.

Shapes: B batch, H heads, T tokens, b tokens per mini-batch, d_k and d_v widths of keys and values, n updates.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.interop.oracles import Oracle, Report, largest, load, relative_norm, worst
from ttt_jax.ttt import scan, update
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens
from ttt_jax.ttt.learner import Affine, Learner, Weights
from ttt_jax.ttt.learners import SwiGLU
from ttt_jax.ttt.objective import dot_product
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Momentum, Muon, Renormalise

# Largest error allowed in float32, by kind of number. Errors are absolute, but relative norms for gradients.
TOLERANCE = {"o": 5e-6, "weights": 3e-6, "momentum": 3e-6, "grad": 5e-6}
TOLERANCE_WITH_MUON = {"o": 3e-5, "weights": 3e-5, "momentum": 3e-5, "grad": 3e-4}

BEFORE_USE = {"post": False, "pre": True}  # whether a variant renormalises weights before they are used
OTHER_VARIANTS = ("fusedpost",)  # a different operation, which orthogonalises two matrices together
MATRICES = ("0", "2", "1")  # the numbers of their matrices, in our order


def check(path: Path) -> Report | None:
    """Compare everything in a file of the operation; return None where the file has another format.

    Raises:
      ValueError, KeyError: as :func:`check_operation`.
    """
    oracle = load(path)
    if "config" not in oracle or oracle["config"].dtype.kind != "U":
        return None
    config = json.loads(str(oracle["config"]))
    if not isinstance(config, dict) or not {"chunk", "momentum", "muon"} <= config.keys():
        return None
    return check_operation(oracle, config)


def check_operation(oracle: Oracle, config: Mapping[str, Any]) -> Report | None:
    """Compare outputs, weights and momenta after each update, and gradients of all inputs.

    Returns:
      The errors, or None for a variant that is a different operation.

    Raises:
      ValueError, KeyError: where the variant is unknown, or an array is missing or has another shape.
    """
    variant = config.get("variant", "post")
    if variant in OTHER_VARIANTS:
        return None
    if variant not in BEFORE_USE:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join((*BEFORE_USE, *OTHER_VARIANTS))}")
    given = {name: oracle[name] for name in input_names(oracle, config)}
    _expect_numbers({**given, "cotangent": oracle["cotangent"]}, config)
    inputs = {name: jnp.asarray(x) for name, x in given.items()}
    loop = inner_loop(oracle, config)
    b, length = config["chunk"], oracle["q"].shape[2]
    programs = _programs(loop, b)
    with jax.default_matmul_precision("highest"):
        gradients, o = programs.gradients(inputs, oracle["cotangent"])
        errors_of_o = [largest(o, oracle["o"])]
        for n in _shorter_lengths(oracle, config, length):
            errors_of_o.append(largest(programs.outputs(inputs, n), oracle[f"o_T{n}"]))
        errors = {
            "o": worst(errors_of_o),
            **_errors_of_states(oracle, loop, programs.read, *arguments(inputs, b)),
            "grad": worst(relative_norm(g, oracle[f"grad/{name}"]) for name, g in gradients.items()),
        }
    return Report(errors, TOLERANCE_WITH_MUON if config["muon"] else TOLERANCE)


class _Programs(NamedTuple):
    """The compiled programs of an inner loop.

    Attributes:
      gradients: from inputs and cotangent to the gradients of all inputs, and the outputs.
      outputs: from inputs and a number of tokens to the outputs of these tokens.
      read: :func:`scan.run` of the inner loop.
    """

    gradients: Callable[..., Any]
    outputs: Callable[..., jax.Array]
    read: Callable[..., Any]


@functools.cache
def _programs(loop: InnerLoop, b: int) -> _Programs:
    """Return the programs for mini-batches of ``b`` tokens, compiled once for all files of one shape."""

    def outputs(inputs, length):
        parameters, tokens = arguments(inputs, b)
        return scan.run(loop, parameters, _cut(tokens, 0, length)).z.swapaxes(1, 2)

    def scalar(inputs, cotangent):
        o = outputs(inputs, cotangent.shape[2])
        return (o * cotangent).sum(), o

    return _Programs(
        jax.jit(jax.grad(scalar, has_aux=True)),
        jax.jit(outputs, static_argnums=1),
        jax.jit(functools.partial(scan.run, loop)),
    )


def inner_loop(oracle: Oracle, config: Mapping[str, Any]) -> InnerLoop:
    """Return the operation of a file as an inner loop."""
    features, hidden = oracle["q"].shape[-1], oracle["w1"].shape[-1]
    factor = (hidden + 0.5) / features  # int(factor * features) is hidden
    f = SwiGLU(factor, bias=False, features_out=oracle["v"].shape[-1])
    chain = [
        *([Momentum()] if config["momentum"] else []),
        *([Muon()] if config["muon"] else []),
        Renormalise(before_use=BEFORE_USE[config.get("variant", "post")]),
    ]
    return InnerLoop(Learner(f, features), dot_product, Rate(position="1", per_matrix=True), tuple(chain), "previous")


def input_names(oracle: Oracle, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs of the operation, for all of which a file has gradients."""
    weights = [name for i in "012" for name in ([f"w{i}"] if f"w{i}" in oracle else [f"w{i}_left", f"w{i}_right"])]
    return [*weights, "q", "k", "v", "lr0", "lr1", "lr2", *(["momentum"] if config["momentum"] else [])]


def arguments(inputs: Mapping[str, jax.Array], b: int) -> tuple[Parameters, Tokens]:
    """Return the inputs as arguments of our inner loop."""

    def weight(i):
        if f"w{i}" in inputs:
            return inputs[f"w{i}"]
        product = inputs[f"w{i}_left"] @ inputs[f"w{i}_right"]
        out, into = product.shape[-2:]
        return product + 0.5 * jnp.eye(out, into, dtype=product.dtype)

    w0 = tuple(Affine(weight(i).swapaxes(-1, -2), None) for i in MATRICES)
    by_token = {name: x.swapaxes(1, 2) for name, x in inputs.items() if not name.startswith("w")}
    eta = jnp.stack([by_token[f"lr{i}"] for i in MATRICES], -1)
    gates = {name: by_token[name] for name in ("momentum",) if name in by_token}
    tokens = Tokens(by_token["q"], by_token["k"], by_token["v"], eta, gates)
    return Parameters(w0, {}, jnp.ones(b, eta.dtype)), tokens


def _errors_of_states(
    oracle: Oracle, loop: InnerLoop, read: Callable[..., Any], parameters: Parameters, tokens: Tokens
) -> dict[str, float]:
    """Compare stored and used weights after each update, reading a mini-batch at a time."""
    b, length = len(parameters.position_eta), tokens.q.shape[1]
    updates = -(-length // b) - 1  # nothing reads after the last mini-batch
    stored = "w{}_main_after" if any(isinstance(m, Renormalise) and m.before_use for m in loop.update) else "w{}_after"
    momentum = [place for place, member in enumerate(loop.update) if isinstance(member, Momentum)]
    errors: dict[str, list[float]] = {"weights": [], **({"momentum": []} if momentum else {})}

    def compare(kind: str, name: str, n: int, ours: Weights, sign: int = 1):
        for i, matrix in zip(MATRICES, ours, strict=True):
            theirs = oracle[name.format(i)]
            if len(theirs) != updates:
                raise ValueError(f"{name.format(i)}: {len(theirs)} updates in the file, expected {updates}")
            errors[kind].append(largest(sign * matrix.weight.swapaxes(-1, -2), theirs[n]))

    state = None
    for n in range(updates):
        state = read(parameters, _cut(tokens, n * b, (n + 1) * b), state).state
        compare("weights", "w{}_after", n, update.used_weights(loop.update, state.weights, parameters.w0))
        compare("weights", stored, n, state.weights)
        for place in momentum:
            compare("momentum", "m{}_after", n, state.slots[place], sign=-1)
    return {kind: worst(found) for kind, found in errors.items()}


def _shorter_lengths(oracle: Oracle, config: Mapping[str, Any], length: int) -> list[int]:
    """Return the lengths of prefixes of the tokens whose outputs are in the file."""
    in_file = {int(name.removeprefix("o_T")) for name in oracle if name.startswith("o_T")}
    lengths = sorted(in_file.union(config.get("lengths", ())))
    if lengths and not 1 <= lengths[0] <= lengths[-1] <= length:
        raise ValueError(f"outputs of the first {lengths} tokens; expected numbers from 1 to {length}")
    return lengths


def _expect_numbers(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    b = config["chunk"]
    if not isinstance(b, int) or b < 1:
        raise ValueError(f"config: chunk {b!r}; expected a number of tokens, 1 or more")
    if arrays["q"].ndim != 4:
        raise ValueError(f"q: shape {arrays['q'].shape}, expected 4 axes")
    batch, heads, tokens, d_k = arrays["q"].shape
    d_v, d_h = arrays["v"].shape[-1:], arrays["w1"].shape[-1:]
    of_tokens = {"q": (d_k,), "k": (d_k,), "v": d_v, "cotangent": d_v}
    of_weights = {"w0": (*d_h, d_k), "w2": (*d_h, d_k), "w1": (*d_v, *d_h)}
    for name, x in arrays.items():
        weight, _, part = name.partition("_")
        expected = [(batch, heads, tokens, *of_tokens.get(name, ()))]
        if part == "left":
            expected = [(heads, *of_weights[weight][:1], *x.shape[-1:])]
        elif part == "right":
            expected = [(heads, *x.shape[-2:-1], *of_weights[weight][1:])]
        elif weight in of_weights:
            expected = [(*leading, *of_weights[weight]) for leading in ((heads,), (batch, heads))]
        if x.shape not in expected or x.dtype.kind != "f":
            shapes = " or ".join(map(str, expected))
            raise ValueError(f"{name}: shape {x.shape} of {x.dtype}, expected {shapes} of floating point numbers")


def _cut(tokens: Tokens, start: int, end: int) -> Tokens:
    return jax.tree.map(lambda x: x[:, start:end], tokens)
