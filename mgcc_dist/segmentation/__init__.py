"""The training task of `mgcc segment`: a method on a data set, its batches and its scores."""
