"""Fused implementations of MGCC's operations, and the plain references they are tested against; needs torch only."""

from pathlib import Path

TABLE_PATH = Path(__file__).parent / "measured.json"
"""benchmark results, see `measured`"""
