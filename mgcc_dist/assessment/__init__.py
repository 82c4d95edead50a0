"""Judging synthetic images: features, quality, memorisation audit, curation."""
