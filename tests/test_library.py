"""Run the code blocks of docs/library.md, one after the other."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ttt_jax import config
from ttt_jax.ttt import primal
from ttt_jax.ttt.inner_loop import initial_state

pytestmark = pytest.mark.slow  # the blocks compile for a quarter of a minute
ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def found(tmp_path_factory, save_run) -> dict:
    """Run all blocks, with their assertions, and return their variables."""
    c, folder = config.default(), tmp_path_factory.mktemp("library")
    c.model.width, c.model.num_heads, c.model.num_layers, c.model.mlp_width = 8, 2, 1, 8
    save_run(folder / "runs" / "a", c)
    (folder / "blocks.py").write_text("\n".join(BLOCKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path("blocks.py")


def arrays(tree) -> list[np.ndarray]:
    """Return the leaves of a tree, which must be plain arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: not isinstance(x, (dict, tuple)))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    return [np.asarray(leaf) for leaf in leaves]


def test_gradients_of_the_inner_loop_reach_every_parameter(found):
    assert all(np.abs(x).max() > 0 for x in arrays(found["gradient"]))


def test_the_learner_equals_its_primal_form(found, quick_jit, assert_close):
    own, parameters = found["own"], found["Parameters"](found["w0"], found["constants"], np.ones(16))
    tokens = found["tokens_of_own"]
    state = initial_state(found["w0"], len(tokens.q), own.update)
    expected, _ = quick_jit(primal.run, static_argnums=0)(own, parameters, tokens, state)
    assert_close(found["of_own"], expected, 1e-5)
    assert np.abs(found["of_own"] - found["z"]).max() > 0.01


def test_the_nnx_model_equals_the_linen_model(found, assert_close):
    """Check that both give the same outputs with the same parameters, which are plain arrays."""
    assert arrays(found["params"])
    state = nnx.state(found["nnx_block"], nnx.Param)
    theirs = jax.tree.map(lambda x: x[...], nnx.to_pure_dict(state))
    assert jax.tree.map(np.shape, theirs["mixer"]) == jax.tree.map(np.shape, found["params"]["mixer"])
    y, _ = found["apply"]({"params": theirs}, found["x"])
    assert_close(nnx.jit(lambda block, x: block(x))(found["nnx_block"], found["x"]), y)
    assert np.isfinite(jax.tree.leaves(found["of_nnx"])[0]).all()


def test_a_run_is_loaded_in_three_lines_and_sampled(found):
    (code,) = (block for block in BLOCKS if "trained.load" in block)
    assert (
        len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 4
    )  # with the tokens
    run, tokens = found["trained_run"], found["tokens"]
    logits = np.asarray(run.model.apply({"params": run.params}, tokens)[0], np.float64)[0, :-1]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(15), np.asarray(tokens)[0, 1:]]
    np.testing.assert_allclose(found["nll"], nll[None], rtol=1e-4)
    assert len(found["text"]) == 8
    assert all(0 <= token < 258 for token in found["text"])
