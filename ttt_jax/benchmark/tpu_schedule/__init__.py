"""Count the cycles of a program on a TPU, without one, in the schedule that the TPU compiler makes."""
