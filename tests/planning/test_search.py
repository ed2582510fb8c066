"""Check which choices a search tries, and in which order, without compiling."""

from types import SimpleNamespace

import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.planning import search
from ttt_jax.planning.plan import CompilerError, Memory


def devices(count, kind="TPU v5 lite"):
    return [SimpleNamespace(device_kind=kind)] * count


@pytest.fixture
def larger(config):
    """Return a config with 16 rows of 4096 tokens, for which compute takes longer than memory."""
    config.model.update(width=1024, mlp_width=2048, num_layers=5, vocab_size=1000, dtype="bfloat16")
    config.data.update(sequence_length=4096, batch_size=16)
    return config


@pytest.fixture
def config():
    c = config_lib.default()
    c.model.update(mixer="attention", width=64, num_heads=4, num_layers=2, mlp_width=128)
    c.data.update(sequence_length=64, batch_size=8)
    return c


def test_choices_split_devices_rows_and_heads(config):
    choices = [guess.choice for guess in search.guesses(config, devices(16))]
    assert len(choices) == len(set(choices))
    assert {(c.data * c.fsdp, c.tensor) for c in choices} == {(8, 2), (4, 4)}  # of 8 rows and 4 heads
    assert {c.accumulation for c in choices if c.tensor == 4} == {1, 2}
    assert {c.accumulation for c in choices if c.tensor == 2} == {1}
    assert {c.remat for c in choices} == {"none", "block"}
    assert {c.fsdp for c in choices if c.tensor == 4} == {1, 2, 4}
    for choice in choices:
        config_lib.validate(search.with_choice(config, choice))
        config_lib.mesh_shape(search.with_choice(config, choice), 16)


def test_memory_of_an_inner_loop_counts_w0_and_what_its_update_remembers(config):
    config.model.update(mixer="ttt", num_layers=3)  # four heads of 16
    config.model.ttt.update({"learner": "swiglu", "bias": False})
    chips = devices(1)

    def memory(update):
        config.model.ttt.update({"update": update})
        return {guess.choice: guess.memory for guess in search.guesses(config, chips)}

    w0 = 4 * 3 * 16 * 64
    of_w0 = memory("sgd")
    config.model.ttt.learner = "linear"
    of_less = memory("sgd")
    config.model.ttt.learner = "swiglu"
    for choice, with_momentum in memory("momentum").items():
        tokens = 8 * 64 / choice.accumulation
        kept = 4 * w0 * tokens / 64 * (1 if choice.remat == "block" else 3)  # every 64 tokens
        assert with_momentum - of_w0[choice] == pytest.approx(kept)
        more = 1 - 1 / 12  # of a matrix of 16 x 16
        assert of_w0[choice] - of_less[choice] == pytest.approx((3 * 16 * w0 + kept) * more)


def test_windows_and_shared_heads_change_choices_and_memory(config):
    """Check that tensor divides the heads of keys, and that memory counts the tokens that a token sees."""
    config.model.attention.kernel = "xla"
    chips = devices(8)

    def memory(mixer, **settings):
        config.model.mixer = mixer
        config.model.attention.update(settings)
        found = {guess.choice: guess.memory for guess in search.guesses(config, chips)}
        return {choice: bytes for choice, bytes in found.items() if choice.remat == "none"}

    full = memory("attention")
    windows = memory("sliding + attention", window=16)
    shared = memory("sliding + attention", num_kv_heads=2)
    assert full.keys() == windows.keys()
    assert {choice.tensor for choice in full} == {1, 2, 4}
    assert {choice.tensor for choice in shared} == {1, 2}
    hidden = 48 * 49 / 2  # of the 64 tokens, summed over all tokens: the first 48 keys, less and less
    for choice, of_full in full.items():
        sequences = 8 / choice.data / choice.fsdp / choice.accumulation
        logits = 8 * 4 / choice.tensor * sequences * hidden  # of four heads, with their softmax, in float32
        assert of_full - windows[choice] == pytest.approx(logits)
        if choice in shared:
            of_keys = 2 * 64 * 64  # parameters of half of the projections to keys and values, in two blocks
            assert windows[choice] - shared[choice] == pytest.approx(16 * of_keys / choice.fsdp / choice.tensor)


def test_choices_that_seem_to_fit_come_first(config):
    """Check 3 G parameters in 16 GB: at 16 bytes each, at least 4 chips share them."""
    config.model.update(width=8192, num_heads=4, num_layers=4, mlp_width=16384)
    config.data.batch_size = 16
    guesses = search.guesses(config, devices(16))
    fit = [guess.memory < 15.75 * 2**30 for guess in guesses]
    assert fit == sorted(fit, reverse=True)
    assert 0 < sum(fit) < len(fit)
    for guess, fits in zip(guesses, fit, strict=True):
        if fits:
            assert guess.choice.fsdp * guess.choice.tensor >= 4
    assert guesses[0].seconds == min(guess.seconds for guess in guesses if guess.memory < 15.75 * 2**30)


