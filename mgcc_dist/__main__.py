"""`python -m mgcc_dist` is the `mgcc` command."""

from mgcc_dist.cli import main

main()
