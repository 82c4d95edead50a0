"""Slurm: today only `testbed/`, a real two-node Slurm on one machine for trials and tests."""
