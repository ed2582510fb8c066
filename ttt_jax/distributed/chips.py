"""List accelerators with what their data sheets say: speed, memory, links."""

import dataclasses

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip; each JAX device is one chip.

    Attributes:
      name: the name in topologies, such as the v5e of ``v5e:16x16``, or the product's.
      device_kinds: the names that JAX gives to its devices.
      peak_flops: dense bfloat16 FLOP/s.
      hbm: bytes that a program may use.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s to and from its neighbours over all links, one direction.
      topology: an example for chips that come in pods, for which training can be planned.
      dcn_bandwidth: bytes/s between slices over the data center network, a chip's share, one direction.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    topology: str | None = None
    dcn_bandwidth: float | None = None


CHIPS = (
    # Google: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, which give the bandwidths of links for both directions
    # together. HBM: what the TPU compiler says is available (libtpu 0.0.52), which is less than the chip has.
    Chip("v4", ("TPU v4",), 275e12, int(30.5 * _GIB), 1228e9, 300e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * _GIB), 819e9, 200e9, "v5e:16x16", 25e9 / 8),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.73 * _GIB), 2765e9, 600e9, "v5p:4x4x4", 50e9 / 8),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.24 * _GIB), 1638e9, 400e9, "v6e:16x16", 100e9 / 8),
    # NVIDIA: the data sheets of A100 and H100 (SXM) and H200, without sparsity; links are NVLink. HBM: three quarters,
    # which is what JAX allocates by default.
    Chip("A100-40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, int(0.75 * 40 * _GIB), 1555e9, 300e9),
    Chip("A100", ("NVIDIA A100-SXM4-80GB",), 312e12, int(0.75 * 80 * _GIB), 2039e9, 300e9),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, int(0.75 * 80 * _GIB), 3350e9, 450e9),
    Chip("H200", ("NVIDIA H200",), 989e12, int(0.75 * 141e9), 4800e9, 450e9),
)


def of_device(device: jax.Device) -> Chip | None:
    """Return the kind of chip of a device; None for CPUs and chips that are not in the table."""
    return next((chip for chip in CHIPS if device.device_kind in chip.device_kinds), None)
