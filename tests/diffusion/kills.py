"""Kill sampling after some of its images."""

from contextlib import contextmanager

import pytest

from mgcc_dist.data import records


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


@contextmanager
def killed_after(images, monkeypatch):
    """Expect that the code inside is killed: at the image after the first `images`, or by what `killed` replaces."""
    encoded = 0

    def encode(sample, original=records._encode):
        nonlocal encoded
        if encoded == images:
            raise Killed
        encoded += 1
        return original(sample)

    with monkeypatch.context() as patch:
        patch.setattr(records, "_encode", encode)
        with pytest.raises(Killed):
            yield patch
