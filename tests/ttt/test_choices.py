"""Test every registered learner, objective, rate and update, by its config name, against the primal form in float64.

An entry that is added to a registry is tested here without further changes: ``pytest tests/ttt -k NAME``.
"""

import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.mixers import ttt_loop
from ttt_jax.ttt import primal, scan, update
from ttt_jax.ttt.inner_loop import initial_state
from ttt_jax.ttt.learners import LEARNERS, SwiGLU
from ttt_jax.ttt.objective import OBJECTIVES, dot_product
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES, Rate
from ttt_jax.ttt.update import MEMBERS, Momentum, Muon, Renormalise

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.py"
KEYS = ("learner", "objective", "rate", "position_rate", "update")


def pairs(names):
    """Return the names two by two as chains, the last alone where the number is odd."""
    return [" + ".join(reversed(names[i : i + 2])) for i in range(0, len(names), 2)]


LINEAR = [*(name for name, member in MEMBERS.items() if member.linear), "decay=0.9"]
UPDATES = ["sgd", *pairs(LINEAR), *pairs([name for name in MEMBERS if name not in LINEAR])]
NAMES = [list(names) for names in (LEARNERS, OBJECTIVES, TOKEN_RATES, POSITION_RATES, UPDATES)]
# Compiling takes most of the time, so each program tests a name of every registry, or the first where no more are left.
CHOICES = [[names[i if i < len(names) else 0] for names in NAMES] for i in range(max(map(len, NAMES)))]


@pytest.mark.parametrize(
    "choices",
    [pytest.param(c, id="-".join(c), marks=[pytest.mark.slow] * (c is not CHOICES[0])) for c in CHOICES],
)
def test_registered_choices_equal_the_primal_form(make_case, quick_jit, choices):
    """Compare outputs, final state, and gradients with respect to all parameters, tokens, logits of rates and gates.

    Read six tokens in mini-batches of three, as a piece of a sequence: its last mini-batch has no tokens.
    """
    reading = "causal" if update.is_linear(update.parse(choices[-1])) else "previous"
    small = {"model.width": 8, "model.num_heads": 2, "model.mixer": "ttt", "model.ttt.mlp_width_factor": 1.5}
    chosen = {f"model.ttt.{key}": name for key, name in zip((*KEYS, "reading"), (*choices, reading), strict=True)}
    arguments = [f"--config.{key}={value}" for key, value in {**small, **chosen}.items()]
    loop = ttt_loop.loop(config_lib.from_arguments(["--config", str(CONFIG), *arguments]).model)

    with jax.enable_x64(True):
        _, parameters, tokens = make_case(loop, 6, 3, dtype=np.float64)
        rng = np.random.default_rng(1)
        logits, tau = rng.standard_normal(tokens.eta.shape), 0.3 * rng.standard_normal(3)
        gates = {member.gate: rng.standard_normal(tokens.eta.shape) for member in loop.update if member.gate}
        cotangent = rng.standard_normal(tokens.v.shape)

        def both(*inputs):
            def scalar(run, parameters, tokens, logits, tau, gates):
                parameters = parameters._replace(position_eta=loop.rate.position_eta(3, tau))
                eta = loop.rate.token_eta(logits, 2.0, 1.0, loop.learner.features)
                active = {member.gate: member.activation(gates[member.gate]) for member in loop.update if member.gate}
                state = initial_state(parameters.w0, 2, loop.update)
                z, state = run(loop, parameters, tokens._replace(eta=eta, gates=active), state)[:2]
                return (z * cotangent).sum(), (z, state)

            found = jax.value_and_grad(scalar, (1, 2, 3, 4, 5), has_aux=True)
            still = loop.learner.apply(inputs[0].w0, inputs[0].constants, inputs[1].q.swapaxes(1, 2)).swapaxes(1, 2)
            return found(scan.run, *inputs), found(primal.run, *inputs), still

        actual, expected, still = quick_jit(both)(parameters, tokens, logits, tau, gates)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-8 * max(1, np.abs(y).max(initial=0)))
    (_, (z, _)), (of_parameters, _, of_logits, *_) = expected
    assert np.abs(z - still).max() > 0.1  # the inner steps change the outputs
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves((of_parameters.w0, of_logits)))


def test_example_of_the_docs_is_the_inner_loop_of_lact():
    example = (
        (ROOT / "docs" / "inner-loop.md").read_text().split("ttt train ... ")[1].split("\n\n")[0].replace("\\\n", "")
    )
    loop = ttt_loop.loop(config_lib.from_arguments(["--config", str(CONFIG), *shlex.split(example)]).model)
    assert loop.learner.f == SwiGLU(bias=False)
    assert loop.rate == Rate("softplus", "1", per_matrix=True)
    assert loop.objective is dot_product
    assert loop.update == (Momentum(), Muon(), Renormalise())
    assert loop.reading == "previous"
