"""Run commands of ttt on machines that are elsewhere: TPU pods, clusters, clouds."""
