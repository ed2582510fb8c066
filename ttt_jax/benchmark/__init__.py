"""Measure speed: training steps on this machine, and schedules of the TPU compiler without a TPU."""
