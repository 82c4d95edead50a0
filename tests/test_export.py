"""`mgcc export`: an exported file predicts as the run does, says what it is, and is never half written."""

import copy
import re
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from predict_runs import SIZE, files_in, noise, save_run

import mgcc_dist as mgcc
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.splits import Split, write_split
from mgcc_dist.export import main
from mgcc_dist.inference import export, export_formats, int8, winograd
from mgcc_dist.inference.export import FORMATS
from mgcc_dist.inference.export_graph import ExportGraph
from mgcc_dist.inference.networks import build_network
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.predict import main as predict
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "export.md"
NETWORKS = {
    **{name: {"widths": (4, 8, 16)} for name in ("unet", "cmunet", "mgcc", "cct")},
    "swin_unet": {"embed_dim": 12, "depths": (2, 2), "heads": (3, 6), "window": 4},
}
SHAPES = ((1, SIZE, SIZE), (2, 21, 45), (1, 90, 131), (1, 1, 3))


def tiny(name):
    """A network of random weights whose norms do something."""
    torch.manual_seed(0)
    network = build_network(name, **NETWORKS[name]).inference_module().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    return network


def pictures(batch, height, width):
    return np.stack([noise(width + index, height, 3)[:, :width] for index in range(batch)])


def check(predict, predictor, shape):
    images = pictures(*shape)
    mask, probability = predict(images)
    assert mask.dtype == bool
    for index, expected in enumerate(predictor.predict(images)):
        np.testing.assert_allclose(probability[index], expected.probability, atol=1e-5)
        np.testing.assert_array_equal(mask[index], probability[index] > 0.5)
        assert (mask[index] != expected.mask).mean() < 0.005


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_of_every_network_is_its_prediction(name):
    predictor = Predictor(tiny(name), SIZE, device="cpu", precision="no")
    graph = ExportGraph(copy.deepcopy(predictor.network), SIZE, "stretch").requires_grad_(False).eval()
    for shape in SHAPES:
        check(lambda images: [each.numpy() for each in graph(torch.from_numpy(images))], predictor, shape)


@pytest.mark.parametrize("fit", ["letterbox", "crop", "released"])
def test_the_graph_fits_images_as_the_run_was_trained(fit):
    predictor = Predictor(tiny("unet"), SIZE, device="cpu", precision="no", fit=fit)
    graph = ExportGraph(copy.deepcopy(predictor.network), SIZE, fit).requires_grad_(False).eval()
    for shape in (*SHAPES, (1, 33, 32), (1, 40, 31)):
        check(lambda images: [each.numpy() for each in graph(torch.from_numpy(images))], predictor, shape)


