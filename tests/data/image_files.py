"""Write image and mask files for the reader tests."""

import struct
import zlib

import numpy as np
from PIL import Image


def write_image(path, size=(30, 20), value=None, seed=0):
    """Write an image of noise, or of a constant value, with `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(noise if value is None else np.full_like(noise, value)).save(path)


def write_box_mask(path, box, size=(30, 20)):
    """Write a mask with a box (x0, y0, x1, y1) of 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)


def bad_file_messages(reader):
    """The reader's bad files as "name: reason"."""
    return [f"{bad.path.name}: {bad.reason}" for bad in reader.bad_files]


def write_png_of_16_bits(path, pixels):
    """Write [H,W,3] or [H,W,4] as PNG with 16 bits per channel, which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)
    return path
