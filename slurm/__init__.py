"""Dispatch of a sweep's runs, to Slurm or on one machine; `testbed/` is a real two-node Slurm for trials and tests."""
