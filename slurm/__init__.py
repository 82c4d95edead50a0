"""Run sweeps on a Slurm cluster or on one machine. `testbed/` is a two-node Slurm on one machine for tests."""