@pytest.mark.parametrize(
    ("dilation", "upsample", "height", "width"),
    [(1, False, 8, 12), (2, False, 16, 8), (1, True, 4, 6), (2, False, 12, 8)],
)
def test_a_winograd_convolution_is_the_convolution(dilation, upsample, height, width):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 3, padding=dilation, dilation=dilation).requires_grad_(False)
    x = torch.randn(2, 5, height, width)
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2) if upsample else x)
    torch.testing.assert_close(winograd.WinogradConv(conv, conv, upsample)(x), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a run of MGCC, and its network as ONNX, with 3x3 convolutions in Winograd's form."""
    folder = tmp_path_factory.mktemp("export")
    run = save_run(folder / "run", network=MGCCConfig(widths=(4, 8), taps=(1, 2), gates=(True, True, True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CHANNELS", 4)
        main(["--run", str(run), "--out", str(folder / "new" / "mgcc.onnx")])
    return run, folder / "new" / "mgcc.onnx"


def predictor_of(run):
    return mgcc.load(run, device="cpu", precision="no", kernels="torch")


def test_onnx_predicts_as_the_run_at_any_batch_and_size(exported):
    run, path = exported
    assert files_in(path.parent) == ["mgcc.onnx"]
    session = onnxruntime.InferenceSession(path)
    for shape in SHAPES:
        check(lambda images: session.run(["mask", "probability"], {"images": images}), predictor_of(run), shape)
    assert session.get_modelmeta().custom_metadata_map == {
        **{"run": "run", "weights": "best", "weights_sha256": sha256_of(run / "best" / "model.safetensors")},
        **{"method": "supervised", "network": "mgcc", "image_size": str(SIZE), "fit": "stretch", "threshold": "0.5"},
        **{"version": mgcc.__version__, "use": "research use only; not a medical device"},
    }


def test_onnx_has_folded_norms_phase_convolutions_and_no_paths(exported):
    model = onnx.load(exported[1])
    assert model.opset_import[0].version == export_formats.OPSET
    outputs = {name: node.op_type for node in model.graph.node for name in node.output}
    assert not {"Resize", "Upsample"} & set(outputs.values())
    assert "Conv" not in {outputs[node.input[0]] for node in model.graph.node if node.op_type == "BatchNormalization"}
    assert str(REPOSITORY).encode() not in exported[1].read_bytes()
    kernels = [tuple(each.dims) for each in model.graph.initializer if len(each.dims) == 4]
    assert {(36, 1, 6, 6), (25, 1, 4, 4)} <= set(kernels)  # the tiles of Winograd's form


@pytest.fixture
def plain_onnx(exported, monkeypatch):
    """Write the exported ONNX file instead of translating a network again."""

    def write(graph, images, metadata, path):
        shutil.copyfile(exported[1], path)
        export_formats.describe_onnx(path, metadata)

    monkeypatch.setattr(export_formats, "write_onnx", write)
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(write=write))


def test_int8_says_what_it_costs(exported, plain_onnx, phantom_shards, tmp_path, monkeypatch, caplog):
    run, keys, out = exported[0], phantom_shards.keys(), tmp_path / "out" / "int8.onnx"
    write_split(tmp_path / "split.json", Split("some", tuple(keys[3:]), (), tuple(keys[:3])))
    words = ["--run", str(run), "--out", str(out), "--int8", str(phantom_shards.folder)]
    with pytest.raises(UserError, match=r"--int8: needs validation images, and .*run does not say its split"):
        main(words)
    words += ["--split", str(tmp_path / "split.json")]
    main(words)
    metadata = onnxruntime.InferenceSession(out).get_modelmeta().custom_metadata_map
    before, after, loss = (float(metadata[key]) for key in ("float32_iou", "int8_iou", "int8_iou_loss"))
    assert loss == pytest.approx(before - after, abs=2e-4)
    assert metadata["int8_images"] == "3"
    assert f"IoU of 3 validation images: {metadata['float32_iou']} in float32" in caplog.text
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    (expected,) = (each.probability for each in predictor_of(run).predict(pictures(1, SIZE, SIZE)))
    _, (found,) = FORMATS["onnx"].open(out)(pictures(1, SIZE, SIZE))
    assert 0 < np.abs(found - expected).max() < 0.05
    main(words)  # the same export
    with pytest.raises(UserError, match=r"int8\.onnx: exists and is not this export"):
        main(["--run", str(run), "--out", str(out)])

    monkeypatch.setattr(
        export, "measure", lambda *_: dict(zip(int8.MEASURED, ("3", "0.6", "0.7", "0.1", "0"), strict=True))
    )
    for limit, files in (("0.05", []), ("0.2", ["refused.onnx"])):
        words[3] = str(tmp_path / "new" / "refused.onnx")
        options = [*words, "--max-iou-loss", limit]
        if files:
            main(options)
        else:
            with pytest.raises(
                UserError, match=r"lowers the IoU of 3 validation images from 0\.7 to 0\.6, by more than"
            ):
                main(options)
        assert files_in(tmp_path / "new") == files
    with pytest.raises(UserError, match=r"by more than --max-iou-loss 0\.05"):
        main([*words, "--max-iou-loss", "0.05"])  # also of a file that exists


def test_predict_runs_an_exported_file_and_refuses_one_of_other_weights(exported, plain_onnx, tmp_path):
    run, path = exported
    Image.fromarray(noise(40, 30)).save(tmp_path / "image.png")

    def probabilities(backend, *options):
        out = tmp_path / "".join(filter(str.isalnum, backend))
        words = ["--run", str(run), str(tmp_path / "image.png"), "--out", str(out), "--backend", backend]
        predict([*words, "--precision", "no", "--workers", "0", "--probabilities", *options])
        return np.asarray(Image.open(out / "probabilities" / "image.png")).astype(int)

    expected = probabilities("torch")
    assert expected.std() > 10
    for backend in ("onnx", "openvino", str(path)):
        assert np.abs(probabilities(backend, "--uncertainty", "tta") - expected).max() <= 1
    other = tmp_path / "other.onnx"
    shutil.copyfile(path, other)
    export_formats.describe_onnx(other, {"weights_sha256": "0"})
    with pytest.raises(UserError, match=r"--backend .*other\.onnx: is of other weights than .*run"):
        probabilities(str(other))
    other.write_text("not a model")
    with pytest.raises(UserError, match=r"--backend .*other\.onnx: can't be read\. Export it again"):
        probabilities(str(other))


def test_the_same_export_is_kept_and_another_file_is_refused(exported, tmp_path):
    run, path = exported
    words = ["--run", str(run), "--out", str(path)]
    before = path.stat().st_mtime_ns
    main(words)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"mgcc\.onnx: exists and is not this export\. Choose another, or use --over"):
        main([*words, "--weights", "last"])
    (tmp_path / "a.onnx").write_text("not a model")
    with pytest.raises(UserError, match=r"a\.onnx: exists and is not this export"):
        main(["--run", str(run), "--out", str(tmp_path / "a.onnx")])


def test_torchscript_predicts_as_the_run(exported, tmp_path):
    run, _ = exported
    out = tmp_path / "mgcc.pt"
    words = ["--run", str(run), "--to", "torchscript", "--out", str(out)]
    out.write_bytes(b"not a model")
    main([*words, "--overwrite"])
    for shape in SHAPES:
        check(lambda images: FORMATS["torchscript"].open(out)(images), predictor_of(run), shape)
    main(words)  # the same export


def test_openvino_predicts_as_the_run(exported, plain_onnx, tmp_path):
    run, _ = exported
    out = tmp_path / "mgcc.xml"
    (tmp_path / "mgcc.bin").write_text("something else")
    with pytest.raises(UserError, match=r"mgcc\.bin: exists and is not this export"):
        main(["--run", str(run), "--to", "openvino", "--out", str(out)])
    (tmp_path / "mgcc.bin").unlink()
    main(["--run", str(run), "--to", "openvino", "--out", str(out)])
    assert {"mgcc.bin", "mgcc.xml"} == {each.name for each in tmp_path.iterdir()}
    images = pictures(2, 21, 45)
    _, probability = FORMATS["openvino"].open(out)(images)
    expected = np.stack([each.probability for each in predictor_of(run).predict(images)])
    np.testing.assert_allclose(probability, expected, atol=1e-3)  # float32 resizing
    main(["--run", str(run), "--to", "openvino", "--out", str(out)])  # the same export


def test_a_backend_that_computes_something_else_leaves_no_file(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run")
    wrong = FORMATS["torchscript"]._replace(
        open=lambda path: lambda images: (None, np.zeros(images.shape[:3], np.float32))
    )
    monkeypatch.setitem(FORMATS, "torchscript", wrong)
    with pytest.raises(UserError, match=r"--to torchscript: .*differ by 0\.\d+ from PyTorch's"):
        main(["--run", str(run), "--to", "torchscript", "--out", str(tmp_path / "new" / "a.pt")])
    assert files_in(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--out a.pt", r"--out a\.pt: the suffix of onnx is \.onnx\. Rename it, or change --to\."),
        ("--out a.onnx", r"no_run"),
        ("--out a.pt --to torchscript --int8 shards", r"--int8: is for --to onnx"),
        ("--out a.onnx --split busi_test_1", r"--split: names the validation images of --int8\. Pass --int8"),
    ],
)
def test_wrong_options_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        main(["--run", "no_run", *words.split()])


def test_a_missing_package_is_named_before_any_work(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        main(["--run", str(exported[0]), "--out", str(tmp_path / "a.onnx")])
    assert caught.value.name == "onnxruntime"
    assert files_in(tmp_path) == []


def test_the_script_of_the_page_works_as_written(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copyfile(exported[1], "out/unet.onnx")
    Image.fromarray(noise(40, 30)).save("image.png")
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(script, "export.md", "exec"), {})
    mask = predictor_of(exported[0]).predict("image.png").mask
    np.testing.assert_array_equal(np.asarray(Image.open("mask.png")), mask)
