"""The parts of a model's parameters, counted from the sizes in its config."""

import jax
import pytest

from ttt_jax import config as config_lib
from ttt_jax.models import parameter_count
from ttt_jax.models.build import language_model


def shapes(**keys):
    model = config_lib.default().model
    model.update({"vocab_size": 50, "width": 64, "num_layers": 3, "num_heads": 4, "mlp_width": 96, **keys})
    tokens = jax.ShapeDtypeStruct((1, 16), "int32")
    return jax.eval_shape(language_model(model).init, jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize("tied", [True, False])
def test_transformer(tied):
    expected = {"embedding": 50 * 64, "mixers": 3 * 4 * 64 * 64, "feed-forward": 3 * 3 * 64 * 96}
    expected |= {} if tied else {"head": 64 * 50}
    expected["norms and convolutions"] = 3 * 2 * 64 + 64
    assert parameter_count.by_part(shapes(mixer="attention", tie_embeddings=tied)) == expected


def test_ttt_mlp():
    params = shapes(mixer="ttt_mlp")
    found = parameter_count.by_part(params)
    of_a_head = 16 * 64 + 64 + 64 * 16 + 16 + 2 * 16  # two layers with biases, and the scale and bias of the norm
    rates = 64 * 4 + 4 + 16  # eta and its bias by head, tau by position of a mini-batch
    assert found["W0 of inner loops"] == 3 * 4 * of_a_head
    assert found["mixers"] == 3 * (4 * 64 * 64 + rates)
    assert sum(found.values()) == sum(x.size for x in jax.tree.leaves(params))


def test_in_words():
    counts = {"embedding": 3, "layers": {"mlp": {"up": {"kernel": 4096}}}}
    params = jax.tree.map(lambda n: jax.ShapeDtypeStruct((n,), "float32"), counts)
    assert parameter_count.in_words(params) == "feed-forward 4,096, embedding 3"
