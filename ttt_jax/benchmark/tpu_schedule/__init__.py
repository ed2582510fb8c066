"""Cycles of a program on a TPU, counted in the schedule that its compiler makes; no TPU is needed."""
