"""Model folders predict as the run that they are of, say what they are, and are found by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from predict_runs import SIZE, files_in, noise, read_csv, save_run, save_with_checkpoint
from safetensors.torch import load_file

import mgcc_dist as mgcc
from mgcc_dist import export, listing, predict
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.evaluation.temperature import BeforeAfter, Temperature, read_temperature, write_temperature
from mgcc_dist.inference.evaluation_inputs import FORMAT, VERSION
from mgcc_dist.inference.loading import run_info
from mgcc_dist.inference.model_folder import in_half_precision, verify_model
from mgcc_dist.inference.uncertainty import Members, load_decoders
from mgcc_dist.methods.config import MultiLevelCrossConsistencyConfig
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.train import initial_weights

NETWORK = MGCCConfig(widths=(2, 4), taps=(1, 2), gates=(True, True, True))
SCORE = {"mean": 0.625, "low": 0.5, "high": 0.75, "images": 8, "clusters": 8}
CONFIG = {"data": {"shards": "/home/me/busi_128", "split": "busi_test_1"}, "loop": {"steps": 2}, "out": "/home/me/run"}


def save_finished(folder):
    """A run of MGCC with its result and checkpoint."""
    save_with_checkpoint(folder, MultiLevelCrossConsistencyConfig(), NETWORK)
    result = {"dataset": "busi", "split": "busi_test_1", "seed": 1, "images": {"labeled": 8}, "synthetic": None}
    result |= {"init": {"weights": "/home/me/model.safetensors", "sha256": "0"}, "environment": {"commit": "abc"}}
    write_json(folder / "result.json", result | {"last": {"summary": {"corrected": {"iou": 0.5}}}})
    write_json(folder / "config.yaml", CONFIG)  # JSON is YAML
    return folder


def to_folder(run, out, *options):
    export.main(["--run", str(run), "--to", "safetensors", "--out", str(out), "--weights", "last", *options])
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and its model folder, with decoders."""
    folder = tmp_path_factory.mktemp("model")
    run = save_finished(folder / "run")
    weights = run / "last" / "model.safetensors"
    fitted = Temperature(2.0, 8, BeforeAfter(0.2, 0.1), BeforeAfter(0.04, 0.02))
    write_temperature(fitted, weights, run_info(weights)["weights_sha256"], "busi_test_1")
    return run, to_folder(run, folder / "tiny", "--decoders")


@pytest.fixture
def copy(exported, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_folder_predicts_as_the_run_with_all_decoders(exported):
    of_run, of_folder = (mgcc.load(each, "last", "cpu", "no") for each in exported)
    image = noise(40, 30)
    np.testing.assert_allclose(of_folder.predict(image).probability, of_run.predict(image).probability, atol=2e-3)
    squares = [of_run.prepare(image).square]
    (expected,), (found,) = (Members(load_decoders(each)).squares(squares) for each in (of_run, of_folder))
    assert len(found) == 3
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert read_temperature(of_folder.info) == 2.0
    known = ("dataset", "split", "seed", "images", "scores", "commit", "network", "method", "image_size")
    assert {key: of_folder.info[key] for key in known} == {key: of_run.info[key] for key in known}


def test_its_files_are_half_as_large_and_name_no_folder_of_the_machine(exported):
    run, folder = exported
    names = ["README.md", "auxiliary.safetensors", "calibration.json", "model.json", "model.safetensors"]
    assert files_in(folder) == names
    for path in folder.iterdir():
        assert b"/home/me" not in path.read_bytes()
        assert path.stat().st_mode & 0o044
    halves, full = load_file(folder / "model.safetensors"), load_file(run / "last" / "model.safetensors")
    assert halves.keys() == full.keys()
    for name, tensor in halves.items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else full[name].dtype)
    assert json.loads((folder / "model.json").read_text())["training"] == {
        **{"data.shards": "busi_128", "data.split": "busi_test_1", "loop.steps": 2}
    }


def test_weights_that_16_bits_do_not_hold_keep_32():
    state = {"large": torch.full((2, 2), 1e6), "small": torch.ones(2, 2), "bias": torch.ones(2)}
    dtypes = {name: tensor.dtype for name, tensor in in_half_precision(state).items()}
    assert dtypes == {"large": torch.float32, "small": torch.float16, "bias": torch.float32}


def test_a_shipped_model_is_found_by_name(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(initial_weights, "ZOO", exported[1].parent)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(40, 30)).save("image.png")
    predict.main(["image.png", "--model", "tiny", "--calibrated", "--workers", "0"])
    (row,) = read_csv(tmp_path / "predictions" / "predictions.csv")
    assert (row["file"], row["width"]) == ("image.png", "40")
    listing.main(["models"])
    assert capsys.readouterr().out.split(maxsplit=1) == [
        *("tiny", f"mgcc by method mgcc, {SIZE} pixels, trained on busi (split busi_test_1)\n")
    ]
    with pytest.raises(
        UserError, match=r"^tinny: does not exist\. Did you mean tiny\? .* or a shipped model \(tiny\)\.$"
    ):
        mgcc.load("tinny")


def test_run_and_model_are_one_option_and_images_are_given_once():
    with pytest.raises(UserError, match=r"^--model: given twice, --model is the same as --run\. Give one\."):
        predict.main(["a.png", "--run", "a", "--model", "b"])
    with pytest.raises(UserError, match=r"^--images: given twice, with and without --images\."):
        predict.main(["a.png", "--images", "b.png", "--run", "a"])


