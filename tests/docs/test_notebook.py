"""The cells of docs/notebooks/predict.ipynb run as they are, with a run of random weights instead of the tour's."""

import json

import matplotlib.pyplot as plt
from predict_runs import save_run

from mgcc_dist import shards
from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "predict.ipynb"


def test_notebook_goes_from_an_image_to_its_uncertainty(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    save_run(tmp_path / "out" / "tour" / "unet")
    shards.main(["phantom", "--count", "44", "--size", "32", "--out", "out/tour/shards"])
    capsys.readouterr()
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    scope = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"]
            exec(compile("".join(cell["source"]), "predict.ipynb", "exec"), scope)
    plt.close("all")
    assert scope["uncertainty"].shape == scope["mask"].shape == (32, 32)
    printed = capsys.readouterr().out
    for expected in ("pixels of lesion", "longest diameter", "score 0."):
        assert expected in printed
