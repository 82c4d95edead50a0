"""Names of the quality metrics of synthetic images, which assessment/quality.py computes and reports show."""

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage", "spectral_distance")
"""keys of quality.json, in the order of its tables"""
LOWER = {"fid": "FID", "kid": "KID", "spectral_distance": "spectral distance (dB)"}
"""metrics of which lower values are better, and their headings; the others are called by their keys"""
