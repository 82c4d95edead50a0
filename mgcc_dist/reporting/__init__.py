"""What `mgcc_dist.report` composes: run folders in, one page out."""
