"""What `mgcc_dist.segment` trains: a method on a data set, its batches and its scores."""
