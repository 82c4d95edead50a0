"""`mgcc export --to monai`: MONAI loads and verifies the bundle, and runs it to the masks of `mgcc predict`."""

import json
import re
import shutil

import fire
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.bundle import run as monai_run
from PIL import Image
from predict_runs import SIZE, bytes_in, files_in, noise, save_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mgcc_dist as mgcc
from mgcc_dist.common.errors import UserError
from mgcc_dist.export import main

IMAGES = {"grey": noise(40, 30), "colour": noise(41, 29, 3)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run that finds lesions in about half of the pixels, and its bundle."""
    folder = tmp_path_factory.mktemp("monai")
    run = save_run(folder / "run")
    weights = run / "best" / "model.safetensors"
    probability = mgcc.load(run, device="cpu", precision="no").predict(IMAGES["grey"]).probability
    state = load_file(weights)
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    (head,) = (name for name in state if name.endswith("head.bias"))
    state[head] -= float(torch.from_numpy(probability).logit().median())
    save_file(state, weights, metadata)
    main(["--run", str(run), "--to", "monai", "--out", str(folder / "bundle")])
    return run, folder / "bundle"


def test_monai_runs_the_bundle_to_the_masks_of_predict(exported, monkeypatch):
    run, bundle = exported
    configs = {
        "config_file": str(bundle / "configs/inference.json"),
        "meta_file": str(bundle / "configs/metadata.json"),
    }
    (bundle / "images").mkdir()
    for name, image in IMAGES.items():
        Image.fromarray(image).save(bundle / "images" / f"{name}.png")
    workflow = ConfigWorkflow(**configs, workflow_type="inference", bundle_root=str(bundle), device="cpu")
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    predictor = mgcc.load(run, device="cpu", precision="no", kernels="torch")
    for name, image in IMAGES.items():
        mask = np.asarray(Image.open(bundle / "masks" / f"{name}_mask.png"))
        expected = predictor.predict(image).mask
        assert 0.1 < expected.mean() < 0.9
        assert mask.shape == expected.shape
        assert set(np.unique(mask)) == {0, 255}
        assert ((mask > 0) != expected).mean() < 0.005
    verify_net_in_out("network_def", **configs, bundle_root=str(bundle), device="cpu", any=SIZE + 3)

    monkeypatch.chdir(bundle)
    before = bytes_in(bundle / "masks")
    shutil.rmtree("masks")
    (command,) = re.findall(
        r"^python -m monai\.bundle (.*)$", (bundle / "docs" / "README.md").read_text(), re.MULTILINE
    )
    fire.Fire({"run": monai_run}, command=command)
    assert bytes_in(bundle / "masks") == before


def test_the_bundle_says_what_it_is(exported):
    metadata = json.loads((exported[1] / "configs" / "metadata.json").read_text())
    required = {"schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description"}
    required |= {"required_packages_version", "authors", "copyright", "network_data_format", "changelog"}
    assert required <= metadata.keys()
    assert metadata["mgcc_dist"]["use"] == metadata["intended_use"].lower().replace(". ", "; ").rstrip(".")
    files = bytes_in(exported[1])
    assert {"configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.ts"} <= files.keys()
    assert not any(str(exported[0].parent).encode() in content for content in files.values())


def test_the_same_bundle_is_kept_and_another_folder_is_refused(exported, tmp_path):
    run, bundle = exported
    words = ["--to", "monai", "--out"]
    before = (bundle / "models" / "model.ts").stat().st_ino
    main(["--model", str(run), *words, str(bundle)])
    assert (bundle / "models" / "model.ts").stat().st_ino == before
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="exists and is not this export"):
            main(["--run", str(run), *words, str(out)])
        with pytest.raises(UserError, match=r"exists and is not a MONAI bundle of mgcc-dist\. Choose another --out"):
            main(["--run", str(run), *words, str(out), "--overwrite"])
    assert files_in(tmp_path) == ["notes.txt"]
