"""Check models of several kinds of block against their blocks, applied one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ttt_jax import config as config_lib
from ttt_jax.mixers.mixer import Context
from ttt_jax.models import language_model, pattern, stack
from ttt_jax.training.loss import token_nll

VOCAB, TOKENS = 11, np.random.default_rng(0).integers(0, 11, (2, 10))
# Seven blocks: the pattern twice, and one block of a third repetition.
HYBRID = "attention(channel=none)*2 + ttt_linear(channel=swiglu + swiglu, norms=pre_post, mini_batch=4)"


def config(mixer, blocks, **options):
    c = config_lib.default()
    sizes = {"vocab_size": VOCAB, "width": 8, "num_heads": 2, "mlp_width": 12, "num_layers": blocks}
    c.model.update({**sizes, "mixer": mixer, **options})
    config_lib.validate(c)
    return c


@pytest.fixture(scope="module")
def hybrid(random_params):
    """Return a config, its model and parameters for it."""
    c = config(HYBRID, 7)
    model = language_model.build_model(c.model)
    return c, model, random_params(model, TOKENS, stddev=0.3)


def blocks_of(c):
    """Return the module of each block, in order, and the mixer of each."""
    kinds = [run.model for run in pattern.blocks(c.model)]
    return [language_model._block(kind)() for kind in kinds], [kind.mixer for kind in kinds]


@pytest.mark.slow
def test_a_model_matches_its_blocks_one_after_the_other(hybrid, quick_jit, assert_close):
    """Compare the outputs of all blocks, and the statistics of inner loops."""
    c, model, params = hybrid
    blocks, mixers = blocks_of(c)

    @quick_jit
    def whole(params):
        return model.apply({"params": params}, TOKENS, mutable=["hidden_states", "statistics"])[1]

    @quick_jit
    def one_by_one(params):
        h, found = params["embedding"][TOKENS], []
        for block, own in zip(blocks, model.by_block(params), strict=True):
            (h, _), filled = block.apply({"params": own}, h, mutable=["statistics"])
            found.append((h, filled.get("statistics", {})))
        return found

    filled, expected = whole(params), one_by_one(params)
    hidden, statistics = (model.by_block(filled[name]) for name in ("hidden_states", "statistics"))
    assert [bool(found) for found in statistics] == [name.startswith("ttt") for name in mixers]
    for found, (h, _) in zip(hidden, expected, strict=True):
        assert_close(found["h"], h, 1e-5)
    for found, (_, own) in zip(statistics, expected, strict=True):
        assert_close(found, own, 1e-4)


def test_pieces_match_the_whole_sequence(hybrid, quick_jit, assert_close):
    _, model, params = hybrid
    apply = quick_jit(lambda params, tokens, state=None: model.apply({"params": params}, tokens, state))
    state, logits = model.initial_state(2, TOKENS.shape[1]), []
    axes = model.state_axes()
    jax.tree.map(lambda x, names: np.testing.assert_equal(x.ndim, len(names)), state, axes)
    for piece in (TOKENS[:, :5], TOKENS[:, 5:]):
        y, state = apply(params, piece, state)
        logits.append(y)
    assert_close(np.concatenate(logits, 1), apply(params, TOKENS)[0], 1e-5)


@pytest.mark.slow
def test_remat_does_not_change_gradients(hybrid, quick_jit, assert_close):
    _, model, params = hybrid
    other = language_model.build_model(config(HYBRID, 7, remat="block").model)
    loss = lambda model: lambda params: token_nll(model.apply({"params": params}, TOKENS)[0], TOKENS).mean()  # noqa: E731
    expected, found = (quick_jit(jax.value_and_grad(loss(m)))(params) for m in (model, other))
    assert_close(found, expected, 1e-5)


def test_equal_kinds_spelled_differently_match_the_uniform_model(random_params, quick_jit, assert_close):
    """Compare with the parameters of the uniform model, rearranged."""
    uniform = language_model.build_model(config("attention", 5).model)
    apart = language_model.build_model(config("attention + attention(norms=pre)", 5).model)
    params = random_params(uniform, TOKENS, stddev=0.3)
    split = dict(params)
    layers = split.pop("layers")
    split["segment_0"] = {f"attention_{j}": jax.tree.map(lambda x, j=j: x[j:4:2, None], layers) for j in range(2)}
    split["segment_1"] = {"attention_0": jax.tree.map(lambda x: x[None, 4:], layers)}
    expected = quick_jit(lambda p: uniform.apply({"params": p}, TOKENS)[0])(params)
    assert_close(quick_jit(lambda p: apart.apply({"params": p}, TOKENS)[0])(split), expected, 1e-6)
    for a, b in zip(uniform.by_block(params), apart.by_block(split), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    def equations(jaxpr):
        return sum(1 + sum(map(equations, jaxprs_in_params(each.params))) for each in jaxpr.eqns)

    def count(blocks):
        model = language_model.build_model(config("attention*3 + ttt_linear", blocks).model)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        return equations(jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS)[0])(params).jaxpr)

    assert count(8) == count(48) > 100


@pytest.mark.slow
def test_padding_does_not_change_the_residual_stream(random_params, quick_jit):
    """Check that nothing is added at padding, so that nothing there can become infinite."""
    model = language_model.build_model(config(HYBRID, 3).model)
    valid = np.ones(TOKENS.shape, bool)
    valid[:, -3:] = False

    @quick_jit
    def read(params):
        return model.apply({"params": params}, TOKENS, None, Context(valid=jnp.asarray(valid)), mutable="hidden_states")

    _, filled = read(random_params(model, TOKENS, stddev=0.3))
    for found in model.by_block(filled["hidden_states"]):
        np.testing.assert_array_equal(found["h"][:, -3:], filled["hidden_states"]["embedding"][:, -3:])


def test_a_uniform_model_stacks_its_layers_without_segments():
    model = language_model.build_model(config("attention*2", 3).model)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert set(params) == {"embedding", stack.LAYERS, "final_norm"}
    assert {x.shape[0] for x in jax.tree.leaves(params[stack.LAYERS])} == {3}