def test_similar_choices_are_not_tried_in_a_row(larger):
    """Check the order without tensor: longer rings come later, and fsdp over all devices, with its whole sums, last.

    The second of similar choices comes after others that are slower by less than 5%.
    """
    seconds = {guess.choice: guess.seconds for guess in search.guesses(larger, devices(16))}
    found = list(seconds)
    alone = [choice[:2] for choice in found if choice[2:] == (1, "none", 1)]
    assert alone == [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
    second, other = search.Choice(8, 2, 1, "none", 1), search.Choice(8, 1, 2, "none", 2)
    assert seconds[second] < seconds[other] < 1.05 * seconds[second]
    assert found.index(other) < found.index(second)


def test_a_guess_counts_sent_bytes_and_collectives(larger):
    """Check 16 chips at 200 GB/s and 10 us: sums; gathers in bfloat16 with scattered sums; sums of activations."""
    seconds = {g.choice[:3]: g.seconds for g in search.guesses(larger, devices(16)) if g.choice[3:] == ("block", 1)}
    parameters = 5 * (3 * 2048 * 1024 + 4 * 1024**2) + 1000 * 1024
    summed = 2 * 4 * parameters * 15 / 16
    scattered = (2 * 2 + 4) * parameters * 3 / 4 + 2 * 4 * parameters / 4 * 3 / 4
    # In each block one sum over data, two gathers and a sum of seven kernels over fsdp: longer rings take longer.
    alone = 5 * (1 + 15 / 20) * 10e-6
    latency = 5 * (21 + 1) * (1 + 3 / 20) * 10e-6
    assert seconds[4, 4, 1] - seconds[16, 1, 1] == pytest.approx((scattered - summed) / 200e9 + latency - alone)
    activations = 2 * 5 * 5 * 4 * 4096 * 1024 * 2 * 3 / 4  # five sums in each of five blocks, of four rows
    split = 2 * 4 * parameters / 4 * 3 / 4 + activations
    latency = 5 * (5 + 1) * (1 + 3 / 20) * 10e-6
    assert seconds[4, 1, 4] - seconds[16, 1, 1] == pytest.approx((split - summed) / 200e9 + latency - alone)


def tried(monkeypatch, config, most, needed):
    """Return what a search tries where the compiler needs ``needed(config)`` GiB."""

    def plan(config, topology, devices):
        config_lib.mesh_shape(config, len(devices))
        gib = needed(config)
        if gib is None:
            raise ConfigError("mesh.fsdp: does not divide")
        if gib == "fails":
            raise CompilerError("the compiler fails at this program: INTERNAL")
        seconds = SimpleNamespace(total=config.mesh.tensor + 0.1 * (config.model.remat == "block"))
        used = Memory(0, 0, 0, 0, gib * 2**30, 0, 0)
        return SimpleNamespace(
            memory=used, available=16 * 2**30, fits=gib <= 16, step_time=seconds if gib <= 16 else None
        )

    monkeypatch.setattr(search, "plan", plan)
    return search.search(config, "v5e:4x4", devices(16), most)


def test_a_search_ends_after_enough_choices_fit(monkeypatch, config):
    assert len(tried(monkeypatch, config, 3, lambda c: 1)) == 3


def test_the_best_is_the_fastest_that_fits(monkeypatch, config):
    found = tried(monkeypatch, config, 100, lambda c: 17 if c.model.remat == "none" and c.mesh.tensor == 2 else 1)
    choice, _ = search.best(found)
    assert (choice.tensor, choice.remat) == (2, "block")
    assert choice.overrides().startswith(f"--config.mesh.data={choice.data} --config.mesh.fsdp=")
    assert choice.overrides().endswith("--config.model.remat=block --config.training.accumulation=1")


def test_a_search_where_nothing_fits(monkeypatch, config):
    monkeypatch.setattr(search, "MOST_FAILURES", 3)
    found = tried(monkeypatch, config, 2, lambda c: 17)
    assert search.best(found) is None
    assert len(found) == 3


def test_a_search_learns_from_choices_that_do_not_fit(monkeypatch, config):
    """Check that one choice without remat is tried per fsdp where they need a thousand times the guess."""
    guessed = {guess.choice: guess.memory for guess in search.guesses(config, devices(16))}

    def needed(c):
        choice = search.Choice(*c.mesh.values(), c.model.remat, c.training.accumulation)
        return 1 if c.model.remat == "block" else 17 + guessed[choice]

    found = tried(monkeypatch, config, 100, needed)
    without = [one.choice.fsdp for one in found if one.choice.remat == "none"]
    assert sorted(without) == [1, 2, 4, 8]
    assert sum(one.choice.remat == "block" for one in found) == len(guessed) / 2


def test_a_search_goes_on_after_the_compiler_fails(monkeypatch, config):
    found = tried(monkeypatch, config, 4, lambda c: "fails" if c.mesh.tensor == 2 else 1)
    assert {one.choice.tensor for one in found if one.plan is None} == {2}
    assert search.best(found)[0].tensor == 4
    assert search.best(tried(monkeypatch, config, 4, lambda c: "fails")) is None


def test_choices_that_do_not_divide_are_not_compiled(monkeypatch, config):
    found = tried(monkeypatch, config, 2, lambda c: None if c.mesh.fsdp > 1 else 1)
    assert [one.choice.fsdp for one in found] == [1, 1]
