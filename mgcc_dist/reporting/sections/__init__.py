"""Sections of the report's page, one file each: `section(...)` returns None where the runs give nothing to show."""
