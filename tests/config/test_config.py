"""Check the tree of all keys, the values that are refused with their messages, and the keys that may change."""

import importlib.util
import math
import re

import pytest
from parsing import CONFIGS, error_of, parse

from ttt_jax import config as config_lib
from ttt_jax.mixers import MIXERS
from ttt_jax.ttt.inner_loop import READINGS
from ttt_jax.ttt.learners import LEARNERS
from ttt_jax.ttt.objective import OBJECTIVES
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES
from ttt_jax.ttt.update import MEMBERS

NAMES = list(config_lib.settings())


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- The tree of defaults


def test_defaults_are_valid_and_those_of_the_settings():
    config = config_lib.default()
    assert dict(flat(config.to_dict())) == {key: each.default for key, each in config_lib.settings().items()}
    assert len(set(NAMES)) == len(NAMES)
    config_lib.validate(config)


def test_defaults_cannot_be_misspelt_or_given_another_type():
    config = config_lib.default()
    with pytest.raises((KeyError, AttributeError), match="widht"):
        config.model.widht = 3
    with pytest.raises(TypeError):
        config.model.width = "wide"
    with pytest.raises(TypeError):
        config.model.ttt.base_lr = "fast"  # unset, but a number all the same
    config.model.ttt.base_lr = 0.5
    assert config.model.ttt.base_lr == 0.5


