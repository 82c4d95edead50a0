"""Readers: one file per dataset, plus the shared reader, layout and lists."""
