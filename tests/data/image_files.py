"""Image and mask files for the tests of readers."""

import numpy as np
from PIL import Image


def put(path, size=(30, 20), value=None, seed=0):
    """An image file of noise, or of one value, with `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(noise if value is None else np.full_like(noise, value)).save(path)
    return path


def put_box(path, box, size=(30, 20)):
    """A mask file with a box (x0, y0, x1, y1) of 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)


def problems(reader):
    """What is wrong, from the file's name on."""
    return [f"{bad.path.name} {bad.problem}" for bad in reader.problems]
