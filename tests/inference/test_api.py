"""The Python API: `import mgcc_dist as mgcc`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from dicom_files import region, save, ultrasound
from PIL import Image
from predict_runs import SIZE, save_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import mgcc_dist as mgcc
from mgcc_dist.common.errors import UserError
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.train.weights_file import HEADER, save_weights


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run with a tiny network of random weights."""
    folder = save_run(tmp_path / "run")
    result = {"dataset": "BUSI", "split": "busi_random_1", "seed": 1, "images": {"labeled": 3}, "synthetic": None}
    scores = {"best": {"summary": {"corrected": {"iou": 0.5}}}, "last": {"summary": {"corrected": {"iou": 0.25}}}}
    content = result | scores | {"environment": {"commit": "0123456789ab"}}
    (folder / "result.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def predictor(run):
    return mgcc.load(run, device="cpu", precision="no")


def picture(width=40, height=30):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def test_import_loads_no_heavy_library():
    program = "import sys, mgcc_dist; print([m for m in ('torch', 'numpy', 'diffusers', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves_and_others_do_not():
    for name in mgcc.__all__:
        assert getattr(mgcc, name) is not None
        assert name in dir(mgcc)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mgcc.nothing  # noqa: B018


def test_dicom_is_segmented_in_its_regions(predictor, tmp_path):
    pixels = picture()
    save(ultrasound(pixels, regions=[region(4, 5, 23, 24)]), tmp_path / "IM1")
    save(ultrasound(pixels), tmp_path / "b.dcm")
    save(ultrasound(np.stack([pixels, pixels])), tmp_path / "cine.dcm")
    expected = np.zeros(pixels.shape, np.float32)
    expected[5:25, 4:24] = predictor.predict(pixels[5:25, 4:24]).probability
    inside, complete = predictor.predict([str(tmp_path / "IM1"), tmp_path / "b.dcm"])
    np.testing.assert_allclose(inside.probability, expected, atol=1e-6)
    np.testing.assert_allclose(complete.probability, predictor.predict(pixels).probability, atol=1e-6)
    with pytest.raises(UserError, match=r"cine\.dcm: is a cine of 2 frames\. Segment it with `mgcc predict`"):
        predictor.predict(tmp_path / "cine.dcm")


def test_file_pil_and_array_give_the_same_prediction_at_the_images_size(predictor, tmp_path):
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictions = [
        predictor.predict(image)
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, pixels[:, :, None])
    ]
    for mask, probability in predictions:
        assert mask.shape == probability.shape == (30, 40)
        assert (mask.dtype, probability.dtype) == (np.bool_, np.float32)
        np.testing.assert_array_equal(mask, probability > 0.5)
        np.testing.assert_array_equal(probability, predictions[0].probability)


