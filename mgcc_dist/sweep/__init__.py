"""Sweeps: a table of rows x data sets x seeds, and the steps that prepare their data."""
