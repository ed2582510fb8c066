"""Hold every mixer that is listed to what is asked of mixers; one more is tested by being listed.

What padding, documents and pieces must not change is compared with the plain program of training: each document alone,
from its first token, without a state.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inner_loops import POINTS
from jax.sharding import PartitionSpec

from ttt_jax import config as config_lib
from ttt_jax.mixers import MIXERS
from ttt_jax.mixers.mixer import Context

ROWS, WIDTH, HEADS = 3, 8, 2
PIECE = 6  # tokens
TOKENS = 2 * PIECE
SECTIONS = {"ttt": {"mini_batch": 4}, "sliding": {"window": 3}}  # more than one of each in a piece
CASES = {
    **{name: (name, {}) for name in MIXERS},
    **{f"{name}-transformer": (name, {"backbone": "transformer"}) for name in ("ttt_linear", "ttt_mlp")},
    **{f"ttt-{point}": ("ttt", choices) for point, choices in POINTS.items()},
}
del CASES["ttt"]  # the same as ttt_linear


# Whose gradients take seconds to compile, and that differ from faster ones in what other tests look at.
# tests/ttt/test_scan_rows.py has padding and documents for all inner loops; here is what a layer puts around them.
SLOW = {"ttt_linear-transformer", "ttt_mlp", "ttt_mlp-transformer", "ttt-lact", "ttt-decay"}
mostly_fast = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else [])
        for case in CASES
        if case not in ("ttt_mlp-transformer", "ttt-lact")
    ],
)
one_that_learns = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if MIXERS[name].learns else [])
        for case, (name, _) in CASES.items()
        if case == "ttt_linear" or not MIXERS[name].learns
    ],
)
every_mixer = pytest.mark.parametrize("case", CASES)


def position(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    (found,) = (x for path, x in leaves if jax.tree_util.keystr(path, simple=True, separator="/").endswith("position"))
    return found


@functools.cache
def mixer(case, dtype="float32"):
    name, choices = CASES[case]
    model = config_lib.default().model
    model.update(mixer=name, width=WIDTH, num_heads=HEADS, dtype=dtype)
    if section := MIXERS[name].section:
        model[section].update({**SECTIONS.get(section, {}), **choices})
    MIXERS[name].check(model)
    return MIXERS[name].module(model)()


@pytest.fixture(scope="module")
def params_of(random_params):
    def draw(case):
        params = random_params(mixer(case), np.zeros((1, TOKENS, WIDTH), np.float32))
        if "tau" in params:
            params["tau"] *= 0.2  # no place in a mini-batch has a rate of 0
        return params

    return functools.cache(draw)


class Masks(NamedTuple):
    """Say which tokens are valid, and with which documents begin: [B, T] each, or None for all and for none."""

    valid: np.ndarray | None
    reset: np.ndarray | None

    def documents(self):
        """The places (row, token) of each document."""
        found = []
        for row in range(ROWS):
            document = []
            for t in range(TOKENS):
                if self.valid is not None and not self.valid[row, t]:
                    continue
                if self.reset is not None and self.reset[row, t] and document:
                    found.append(document)
                    document = []
                document.append((row, t))
            found.append(document)
        return [document for document in found if document]

    def positions(self, end):
        """Return how many valid tokens the document has that each row is in after so many tokens."""
        found = []
        for row in range(ROWS):
            valid, reset = self.valid[row, :end], self.reset[row, :end]
            begin = max((t for t in range(end) if valid[t] and reset[t]), default=0)
            found.append(valid[begin:].sum())
        return found


def masks():
    """Padding and documents of many kinds, by name."""
    t = np.arange(TOKENS)
    nowhere, everywhere = np.zeros((ROWS, TOKENS), bool), np.ones((ROWS, TOKENS), bool)
    left, right = t >= np.array([[0], [5], [11]]), t < np.array([[12], [7], [1]])
    starts = nowhere.copy()
    starts[:, [0, PIECE]] = True
    found = {
        "nothing": Masks(everywhere, nowhere),
        "padding on the left": Masks(left, nowhere),
        "padding on the right": Masks(right, nowhere),
        "padding within": Masks((t % np.array([[2], [3], [4]])) > 0, nowhere),
        "rows and pieces of padding": Masks((t >= PIECE) & np.array([[True], [True], [False]]), nowhere),
        "documents of one token": Masks(everywhere, everywhere),
        "documents that begin with pieces": Masks(left, starts),
        "resets at padding": Masks(left & right, ~(left & right)),
    }
    for seed in range(6):
        rng = np.random.default_rng(seed)
        density = rng.random((2, ROWS, 1))
        found[f"any, {seed}"] = Masks(*(rng.random((2, ROWS, TOKENS)) < density * [[[1.5]], [[0.7]]]))
    return found


MASKS = masks()
RNG = np.random.default_rng(0)
X, COTANGENT = RNG.standard_normal((2, ROWS, TOKENS, WIDTH)).astype(np.float32)


def with_gradients(run):
    """Outputs, the gradients of a weighted sum of them with respect to the parameters and the input, and what else the
    function returns."""

    def function(params, *arrays):
        def loss(params, x):
            y, more = run(params, x, *arrays)
            return (y * COTANGENT).sum(), (y, more)

        gradients, (y, more) = jax.grad(loss, (0, 1), has_aux=True)(params, X)
        return y, gradients, more

    return function


@pytest.fixture(scope="module")
def alone(quick_jit, params_of):
    """``alone(case, masks)``: what each document gives by itself, in the program of training; 0 at padding."""

    def compiled(case):
        def run(params, x, places):  # [N, T], numbers of tokens
            flat = jnp.concatenate([x.reshape(-1, WIDTH), jnp.ones((1, WIDTH))])  # with one behind documents
            y, _ = mixer(case).apply({"params": params}, flat[places])
            return jnp.zeros_like(flat).at[places].set(y)[:-1].reshape(x.shape), None

        return quick_jit(with_gradients(run))

    compiled = functools.cache(compiled)

    def expected(case, masks):
        places = np.full((ROWS * TOKENS, TOKENS), ROWS * TOKENS)
        for i, document in enumerate(masks.documents()):
            places[i, : len(document)] = [row * TOKENS + t for row, t in document]
        return compiled(case)(params_of(case), places)

    return expected


@pytest.fixture(scope="module")
def read(quick_jit, params_of):
    """``read(case, masks, pieces)``: the rows as they are, in one go or in two pieces with a state."""

    def compiled(case, pieces, remat=False):
        def whole(params, x, valid, reset):
            return mixer(case).apply({"params": params}, x, None, Context(valid, reset))

        def in_pieces(params, x, valid, reset):
            state, found, positions = mixer(case).initial_state(ROWS, WIDTH, TOKENS), [], []
            for piece in (np.s_[:, :PIECE], np.s_[:, PIECE:]):
                context = jax.tree.map(lambda x, piece=piece: x[piece] if np.ndim(x) else x, Context(valid, reset))
                y, state = mixer(case).apply({"params": params}, x[piece], state, context)
                found.append(y)
                positions.append(position(state))
            return jnp.concatenate(found, 1), jnp.stack(positions)

        run = in_pieces if pieces else whole
        return quick_jit(with_gradients(jax.checkpoint(run) if remat else run))

    compiled = functools.cache(compiled)
    return lambda case, masks, pieces=False, remat=False: compiled(case, pieces, remat)(params_of(case), *masks)


def assert_same(found, expected):
    """Compare outputs and gradients: relative to the largest value of each array, or to 1 % of the largest gradient,
    since those of Muon's rates are nearly zero, the differences of what is larger."""
    y, gradients, _ = expected
    least = max(np.abs(g).max() for g in jax.tree.leaves(gradients)) / 100

    def check(found, expected, least=0.0):
        size = max(np.abs(expected).max(), least)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * size, equal_nan=False)

    check(found[0], y)
    jax.tree.map(functools.partial(check, least=least), found[1], gradients)


