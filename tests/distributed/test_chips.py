"""Check the table of chips and the look-up by JAX's names of devices."""

from types import SimpleNamespace

import jax
import pytest

from ttt_jax.distributed import chips


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H200", "H200", 989e12),
    ],
)
def test_known_devices_are_found(kind, name, peak):
    chip = chips.of_device(SimpleNamespace(device_kind=kind))
    assert (chip.name, chip.peak_flops) == (name, peak)


def test_other_devices_have_no_chip():
    assert chips.of_device(jax.devices("cpu")[0]) is None
    assert chips.of_device(SimpleNamespace(device_kind="TPU v5 lite pod")) is None


def test_device_kinds_are_unique():
    kinds = [kind for chip in chips.CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_ratios_of_chips_are_plausible():
    """Check ratios, in which a wrong power of ten, or bits for bytes, would show."""
    for chip in chips.CHIPS:
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 700  # operations per byte
        assert 4 < chip.hbm_bandwidth / chip.ici_bandwidth < 12
        assert 4 < chip.hbm / chip.hbm_bandwidth * 1000 < 40  # milliseconds to read all of it
