"""How a run reaches machines that are elsewhere: TPU pods, clusters, containers."""
