"""From real images with masks to a segmentation run on pairs: `mgcc ldm` with masks and filter, then `mgcc segment`."""

import json

import pytest
import torch
import toy_ldm
from predict_runs import save_run

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.ldm import LdmConfig
from mgcc_dist.ldm import run as run_ldm
from mgcc_dist.methods.segment_config import SegmentConfig
from mgcc_dist.segment import run as run_segment


@pytest.mark.e2e
def test_pairs_are_sampled_audited_filtered_and_trained_on(tmp_path, caplog):
    path, out = tmp_path / "toy.yaml", tmp_path / "out"
    path.write_text(toy_ldm.config(steps=2, checkpoint_every=100, samples=6))
    torch.set_num_threads(1)
    run = save_run(tmp_path / "real_run")
    words = ["--config", str(path), "--out", str(out), "--denoiser.masks", "labeled", "--filter.quantile", "0"]
    with pytest.raises(UserError, match=r"toy\.yaml: does not hold a segmentation network"):
        run_ldm(parse(LdmConfig, [*words, "--filter.run", str(path)], CONFIGS / "ldm", "demo"))
    assert not (out / "autoencoder").exists(), "noticed before training"
    config = parse(LdmConfig, [*words, "--filter.run", str(run)], CONFIGS / "ldm", "demo")
    run_ldm(config)

    samples, pairs = ShardFolder.open(out / "samples"), ShardFolder.open(out / "pairs")
    assert (len(samples), samples.index["labeled"]) == (6, 6)
    report = json.loads((out / "filter" / "filter.json").read_text())
    assert pairs.keys() == [row["key"] for row in report["images"] if row["kept"]]
    assert pairs.index["filter"]["dropped"] == report["dropped"] == 6 - len(pairs)
    audit = json.loads((out / "audit" / "audit.json").read_text())
    assert {"masks", "pairs"} <= audit.keys()
    assert {"closest_masks.png", "closest_pairs.png"} <= {each.name for each in (out / "audit").iterdir()}
    with caplog.at_level("INFO"):
        run_ldm(config)
    assert "writing" not in caplog.text
    assert caplog.text.count("filter.json already exists") == 1

    words = (
        f"--data.shards {out / 'phantom'} --data.split {out / 'split.json'} --data.synthetic_labeled {out / 'pairs'}"
    )
    words += " --data.synthetic null --data.image_size 16 --network.widths [4,8] --loop.epochs null --loop.steps 1"
    words += f" --data.workers 0 --data.batch_synthetic 2 --out {tmp_path / 'run'}"
    run_segment(parse(SegmentConfig, words.split(), CONFIGS / "segment", "unet_demo"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"]["synthetic_labeled"] == len(pairs)
    assert result["synthetic_labeled"]["filter"] == pairs.index["filter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--filter.run out", r"filter\.run: samples have no masks to filter by\. Set denoiser\.masks labeled"),
        ("--sampling.name pairs", r"sampling\.name: 'pairs' can't be used"),
    ],
)
def test_settings_that_pairs_do_not_have_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse(LdmConfig, words.split(), CONFIGS / "ldm", "demo")
