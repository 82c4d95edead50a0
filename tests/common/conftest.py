import pytest

from mgcc_dist.common.log import PACKAGE


@pytest.fixture
def logging_restored():
    """Undo what a test does to the package's logger."""
    before = PACKAGE.handlers[:], PACKAGE.level, PACKAGE.propagate
    yield
    PACKAGE.handlers[:], PACKAGE.propagate = before[0], before[2]
    PACKAGE.setLevel(before[1])
