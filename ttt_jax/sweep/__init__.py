"""Run many trainings as one sweep: its points, their processes, where they stand and how they compare."""
