"""Run the code blocks of README.md."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_jax import config as config_lib

ROOT = Path(__file__).resolve().parents[1]


def code_below(sentence: str) -> str:
    """Return the first block of Python after a sentence of README.md."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text().split(f"\n{sentence}\n")[1], re.DOTALL)[1]


def run(code: str, folder: Path) -> dict:
    """Run a block and return its variables."""
    path = folder / "block.py"
    path.write_text(code)
    return runpy.run_path(str(path))


def statements(code: str) -> int:
    return sum(bool(line.strip()) and not line.startswith(("import", "from", "#")) for line in code.splitlines())


def test_a_run_is_loaded(tmp_path, monkeypatch, save_run):
    monkeypatch.chdir(tmp_path)
    tiny = "--config.model.width=8 --config.model.num_heads=2 --config.model.num_layers=1 --config.model.mlp_width=8"
    config = config_lib.from_arguments(["--config", f"{ROOT}/configs/quickstart.py:attention", *tiny.split()])
    save_run(tmp_path / "runs" / "a", config, (4,), stddev=0.02)
    code = code_below("Load a run in Python:")
    found = run(code, tmp_path)
    assert statements(code) <= 5
    assert found["run"].step == 4
    assert found["logits"].shape == (1, 16, 258)
    loss = -jax.nn.log_softmax(found["logits"])[0, np.arange(15), found["tokens"][0, 1:]].mean()
    assert loss == pytest.approx(np.log(258), abs=0.2)  # the parameters are small


def test_the_layer_works_in_a_flax_model(tmp_path, quick_jit):
    code = code_below("Take the TTT layer into your own Flax model:")
    assert statements(code) <= 5
    block = run(code, tmp_path)["Block"]()
    x = jax.random.normal(jax.random.key(0), (1, 20, 32))
    apply = quick_jit(block.apply)
    variables = quick_jit(block.init)(jax.random.key(1), x)
    assert all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables, is_leaf=lambda x: not isinstance(x, dict))
    )
    y = apply(variables, x)
    assert y.shape == x.shape
    later = apply(variables, x.at[0, 10].set(0.0))
    np.testing.assert_array_equal(later[0, :10], y[0, :10])  # causal
    assert np.abs(later[0, 10:] - y[0, 10:]).max() > 1e-3
