"""Metrics, per-image scores, statistics and galleries of segmentation networks."""
