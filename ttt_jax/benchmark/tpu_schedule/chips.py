"""What a cycle is: clock, matrix units and memory of the chips whose compiler is asked.

Nobody publishes clocks. They follow from the data sheet's peak and the size of the matrix units, and come out at
1.50 GHz (v5e) and 1.75 GHz (v6e, v5p), which is an assumption: of times trust the ratios first.
"""

import dataclasses

from ttt_jax.distributed.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Clocked:
    """A chip.

    Attributes:
      products: multiply-adds per cycle of all its matrix units: cloud.google.com/tpu/docs has 4 units of 128 x 128 per
        core, v6e 2 of 256 x 256, to each of which its compiler gives 2 rows per cycle.
      cores: that share the work on a chip; the schedule is that of one.
      clock: Hz.
      hbm_bandwidth: bytes/s, of the data sheet.
    """

    name: str
    products: int
    cores: int
    clock: float
    hbm_bandwidth: float


def _clocked(name: str, products: int, cores: int = 1) -> Clocked:
    chip = next(chip for chip in CHIPS if chip.name == name)
    return Clocked(name, products, cores, chip.peak_flops / (2 * products), chip.hbm_bandwidth)


CLOCKED = {
    "v5e": _clocked("v5e", 4 * 128 * 128),
    "v6e": _clocked("v6e", 2 * 256 * 256 * 2),
    "v5p": _clocked("v5p", 2 * 4 * 128 * 128, cores=2),
}