def test_prediction_is_the_networks_forward_pass(predictor):
    pixels = picture(SIZE, SIZE)
    with torch.no_grad():
        expected = predictor.network(torch.from_numpy(pixels)[None, None] / 127.5 - 1).sigmoid()[0, 0].numpy()
    np.testing.assert_allclose(predictor.predict(pixels).probability, expected, atol=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_a_disc_is_predicted_where_it_is_in_the_image(fit):
    """The network thresholds grey values, so it predicts a white disc as the disc."""
    predictor = Predictor(Threshold(), 64, device="cpu", precision="no", fit=fit)
    rows, columns = np.mgrid[:50, :81]
    disc = (rows - 24.5) ** 2 + (columns - 35) ** 2 <= 15**2
    mask = predictor.predict(np.where(disc, 255, 0).astype(np.uint8)).mask
    assert mask.shape == disc.shape
    assert (mask & disc).sum() / (mask | disc).sum() > 0.95


def test_what_a_crop_does_not_show_is_predicted_as_background():
    predictor = Predictor(Threshold(), 64, device="cpu", precision="no", fit="crop")
    mask, probability = predictor.predict(np.full((40, 80), 255, np.uint8))
    assert mask[:, 20:60].all()
    assert not probability[:, :20].any()
    assert not probability[:, 60:].any()


def test_the_fit_of_a_run_is_read_from_its_weights_and_older_ones_were_stretched(tmp_path):
    folder = save_run(tmp_path, fit="crop")
    assert mgcc.load(folder, device="cpu").fit == "crop"
    weights = folder / "best" / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        content = json.loads(file.metadata()[HEADER])
    del content["fit"]  # as in version 0.1
    save_weights(load_file(weights), weights, content)
    assert mgcc.load(folder, device="cpu").fit == "stretch"


class Threshold(nn.Module):
    """Logits that are positive where the image is bright."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        return self.scale * images


def test_batch_gives_one_prediction_per_image_in_order(predictor):
    images = [picture(20 + 3 * i, 30) for i in range(10)]  # more than one forward pass
    for image, prediction in zip(images, predictor.predict(images), strict=True):
        assert prediction.mask.shape == image.shape
        np.testing.assert_allclose(prediction.probability, predictor.predict(image).probability, atol=1e-6)
    stacked = np.stack([picture()[:, :, None]] * 2)  # [2,H,W,1]
    assert len(predictor.predict(stacked)) == 2
    assert predictor.predict([]) == []


def test_colour_and_16_bit_arrays_are_read_as_files_are(predictor, tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    deep = picture().astype(np.uint16) * 16  # 12 bits
    for name, pixels in (("colour.png", colour), ("deep.png", deep)):
        Image.fromarray(pixels).save(tmp_path / name)
        expected = predictor.predict(tmp_path / name).probability
        np.testing.assert_array_equal(predictor.predict(pixels).probability, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.float32), "expected pixels of uint8 .* got float32"),
        (np.zeros((4, 4, 2), np.uint8), r"expected an array .* got the shape \[4, 4, 2\]"),
        (np.zeros((0, 4), np.uint8), r"got the shape \[0, 4\]"),
        (np.zeros(4, np.uint8), r"got the shape \[4\]"),
        (np.zeros((4, 4, 3), np.uint16), "uint16 of shape"),
        ([None], "expected a file, a PIL image or a numpy array, got NoneType"),
    ],
    ids=str,
)
def test_unusable_images_are_refused(predictor, image, message):
    with pytest.raises(mgcc.UserError, match=message):
        predictor.predict(image)


def test_unreadable_file_is_named(predictor, tmp_path):
    with pytest.raises(mgcc.UserError, match=r"missing\.png: does not exist"):
        predictor.predict(tmp_path / "missing.png")


@pytest.mark.parametrize(("weights", "iou"), [("best", 0.5), ("last", 0.25)])
def test_info_says_what_the_weights_are(run, weights, iou):
    info = mgcc.load(run, weights).info
    assert (info["method"], info["network"]["name"], info["image_size"]) == ("supervised", "unet", SIZE)
    assert (info["dataset"], info["split"], info["commit"]) == ("BUSI", "busi_random_1", "0123456789ab")
    assert info["scores"]["corrected"]["iou"] == iou
    assert len(info["weights_sha256"]) == 64


def test_weights_file_alone_is_enough(run, predictor, tmp_path):
    file = tmp_path / "elsewhere.safetensors"
    file.write_bytes((run / "best" / "model.safetensors").read_bytes())
    loaded = mgcc.load(file, device="cpu", precision="no")
    np.testing.assert_array_equal(loaded.predict(picture()).probability, predictor.predict(picture()).probability)
    assert "dataset" not in loaded.info


def test_missing_and_foreign_files_are_refused(run, tmp_path):
    with pytest.raises(mgcc.UserError, match=r"nowhere: does not exist\. Name the folder of a run"):
        mgcc.load(tmp_path / "nowhere")
    with pytest.raises(mgcc.UserError, match=r"model\.safetensors: does not exist\. Is .* the folder of"):
        mgcc.load(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(mgcc.UserError, match=r"other\.safetensors: does not hold a segmentation network"):
        mgcc.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"image_size": "big"}, {"image_size": 0}, {"fit": "zoom"}, {"network": None}, {"method": "mgcc"}, {"network": {}}],
    ids=str,
)
def test_a_damaged_header_is_refused_and_no_default_replaces_it(run, change):
    path = run / "best" / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    save_weights(load_file(path), path, header | change)
    with pytest.raises(mgcc.UserError, match=r"model\.safetensors: does not hold a segmentation network \(its header"):
        mgcc.load(run)


@pytest.mark.parametrize("content", ["[]", "{", '{"best": null}', '{"environment": 3}'])
def test_a_damaged_result_is_one_line(run, content):
    (run / "result.json").write_text(content)
    with pytest.raises(mgcc.UserError, match=r"result\.json: is damaged \(.*\)\. Move it elsewhere and rerun"):
        mgcc.load(run)


def test_repr_names_network_and_weights_and_tensors_are_refused(predictor):
    assert repr(predictor).startswith(f"Predictor({predictor.info['network']['name']}, image_size=")
    assert "model.safetensors'" in repr(predictor)
    with pytest.raises(mgcc.UserError, match=r"got Tensor\. Pass tensor\.numpy\(\) with pixels of uint8 or uint16"):
        predictor.predict(torch.zeros(16, 16))


def test_to_moves_the_network_and_returns_the_predictor(predictor):
    assert predictor.to("cpu") is predictor
    assert predictor.device == torch.device("cpu")


def test_build_network_takes_the_keys_of_the_config():
    network = mgcc.build_network("mgcc", widths=[4, 8], taps=(1, 2), gates=(True, False, True))
    main, auxiliary = network(torch.zeros(2, 1, 16, 16))
    assert main.shape == (2, 1, 16, 16)
    assert len(auxiliary) == 2
    assert mgcc.fuse(network, "torch")(torch.zeros(2, 1, 16, 16))[0].shape == main.shape


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("resnet", {}, "build_network: network.name: expected one of unet, cmunet, .* got 'resnet'"),
        ("unet", {"width": (4, 8)}, "network.width: unknown key. Did you mean network.widths"),
        ("unet", {"widths": (4,)}, "network.widths must be"),
    ],
)
def test_build_network_names_the_mistake(name, config, message):
    with pytest.raises(mgcc.UserError, match=message):
        mgcc.build_network(name, **config)