def test_changed_weights_are_refused(copy):
    assert verify_model(copy)["dataset"] == "busi"
    (copy / "auxiliary.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"auxiliary\.safetensors: is not the file that model\.json next to it descr"):
        verify_model(copy)
    with pytest.raises(UserError, match=r"auxiliary\.safetensors: is not the file that model\.json next to it descr"):
        load_decoders(mgcc.load(copy))
    (copy / "auxiliary.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 'auxiliary\.safetensors', which is absent"):
        verify_model(copy)
    save_run(copy.parent / "other")
    (copy / "model.safetensors").write_bytes((copy.parent / "other" / "best" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors: is not the file that model\.json next to it describes"):
        mgcc.load(copy)


def test_an_export_keeps_what_is_the_same_and_refuses_the_rest(exported, copy, tmp_path, monkeypatch):
    run, _ = exported
    write_temperature(
        Temperature(3.0, 8, *[BeforeAfter(1, 1)] * 2),
        copy / "model.safetensors",
        run_info(copy / "model.safetensors")["weights_sha256"],
        "own",
    )
    with pytest.raises(UserError, match="exists and is not this export"):
        to_folder(run, copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--run or --model \(run or model\): required$"):
        export.main(["--out", "new"])
    to_folder(run, copy, "--overwrite")
    assert read_temperature(mgcc.load(copy).info) == 3.0
    assert files_in(copy) == ["README.md", "calibration.json", "model.json", "model.safetensors"]
    with pytest.raises(UserError, match=r"copy was exported without its auxiliary decoders\. Choose tta or ensemble\."):
        load_decoders(mgcc.load(copy))
    before = (copy / "model.json").stat().st_ino
    to_folder(copy, copy)  # of itself: the same
    assert (copy / "model.json").stat().st_ino == before
    (copy / "README.md").write_text("with scores")
    assert (to_folder(copy, tmp_path / "second") / "README.md").read_text() == "with scores"
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes\.txt' and is not a model folder"):
        to_folder(run, copy, "--overwrite", "--decoders")
    with pytest.raises(UserError, match="writes a folder"):
        to_folder(run, tmp_path / "new.safetensors")
    with pytest.raises(
        UserError, match=r"^--decoders: .* was trained by supervised, which has no auxiliary decoders\. Lea"
    ):
        to_folder(save_run(tmp_path / "plain"), tmp_path / "new", "--decoders")
    assert not (tmp_path / "new").exists()


def evaluation(folder, sha256, dataset, subset, split, specificity=None):
    overlap = {"iou": SCORE, "dice": SCORE}
    overall = {
        "images": 8,
        "lesions": 6,
        "groups": 4,
        "corrected": overlap,
        "lesion": overlap,
        "specificity": specificity,
    }
    folder.mkdir()
    (folder / "images.csv").write_text("width,height\n128,128\n")
    summary = {"format": FORMAT, "version": VERSION, "datasets": [dataset], "runs": [{"weights_sha256": sha256}]}
    summary |= {"overall": overall, "subsets": [{"by": "class", "name": "benign", **overall}]}
    summary |= {
        "config": {"split": split},
        "request": {"subset": subset, "tta": []},
        "postprocess": {"setting": "none"},
    }
    write_json(folder / "summary.json", summary)
    return str(folder)


def test_the_card_has_the_measured_scores_and_where_they_come_from(exported, copy, tmp_path):
    run, folder = exported
    sha256 = run_info(folder / "model.safetensors")["weights_sha256"]
    alarms = {"mean": 0.75, "low": None, "high": None, "images": 4, "clusters": 4}
    folders = [
        evaluation(tmp_path / "test", sha256, "busi", "test", "busi_test_1", alarms),
        evaluation(tmp_path / "val", sha256, "busi", "validation", "busi_test_1"),
        evaluation(tmp_path / "other", sha256, "busbra", None, None),
    ]
    to_folder(run, copy, "--overwrite", "--evaluations", *folders)
    card = (copy / "README.md").read_text(encoding="utf-8")
    test, val, other = card.split("\n### ")[1:]
    assert test.startswith("BUSI, test images of `busi_test_1`")
    assert (
        "8 images, 6 of them with a lesion, 4 patients or groups; scored at 128x128 pixels. Not used for trai" in test
    )
    cells = [cell.strip() for cell in next(line for line in test.splitlines() if line.startswith("| all")).split("|")]
    assert cells[1:-1] == ["all", "8", *["62.5 (50.0 to 75.0)"] * 4, "75.0"]
    assert "scores are optimistic" in val
    assert other.startswith("BUS-BRA\n\n8 images")
    assert "A data set that was not used for training or selection." in other
    for text in (
        *(
            "Research use only. Not a medical device.",
            "Al-Dhabyani",
            "CC BY 4.0",
            "Gómez-Flores",
            "fitted to the 8 val",
        ),
        *("commit", "| abc", "data.shards: busi_128", "Finds a lesion in 1 of 4 images without one (BUSI, test)."),
    ):
        assert text in card
    with pytest.raises(UserError, match="is of other weights than the exported ones"):
        to_folder(run, copy, "--overwrite", "--evaluations", evaluation(tmp_path / "b", "1", "busi", None, None))
    with pytest.raises(UserError, match="holds no finished evaluation"):
        to_folder(run, copy, "--overwrite", "--evaluations", str(tmp_path))