# ---- What each token hears of


def influence(quick_jit, f):
    """|d output[t] / d input[s]|, [T, T]."""
    x, direction = (a[0, :PIECE] for a in (X, COTANGENT))
    jacobian = quick_jit(jax.jacrev(lambda x: (f(x[None])[0] * direction).sum(-1)))(x)  # [T, T, D]
    return np.abs(jacobian).max(-1)


@every_mixer
def test_a_token_hears_of_those_before_it_and_of_itself(params_of, quick_jit, case):
    found = influence(quick_jit, lambda x: mixer(case).apply({"params": params_of(case)}, x)[0])
    t = np.arange(PIECE)
    heard = t <= t[:, None]
    np.testing.assert_array_equal(found[~heard], 0)
    if CASES[case][0] == "sliding":
        window = t > t[:, None] - SECTIONS["sliding"]["window"]
        np.testing.assert_array_equal(found[~window], 0)
        heard &= window
    assert found[heard].min() > 1e-6


# ---- Padding, documents, pieces


@pytest.mark.parametrize("masks", MASKS)
@mostly_fast
def test_pieces_with_padding_and_documents_are_each_document_alone(alone, read, case, masks):
    """Outputs, which are 0 at padding, and gradients, to which padding adds nothing; cut within documents. Positions at
    the ends of pieces are those in the last document."""
    found = read(case, MASKS[masks], pieces=True)
    assert_same(found, alone(case, MASKS[masks]))
    for positions, end in zip(found[2], (PIECE, TOKENS), strict=True):
        np.testing.assert_array_equal(positions, MASKS[masks].positions(end))


