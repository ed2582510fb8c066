"""Check whole tiny models: reading in pieces, numerics, learners of other shapes, and compile time."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inner_loops import POINTS

from ttt_jax import config as config_lib
from ttt_jax.mixers.mixer import Context
from ttt_jax.models.language_model import build_model

BATCH, VOCAB, WIDTH, HEADS, B = 2, 11, 8, 2, 4
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, 12))
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def build(name="ttt_linear-mamba", ttt=(), **options):
    """Return a model of two layers; ``ttt`` and ``options`` are keys of ``config.model``."""
    config = config_lib.default()
    mixer, backbone, point, *_ = *name.split("-"), "", ""
    sizes = {"vocab_size": VOCAB, "width": WIDTH, "num_layers": 2, "num_heads": HEADS, "mlp_width": 12}
    config.model.update({**sizes, "mixer": mixer, **options})
    config.model.ttt.update({"mini_batch": B, **({"backbone": backbone} if backbone else {})})
    config.model.ttt.update({**POINTS.get(point, {}), **dict(ttt)})
    config_lib.validate(config)
    return build_model(config.model)


@pytest.fixture(scope="module")
def draw(random_params):
    """Return a function that draws parameters with every norm near 1, and inner rates large enough to matter."""
    return functools.partial(random_params, stddev=0.3)


def applied(quick_jit, model):
    return quick_jit(lambda params, tokens, state=None: model.apply({"params": params}, tokens, state))


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_pieces_cut_inside_mini_batches_match_the_whole_sequence(draw, quick_jit, assert_close):
    """Check convolutions and a TTT layer; tests/mixers checks all mixers, and test_stack.py a stack of several."""
    model = build("ttt_linear-mamba")
    params = draw(model, TOKENS)
    apply = applied(quick_jit, model)
    whole, no_state = apply(params, TOKENS)
    assert no_state is None
    assert whole.dtype == jnp.float32

    state, logits = model.initial_state(BATCH, TOKENS.shape[1]), []
    for tokens in np.split(TOKENS, 2, axis=1):
        piece, state = apply(params, tokens, state)
        logits.append(piece)
    assert_close(np.concatenate(logits, axis=1), whole, 1e-5)


@pytest.mark.slow
def test_padding_and_documents_reach_all_parts_of_a_block(draw, quick_jit, assert_close):
    """Compare two documents in a row, and one behind padding, in two pieces, with each document alone.

    The convolutions before the mixers read back over the cut, but not over other documents or padding.
    """
    model = build("ttt_linear-mamba")
    params = draw(model, TOKENS)
    valid, reset = np.ones(TOKENS.shape, bool), np.zeros(TOKENS.shape, bool)
    valid[1, [0, 1, 7]] = False
    reset[0, 4] = True

    @quick_jit
    def read(params, tokens):
        state, logits = model.initial_state(*tokens.shape), []
        for piece in (np.s_[:, :6], np.s_[:, 6:]):
            context = Context(valid=valid[piece], reset=reset[piece])
            y, state = model.apply({"params": params}, tokens[piece], state, context)
            logits.append(y)
        return jnp.concatenate(logits, 1)

    found = read(params, TOKENS)
    documents = [TOKENS[0, :4], TOKENS[0, 4:], TOKENS[1, valid[1]]]
    alone = applied(quick_jit, model)(params, np.stack([np.pad(d, (0, 12 - len(d))) for d in documents]))[0]
    for actual, row, document in zip((found[0, :4], found[0, 4:], found[1, valid[1]]), alone, documents, strict=True):
        assert_close(actual, row[: len(document)], 1e-5)


def test_inner_steps_change_the_logits(draw, quick_jit):
    """Check that the hidden state matters, without which the comparisons of this file would prove little."""
    model = build(ttt={"base_lr_start": 0.0})
    params = draw(model, TOKENS)
    read = quick_jit(lambda scale: model.apply({"params": params}, TOKENS, None, Context(inner_lr_warmup=scale))[0])
    assert np.abs(read(1.0) - read(0.0)).max() > 0.1


@pytest.mark.parametrize("name", [slow("attention"), "ttt_linear-mamba", slow("ttt-transformer-decay")])
def test_bfloat16_compute_keeps_parameters_inner_state_and_logits_in_float32(draw, quick_jit, name):
    model = build(name, dtype="bfloat16")
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    params = draw(model, TOKENS)
    logits, state = applied(quick_jit, model)(params, TOKENS, model.initial_state(BATCH, TOKENS.shape[1]))
    exact, _ = applied(quick_jit, build(name))(params, TOKENS)
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.1, "bfloat16 is used, and is close"
    if name != "attention":
        inner = jax.tree.leaves(state.mixer.inner._replace(position=()))
        assert {x.dtype for x in inner} == {jnp.dtype("float32")}
        assert all(np.isfinite(x).all() for x in inner)


def test_all_layers_of_a_deeper_learner_change_the_logits(draw, quick_jit):
    """Check three dense layers with a hidden width of twice the head width."""
    model = build("ttt_mlp", ttt={"mlp_depth": 3, "mlp_width_factor": 2.0})
    params = draw(model, TOKENS)
    shapes = {k.removeprefix("layers/mixer/"): x.shape for k, x in flat(params).items() if "/inner_" in k}
    d = WIDTH // HEADS
    assert shapes == {
        "inner_kernel_0": (2, HEADS, d, 2 * d),
        "inner_kernel_1": (2, HEADS, 2 * d, 2 * d),
        "inner_kernel_2": (2, HEADS, 2 * d, d),
        "inner_bias_0": (2, HEADS, 1, 2 * d),
        "inner_bias_1": (2, HEADS, 1, 2 * d),
        "inner_bias_2": (2, HEADS, 1, d),
        "inner_norm_scale": (2, HEADS, 1, d),
        "inner_norm_bias": (2, HEADS, 1, d),
    }

    apply = applied(quick_jit, model)
    logits, _ = apply(params, TOKENS)
    assert np.isfinite(logits).all()
    for name in shapes:
        moved = flax.traverse_util.unflatten_dict(
            {
                k: x + 0.1 * k.endswith(name) * np.sin(np.arange(x.size)).reshape(x.shape)
                for k, x in flat(params).items()
            },
            sep="/",
        )
        assert np.abs(apply(moved, TOKENS)[0] - logits).max() > 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "ttt_mlp-mamba"])
def test_size_of_the_program_does_not_grow_with_depth(name):
    """Compare forward and backward passes as given to the compiler, in which the layers are one loop."""

    def program_size(layers):
        model = build(name, num_layers=layers)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        gradient = jax.jit(jax.grad(lambda params: model.apply({"params": params}, TOKENS)[0].sum()))
        return len(gradient.lower(params).as_text())

    assert program_size(8) <= 1.05 * program_size(2)


@pytest.mark.slow
def test_remat_of_blocks_does_not_change_gradients(draw, quick_jit, assert_close):
    params = draw(build("attention"), TOKENS)

    def gradient(remat):
        model = build("attention", remat=remat)
        return quick_jit(jax.grad(lambda p: (model.apply({"params": p}, TOKENS)[0] ** 2).mean()))(params)

    assert_close(gradient("block"), gradient("none"))


def test_initial_parameters_are_those_of_the_paper(quick_jit):
    """Check normal 0.02, and 1 / sqrt(width) for convolutions; biases and tau 0, scales 1; all draws different."""
    model = build("ttt_mlp-mamba", width=64, vocab_size=512, mlp_width=64, tie_embeddings=False)
    params = flat(quick_jit(model.init)(jax.random.key(0, impl="rbg"), TOKENS)["params"])
    for key, x in params.items():
        name = key.rsplit("/", 1)[-1]
        if name.endswith("scale"):
            np.testing.assert_array_equal(x, 1, key)
        elif name == "tau" or "bias" in name:
            np.testing.assert_array_equal(x, 0, key)
        else:
            stddev = 0.5 if "conv" in key else 0.02
            np.testing.assert_allclose(x.std(), stddev, rtol=0.15, err_msg=key)
            np.testing.assert_allclose(x.mean(), 0, atol=0.15 * stddev, err_msg=key)
    assert {"head", "embedding", "layers/mixer/wq/kernel", "layers/conv/kernel"} <= params.keys()
    drawn = [float(x.reshape(-1)[0]) for x in params.values() if x.std() > 0]
    drawn += [float(x[1].reshape(-1)[0]) for k, x in params.items() if k.startswith("layers/") and x.std() > 0]
    assert len(set(drawn)) == len(drawn)


def test_tied_head_is_the_embedding_and_an_untied_one_is_not(draw, quick_jit):
    tokens = TOKENS[:, :3]
    for tied in (True, False):
        model = build("attention", tie_embeddings=tied)
        params = draw(model, tokens)
        run = quick_jit(lambda p, m=model: m.apply({"params": p}, tokens, mutable="hidden_states"))
        (logits, _), extra = run(params)
        head = params["embedding"].T if tied else params["head"]
        assert ("head" in params) is not tied
        np.testing.assert_allclose(logits, extra["hidden_states"]["final"] @ head, atol=1e-5)


def test_hidden_states_and_statistics_are_collected_per_layer(draw):
    model = build("ttt_linear-mamba")
    params = draw(model, TOKENS)
    collections = ["statistics", "hidden_states"]
    _, extra = jax.eval_shape(lambda: model.apply({"params": params}, TOKENS, mutable=collections))
    assert {k: x.shape for k, x in flat(extra["hidden_states"]).items()} == {
        "embedding": (*TOKENS.shape, WIDTH),
        "layers/h": (2, *TOKENS.shape, WIDTH),
        "final": (*TOKENS.shape, WIDTH),
    }
    statistics = extra["statistics"]["layers"]["mixer"]
    by_token = "loss_at_w0", "loss_before", "loss_after", "target_spread", "weight_distance", "eta"
    assert {k: x.shape for k, x in statistics.items()} == {
        **dict.fromkeys(by_token, (2, *TOKENS.shape, HEADS)),
        "w0_norm": (2, HEADS),
        "position_eta": (2, B),
    }
