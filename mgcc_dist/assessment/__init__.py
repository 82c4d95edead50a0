"""Evaluation of synthetic images: features, quality metrics, memorization audit, curation."""