@pytest.mark.parametrize("masks", MASKS)
@mostly_fast
def test_sequences_with_padding_and_documents_are_each_document_alone(alone, read, case, masks):
    """Read as above, without a state: in training."""
    assert_same(read(case, MASKS[masks]), alone(case, MASKS[masks]))


@pytest.mark.parametrize("only", Masks._fields)
@pytest.mark.parametrize("pieces", [False, True])
@one_that_learns
def test_padding_or_documents_alone(alone, read, case, only, pieces):
    """Take what is not said as if nothing were padding, or no document began."""
    one = MASKS["any, 1"]._replace(**{"reset" if only == "valid" else "valid": None})
    assert_same(read(case, one, pieces), alone(case, one))


@every_mixer
def test_pieces_cut_anywhere_are_one_go(quick_jit, params_of, assert_close, case):
    """In the middle of mini-batches and windows; two pieces are of one token."""
    step = quick_jit(lambda params, *arguments: mixer(case).apply({"params": params}, *arguments))
    whole, no_state = step(params_of(case), X)
    assert no_state is None
    state, found = mixer(case).initial_state(ROWS, WIDTH, TOKENS), []
    begin = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for piece in np.split(X, [5, 6, 7], axis=1):
        y, state = step(params_of(case), piece, state)
        found.append(y)
    assert_close(np.concatenate(found, 1), whole, 1e-5)
    np.testing.assert_array_equal(position(state), TOKENS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == begin


# ---- States


@every_mixer
def test_a_state_names_its_axes(case):
    """One name for each, rows where it says so, and of one size but where an axis is called time."""

    def shapes(rows, length):
        return jax.eval_shape(lambda: mixer(case).initial_state(rows, WIDTH, length))

    state, axes = shapes(ROWS, TOKENS), mixer(case).state_axes()
    assert jax.tree.structure(state) == jax.tree.structure(axes)
    assert position(state).shape == (ROWS,)
    assert position(state).dtype == jnp.int32
    assert position(axes) == PartitionSpec("batch")

    def check(axes, this, more_rows, longer):
        assert len(axes) == this.ndim
        expected = {
            "batch": (ROWS, 2 * ROWS, ROWS), "time": (TOKENS, TOKENS, 2 * TOKENS), "num_heads": (HEADS, HEADS, HEADS)
        }  # fmt: skip
        for name, sizes in zip(axes, zip(this.shape, more_rows.shape, longer.shape, strict=True), strict=True):
            assert sizes == expected.get(name, (sizes[0],) * 3)
        assert axes[0] == "batch"

    jax.tree.map(check, axes, state, shapes(2 * ROWS, TOKENS), shapes(ROWS, 2 * TOKENS))


# ---- Numbers


@mostly_fast
def test_bfloat16_is_near_float32(params_of, read, quick_jit, case):
    masks = MASKS["any, 0"]

    @quick_jit
    def in_bfloat16(params, x):
        module = mixer(case, "bfloat16")
        return module.apply({"params": params}, x, module.initial_state(ROWS, WIDTH, TOKENS), Context(*masks))[0]

    exact, found = read(case, masks)[0], in_bfloat16(params_of(case), X)
    assert found.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((found.astype(np.float32) - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.1


@pytest.mark.slow
@one_that_learns
def test_remat_changes_nothing(read, case):
    masks = MASKS["any, 2"]
    assert_same(read(case, masks, remat=True), read(case, masks))


@every_mixer
def test_statistics_are_those_of_mixers_that_learn(params_of, case):
    def run():
        return mixer(case).apply({"params": params_of(case)}, X, None, Context(*MASKS["any, 0"]), mutable="statistics")

    _, found = jax.eval_shape(run)
    assert MIXERS[CASES[case][0]].learns == bool(found)
    if found:
        losses = {name: x.shape for name, x in found["statistics"].items() if name.startswith("loss")}
        assert losses == dict.fromkeys(("loss_at_w0", "loss_before", "loss_after"), (ROWS, TOKENS, HEADS))
