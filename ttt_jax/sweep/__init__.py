"""Many runs as one: points of a sweep, their processes, where they stand and how they compare."""
