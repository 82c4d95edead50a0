"""The models that come with the package: complete, small, readable without pickle, with a card, and of use."""

import numpy as np
import pytest
from PIL import Image
from predict_runs import read_csv

import mgcc_dist as mgcc
from mgcc_dist import evaluate, predict
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.phantom import draw
from mgcc_dist.evaluation.temperature import read_temperature
from mgcc_dist.inference.model_folder import FILES, read_model, verify_model
from mgcc_dist.train.initial_weights import shipped_models

LARGEST = 10_000_000


def test_there_is_one():
    assert "busi-small" in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_complete_and_small_and_has_a_card(name):
    folder = shipped_models()[name]
    info = verify_model(folder)
    assert {path.name for path in folder.iterdir()} <= set(FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST
    assert 0.2 < read_temperature(info) < 5
    assert read_model(folder)["name"] == name
    assert len(info["commit"]) == 12  # of a clean checkout
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (
        *("Research use only. Not a medical device.", "Al-Dhabyani", "CC BY 4.0", "95 % intervals", "## Limitations"),
        *("### BUSI, test images of `busi_test_1`", "### BUS-BRA", "mgcc segment --config training.yaml"),
    ):
        assert text in card


def test_a_temperature_is_not_written_into_the_package(tmp_path):
    words = ["--models", "busi-small", "--shards", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"^--fit-temperature: busi-small is a part of this package, .* Export it by"):
        evaluate.main([*words, "--split", "busi_test_1", "--fit-temperature"])


def test_the_shipped_model_segments_a_phantom(tmp_path):
    phantom = draw(0, 9, 160)
    Image.fromarray(phantom.image).save(tmp_path / "phantom.png")
    words = ["--model", "busi-small", "--out", str(tmp_path / "out"), "--calibrated", "--workers", "0"]
    predict.main([str(tmp_path / "phantom.png"), *words, "--precision", "no"])
    (row,) = read_csv(tmp_path / "out" / "predictions.csv")
    assert (row["lesion"], row["width"]) == ("yes", "160")
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "phantom.png")) > 0
    truth = phantom.mask > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.5
    np.testing.assert_array_equal(mgcc.load("busi-small", precision="no").predict(phantom.image).mask, mask)