@pytest.mark.parametrize("name", ["quickstart", "benchmark", "books"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_configs_of_the_repository_are_valid_with_every_mixer(name, mixer):
    assert parse(file=f"{CONFIGS / name}.py:{mixer}").model.mixer == mixer


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.py")), ids=lambda path: path.stem)
def test_configs_of_the_repository_show_a_command(path):
    assert "ttt " in importlib.util.spec_from_file_location("c", path).loader.get_source("c")


# ---- What may change


def test_keys_that_may_change_are_those_without_effect_on_results_and_a_few_more():
    names = {key for key in NAMES if key.count(".") < 2 or key.startswith("model.ttt.")}
    no_results = {key for key in names if key.startswith(("checkpoint.", "evaluation.", "log.", "mesh.", "profile."))}
    no_results |= {"training.accumulation", "training.stall_limit", "data.worker_processes", "model.remat"}
    no_results |= {f"model.ttt.{name}" for name in ("kernel", "kernel_check", "remat_group", "unroll")}
    assert {key for key in names if not config_lib.changes_results(key)} == no_results
    assert {key for key in names if config_lib.may_change(key)} == no_results | {
        *("data.source", "data.tokenizer", "model.ttt.learner_source"),  # each is checked apart
        *("training.duration", "optimizer.spike_factor"),
    }


def test_a_key_of_another_version_may_not_change():
    assert not config_lib.may_change("model.gone")
    assert config_lib.changes_results("model.gone")


# ---- One line, which names the key and what would be accepted

REFUSED = [
    # (override, beginning of the message, what it must say of the values accepted)
    ("model.widht=3", "model.widht: unknown key", "model.width?"),
    ("optimiser.peak_lr=3", "optimiser.peak_lr: unknown key", "optimizer.peak_lr?"),
    ("model.width.x=3", "model.width.x: unknown key", "model.width?"),
    ("model=3", "model=3: is a section", "model.mixer"),
    ("model.ttt=None", "model.ttt=None: is a section", "model.ttt.backbone"),
    ("model.width=wide", "model.width=wide", "an integer"),
    ("model.width=1.5", "model.width=1.5", "an integer"),
    ("model.width=", "model.width=", "an integer"),
    ("model.width=None", "model.width=None", "an integer"),
    ("data.sequence_length=1e3", "data.sequence_length=1e3", "an integer"),
    ("optimizer.peak_lr=fast", "optimizer.peak_lr=fast", "a number"),
    ("model.ttt.base_lr=fast", "model.ttt.base_lr=fast", "a number"),
    ("model.tie_embeddings=maybe", "model.tie_embeddings=maybe", "true or false"),
    ("model.pre_conv=maybe", "model.pre_conv=maybe", "true or false"),
    ("model.mixer=lstm", "model.mixer='lstm'", "ttt_linear, ttt_mlp, ttt, attention"),
    ("model.ttt.backbone=rwkv", "model.ttt.backbone='rwkv'", "mamba, transformer"),
    (
        "model.ttt.learner=mlp",
        "model.ttt.learner='mlp'",
        "expected linear, or model.mixer=ttt, which accepts any choice",
    ),
    ("model.ttt.update=decay", "model.ttt.update='decay'", "expected sgd, or model.mixer=ttt"),
    ("model.ttt.rate_per_matrix=true", "model.ttt.rate_per_matrix=True", "expected False, or model.mixer=ttt"),
    ("model.ttt.reading=previous", "model.ttt.reading='previous'", "expected causal, or model.mixer=ttt"),
    ("model.ttt.learner_source=abc", "model.ttt.learner_source='abc'", "a SHA-256 in 64"),
    (
        f"model.ttt.learner_source={'a' * 64}",
        "model.ttt.learner_source=aaaaaaaaaaaa...: is the hash of a learner",
        "none",
    ),
    ("model.dtype=float16", "model.dtype='float16'", "float32, bfloat16"),
    ("model.remat=full", "model.remat='full'", "none, block"),
    ("model.num_heads=3", "model.num_heads=3: does not divide model.width=128", "a divisor, such as 2"),
    ("model.num_heads=50", "model.num_heads=50: does not divide model.width=128", "a divisor, such as"),
    ("model.num_heads=128", "model.num_heads=128: gives an odd head width, 1", "to be even"),
    ("model.num_heads=0", "model.num_heads=0", "1 or more"),
    ("model.width=0", "model.width=0", "1 or more"),
    ("model.num_layers=0", "model.num_layers=0", "1 or more"),
    ("model.conv_width=0", "model.conv_width=0", "1 or more"),
    ("model.ttt.mini_batch=0", "model.ttt.mini_batch=0", "1 or more"),
    ("model.ttt.unroll=0", "model.ttt.unroll=0", "1 or more"),
    ("model.ttt.remat_group=-1", "model.ttt.remat_group=-1", "0 or more"),
    ("data.sequence_length=0", "data.sequence_length=0", "1 or more"),
    ("data.sequence_length=-5", "data.sequence_length=-5", "1 or more"),
    ("data.batch_size=0", "data.batch_size=0", "1 or more"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0", "1 or more"),
    ("training.accumulation=0", "training.accumulation=0", "1 or more"),
    ("training.accumulation=3", "training.accumulation=3: does not divide data.batch_size=4", "a divisor"),
    ("optimizer.peak_lr=-1e-3", "optimizer.peak_lr=-0.001", "a positive number"),
    ("optimizer.peak_lr=0", "optimizer.peak_lr=0.0", "a positive number"),
    ("optimizer.peak_lr=nan", "optimizer.peak_lr=nan", "a positive number"),
    ("optimizer.peak_lr=inf", "optimizer.peak_lr=inf", "a positive number"),
    ("optimizer.end_lr=-1e-3", "optimizer.end_lr=-0.001", "0 or more"),
    ("optimizer.end_lr=nan", "optimizer.end_lr=nan", "0 or more"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0", "0 or more"),
    ("optimizer.beta1=1", "optimizer.beta1=1.0", "from 0 to below 1"),
    ("optimizer.beta2=nan", "optimizer.beta2=nan", "from 0 to below 1"),
    ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0", "a positive number"),
    ("model.ttt.base_lr=0", "model.ttt.base_lr=0.0", "a positive number"),
    ("model.ttt.base_lr_start=nan", "model.ttt.base_lr_start=nan", "0 or more"),
    ("seed=-1", "seed=-1", "0 to 2^32 - 1"),
    ("seed=4294967296", "seed=4294967296", "0 to 2^32 - 1"),
    ("optimizer.warmup=200", "optimizer.warmup='200'", "less than training.duration='200 steps'"),
    ("optimizer.warmup=100%", "optimizer.warmup='100%'", "less than training.duration='200 steps'"),
    ("optimizer.warmup=819201 tokens", "optimizer.warmup='819201 tokens'", "less than training.duration"),
    ("optimizer.warmup=soon", "optimizer.warmup='soon'", '"300 steps", "2.5e9 tokens", or "10%" of the run'),
    ("training.duration=50%", "training.duration='50%'", '"300 steps" or "2.5e9 tokens"'),
    ("checkpoint.every=101%", "checkpoint.every='101%'", '"10%" of the run'),
    ("checkpoint.milestone_every=x", "checkpoint.milestone_every='x'", '"10%" of the run'),
    ("log.every=0 steps", "log.every='0 steps'", '"300 steps"'),
]


@pytest.mark.parametrize(("override", "beginning", "accepted"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_values_are_named_with_what_is_accepted(override, beginning, accepted):
    message = error_of(parse, override)
    assert message.startswith(beginning)
    assert accepted in message[len(beginning) :]


CHOICES = [
    ("model.ttt.learner=conv", "model.ttt.learner='conv'", "linear, mlp, swiglu, or MODULE:NAME"),
    ("model.ttt.learner=my lab:gated", "model.ttt.learner='my lab:gated'", "linear, mlp, swiglu, or MODULE:NAME"),
    ("model.ttt.learner=mylab.learners:a.b", "model.ttt.learner='mylab.learners:a.b'", "MODULE:NAME, such as"),
    ("model.ttt.objective=huber", "model.ttt.objective='huber'", "squared_error, dot_product"),
    ("model.ttt.rate=tanh", "model.ttt.rate='tanh'", "sigmoid/d, sigmoid, softplus"),
    ("model.ttt.position_rate=2/t", "model.ttt.position_rate='2/t'", "1/t, 1"),
    ("model.ttt.update=sgd + adam", "model.ttt.update='sgd + adam'", "sgd, or some of decay, momentum"),
    ("model.ttt.update=muon", "model.ttt.update='muon'", "expected the reading 'previous'"),
    ("model.ttt.reading=next", "model.ttt.reading='next'", "causal, previous"),
]


@pytest.mark.parametrize(("override", "beginning", "accepted"), CHOICES, ids=[r[0] for r in CHOICES])
def test_refused_choices_of_an_inner_loop(override, beginning, accepted):
    message = error_of(parse, "model.mixer=ttt", override)
    assert message.startswith(beginning)
    assert accepted in message[len(beginning) :]


EDGES = [
    ("optimizer.end_lr=inf", "optimizer.end_lr=inf"),
    ("optimizer.weight_decay=inf", "optimizer.weight_decay=inf"),
    ("model.width[0]=3", "model.width[0]: unknown key"),
    ("training.duration=1e308", "training.duration='1e308'"),
    ("training.duration=1e300 tokens", "training.duration='1e300 tokens'"),
    ("model.width=a\nb", "model.width=a"),
    ("model.ttt.mlp_width_factor=1e308", "model.ttt.mlp_width_factor=1e+308"),
]


@pytest.mark.parametrize(("override", "beginning"), EDGES, ids=[r[0].replace("\n", "-") for r in EDGES])
def test_extreme_values_are_refused(override, beginning):
    assert error_of(parse, "model.mixer=ttt_mlp", override).startswith(beginning)


def test_a_divisor_is_suggested_without_trying_every_number():
    assert "a divisor, such as " in error_of(parse, "model.width=1000000000000001")


def test_an_empty_hidden_layer_is_refused():
    message = error_of(parse, "model.mixer=ttt_mlp", "model.ttt.mlp_width_factor=0.03")
    assert message == "model.ttt.mlp_width_factor=0.03: expected at least 1 / 32"
    assert parse("model.ttt.mlp_width_factor=0.03").model.mixer == "ttt_linear"  # which has no hidden layer


def test_an_mlp_cannot_start_at_zero():
    message = error_of(parse, "model.mixer=ttt_mlp", "model.ttt.learned_w0=false")
    assert message.startswith("model.ttt.learned_w0=False: two or more layers of zeros have zero gradients")
    assert not parse("model.ttt.learned_w0=false").model.ttt.learned_w0


def test_lower_packages_do_not_import_the_config():
    """Check that packages import errors and settings alone, since the config imports the registry of mixers."""
    package = CONFIGS.parent / "ttt_jax"
    for room in ("ttt", "kernels", "layers", "mixers", "models", "distributed", "data"):
        for path in (package / room).rglob("*.py"):
            assert not re.search(r"ttt_jax\.config\b|from ttt_jax import .*\bconfig\b", path.read_text()), path


def test_differing_keys():
    a = {"x": 1, "s": {"y": 2, "only_a": 3}, "t": {"z": math.inf}}
    b = {"x": 1, "s": {"y": 4}, "t": 5}
    assert config_lib.differing_keys(a, b) == {"s.only_a": (3, None), "s.y": (2, 4), "t": ({"z": math.inf}, 5)}
    assert config_lib.differing_keys(a, a) == {}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("model.mixer", MIXERS),
        ("model.ttt.learner", LEARNERS),
        ("model.ttt.objective", OBJECTIVES),
        ("model.ttt.rate", TOKEN_RATES),
        ("model.ttt.position_rate", POSITION_RATES),
        ("model.ttt.update", MEMBERS),
        ("model.ttt.reading", READINGS),
    ],
)
def test_the_meaning_of_a_choice_names_all_registered_values(key, names):
    said = re.split(r"[\s,:;()]+", config_lib.settings()[key].meaning)
    assert [name for name in names if name not in said] == []


# ---- The mesh


def mesh_shape(devices, batch_size=8, accumulation=1, **sizes):
    config = config_lib.default()
    config.mesh.update(sizes)
    config.data.batch_size, config.training.accumulation = batch_size, accumulation
    return config_lib.mesh_shape(config, devices)


def test_mesh_shape_resolves_the_rest():
    assert mesh_shape(1) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh_shape(8, fsdp=2, tensor=2) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_shape(8, data=1, fsdp=-1, tensor=2) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert mesh_shape(6, data=3, fsdp=2, tensor=1, batch_size=12) == {"data": 3, "fsdp": 2, "tensor": 1}
    assert mesh_shape(8, batch_size=16, accumulation=2)["data"] == 8
    assert mesh_shape(6, batch_size=1, data=1, tensor=6)["tensor"] == 6  # which does not split the batch


@pytest.mark.parametrize(
    ("devices", "sizes", "essentials"),
    [
        (8, {"data": 3}, ["mesh.data=3", "8 devices"]),
        (8, {"data": 2}, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=1", "8 devices", "product is 8"]),
        (1, {"tensor": 2}, ["mesh.tensor=2", "1 devices"]),
        (4, {"data": 8}, ["mesh.data=8", "4 devices"]),
        (8, {"fsdp": -1}, ["mesh.fsdp=-1", "mesh.data is -1 too", "one -1 at most"]),
        (8, {"data": 1, "fsdp": -1, "tensor": -1}, ["mesh.tensor=-1", "mesh.fsdp is -1 too"]),
        (8, {"data": 0}, ["mesh.data=0", "a positive number of devices, or -1"]),
        (8, {"tensor": -2}, ["mesh.tensor=-2", "a positive number of devices, or -1"]),
        (8, {"data": 1, "tensor": 8}, ["mesh.tensor=8", "model.num_heads=12", "a divisor"]),
        (8, {"batch_size": 12}, ["data.batch_size=12", "8 devices", "a multiple of 8"]),
        (8, {"batch_size": 4, "data": 2, "fsdp": 4}, ["data.batch_size=4", "8 devices", "mesh.data x mesh.fsdp"]),
        (
            8,
            {"batch_size": 8, "accumulation": 2},
            ["data.batch_size=8", "training.accumulation=2", "a multiple of 16"],
        ),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit_are_refused(devices, sizes, essentials):
    message = error_of(mesh_shape, devices, **sizes)
    assert all(text in message for text in essentials), message
