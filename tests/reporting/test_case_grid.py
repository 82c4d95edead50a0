"""The grid of cases and methods: which rows and images it shows, and its one error."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_runs import image, make, rows_of

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.reporting.sections import case_grid

KEYS = [f"t{i}" for i in range(6)]


def write_shards(folder):
    """Six images: lesions of growing size, and a normal one."""
    samples = []
    for number, key in enumerate(KEYS):
        mask = np.zeros((16, 16), np.uint8)
        mask[4 : 4 + 2 * number, 4:8] = 255
        picture = np.random.default_rng(number).integers(0, 255, (16, 16)).astype(np.uint8)
        meta = {"dataset": "busi", "class": "benign", "group": key, "original_size": [16, 16]}
        samples.append(Sample(key, picture, mask, meta))
    folder.mkdir()
    write_index(folder, "busi", [write_shard(folder / "busi-000000.tar", samples)])


def scored(value=0.5):
    return [image(key, value) for key in KEYS]


def test_each_row_has_one_run_on_the_images_that_most_rows_share(tmp_path):
    make(tmp_path / "unet_half", "unet", "busi_test_1", scored(), labeled=20)
    make(tmp_path / "unet_quarter", "unet", "busi_test_quarter_1", scored(), labeled=10)
    for seed in (1, 2):
        make(tmp_path / f"mt_{seed}", "mt", "busi_test_1", scored(0.1 * seed), seed=seed)
    make(tmp_path / "elsewhere", "mgcc", "busi_fold_1", [image("other", 0.5)])
    columns = case_grid.choose_columns(rows_of(tmp_path))
    assert sorted(run.name for _, run in columns) == ["mt_1", "unet_half"]


def test_the_grid_shows_images_truth_and_every_row_s_contour(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards")
    for method in ("unet", "mt"):
        make(tmp_path / "runs" / method, method, "busi_test_1", scored(), data={"shards": str(tmp_path / "shards")})
    loaded = []

    def load(run, weights, precision):
        loaded.append((run.name, weights))
        return SimpleNamespace(predict=lambda picture: SimpleNamespace(mask=picture > 128))

    monkeypatch.setattr(case_grid.predictor, "load", load)
    section = case_grid.section(rows_of(tmp_path / "runs"))
    assert sorted(loaded) == [("mt", "best"), ("unet", "best")]
    (picture,) = section.pictures
    assert picture.source.startswith("data:image/png;base64,")
    assert "t0 with the contours of mean_teacher (unet), supervised (unet)" in picture.alt  # the normal image is last
    assert any(
        "6 images of busi, split busi_test_1. Chosen from image and ground truth only" in x for x in section.legend
    )
    assert any("One run per row, at its best step: mt, unet" in line for line in section.legend)


def test_rows_without_weights_are_named_and_left_out(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards")
    for method in ("unet", "mt"):
        make(tmp_path / "runs" / method, method, "busi_test_1", scored(), data={"shards": str(tmp_path / "shards")})
    with pytest.raises(UserError, match="--cases: no run has weights that can be read"):
        case_grid.section(rows_of(tmp_path / "runs"))
    real = case_grid.predictor.load
    good = SimpleNamespace(predict=lambda picture: SimpleNamespace(mask=picture > 128))
    monkeypatch.setattr(
        case_grid.predictor, "load", lambda run, *args, **more: good if run.name == "mt" else real(run, *args, **more)
    )
    section = case_grid.section(rows_of(tmp_path / "runs"))
    assert "contours of mean_teacher (unet)" in section.pictures[0].alt
    assert "supervised" not in section.pictures[0].alt
    (note,) = section.notes
    assert note.startswith(f"supervised (unet) is left out: {tmp_path / 'runs' / 'unet' / 'best'}")


def test_another_data_set_in_the_place_of_the_run_s_is_refused(tmp_path):
    write_shards(tmp_path / "shards")
    run = make(tmp_path / "run", "unet", "busi_test_1", scored(), data={"shards": str(tmp_path / "shards")})
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"dataset_sha256": "a" * 64}))
    with pytest.raises(
        UserError, match=r"shards: is not the data set of .*run\. Convert it again, or leave out --cases"
    ):
        case_grid.section(rows_of(tmp_path / "run"))
    with pytest.raises(UserError, match="--cases: no run has scores of single images"):
        case_grid.choose_columns([])
