import numpy as np
from PIL import Image

from mgcc_dist.assessment.gallery import save_rows


def test_gallery_shows_every_row_in_its_gray_level(tmp_path):
    """Rows of white, gray and black images, the last one incomplete: every gray level is in the picture."""
    rows = {"a": [np.ones((8, 8))] * 3, "b": [np.zeros((8, 8))] * 3, "c": [-np.ones((8, 8))] * 2}
    save_rows(rows, tmp_path / "gallery.png")
    picture = np.asarray(Image.open(tmp_path / "gallery.png").convert("L"))
    thirds = np.array_split(picture, 3)
    assert np.isin(128, thirds[1]) or np.isin(127, thirds[1])
    assert (thirds[2] == 0).mean() > 0.2
    assert (thirds[0] == 0).mean() < 0.1
