"""Curation: the proposal, the page in Chromium, and the shards written from a selection."""

import json
import time

import numpy as np
import pytest
from chromium import browser, install

from mgcc_dist.assessment import features
from mgcc_dist.assessment.audit import AUDIT_FORMAT
from mgcc_dist.assessment.config import CurateConfig
from mgcc_dist.assessment.curate import curate, weighted_k_center
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of, write_json
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.selection import FORMAT, apply_selection, provenance
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData

REQUEST = {"checkpoint": "abc", "seed": 3, "count": 12}


def test_weighted_k_center_by_hand():
    """Points 0, 1, 10, 11 on a line with realism 1, 0.5, 0.8, 0.9; 11 is not eligible."""
    points, realism = np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([1, 0.5, 0.8, 0.9])
    eligible = np.array([True, True, True, False])
    # 0 is the most realistic; then 0.8 x 10 beats 0.5 x 1; then the remaining one.
    assert weighted_k_center(points, realism, eligible, 3) == [0, 2, 1]
    assert weighted_k_center(points, realism, eligible, 2) == [0, 2]
    assert weighted_k_center(points, realism, np.ones(4, bool), 2) == [0, 3]  # 0.9 x 11 beats 0.8 x 10
    assert weighted_k_center(points, realism, eligible, 9) == [0, 2, 1]
    assert weighted_k_center(np.zeros((3, 1)), np.ones(3), np.ones(3, bool), 3) == [
        0,
        1,
        2,
    ]  # identical points: each once


@pytest.fixture
def run(tmp_path, phantom_shards, vae):
    """The output of a finished `ldm`: 12 samples in three shards, of which number 4 is a near-copy."""
    folder = tmp_path / "samples"
    folder.mkdir()
    generator = np.random.default_rng(0)
    samples = [
        Sample(f"synthetic-{i:06d}", generator.integers(0, 256, (16, 16), np.uint8), None, {"index": i})
        for i in range(12)
    ]
    entries = [write_shard(folder / f"{start}.tar", samples[start : start + 4]) for start in (0, 4, 8)]
    write_index(folder, "synthetic", entries, request=REQUEST)
    write_json(folder / "request.json", REQUEST)
    nearest = phantom_shards.keys()[0]
    rows = [
        {"key": sample.key, "nearest": nearest, "similarity": 0.1 * i / 12, "near_copy": i == 4}
        for i, sample in enumerate(samples)
    ]
    write_json(tmp_path / "audit.json", {"request": {"format": AUDIT_FORMAT, "samples": REQUEST}, "images": rows})
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.fixture
def curated(run, phantom_shards):
    keys = tuple(phantom_shards.keys())
    images = ImageData(DataConfig(image_size=16), phantom_shards, Split("c", (), keys[:16], keys[16:]))
    extractor = features.load(None, run / "vae", 16)
    config = CurateConfig(out=str(run), count=6, neighbours=2)
    return curate(config, extractor, images, run / "samples", run / "audit.json", run / "curation")


def test_near_copies_are_not_proposed(curated, run):
    assert len(curated["proposed"]) == len(set(curated["proposed"])) == 6
    assert "synthetic-000004" not in curated["proposed"]
    assert curated == json.loads((run / "curation" / "proposal.json").read_text())
    places = [row["place"] for row in curated["images"] if row["place"] is not None]
    assert sorted(places) == list(range(6))


def test_realism_is_the_scaled_rank_by_distance_to_the_training_images(curated):
    by_distance = sorted(curated["images"], key=lambda row: row["distance"])
    assert [row["realism"] for row in by_distance] == [round(rank / 12, 4) for rank in range(12, 0, -1)]


def test_an_audit_of_other_samples_is_refused(run, phantom_shards):
    images = ImageData(DataConfig(), phantom_shards, Split("c", (), tuple(phantom_shards.keys()), ()))
    extractor = features.load(None, run / "vae", 16)
    write_json(
        run / "audit.json", {"request": {"format": AUDIT_FORMAT, "samples": REQUEST | {"seed": 4}}, "images": []}
    )
    with pytest.raises(UserError, match="is the audit of other samples than"):
        curate(CurateConfig(out=""), extractor, images, run / "samples", run / "audit.json", run / "curation")
    write_json(run / "audit.json", {"request": {"samples": REQUEST}, "images": []})
    with pytest.raises(UserError, match="written by an earlier version"):
        curate(CurateConfig(out=""), extractor, images, run / "samples", run / "audit.json", run / "curation")
    with pytest.raises(UserError, match=r"does not exist\. Run"):
        curate(CurateConfig(out=""), extractor, images, run / "samples", run / "none.json", run / "curation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda audit: [], r"audit\.json: is not a JSON object\. Restore it, or move it elsewhere"),
        (
            lambda audit: audit | {"request": 3},
            r"audit\.json: is damaged \(.*\)\. Move it elsewhere and run `mgcc ldm`",
        ),
        (lambda audit: audit | {"images": [{"key": "a"}]}, r"audit\.json: is damaged \(KeyError\('nearest'\)\)"),
        (
            lambda audit: audit | {"images": [row | {"nearest": "elsewhere"} for row in audit["images"]]},
            r"audit\.json: 'elsewhere' is not a training image of .*\. Move it elsewhere and run `mgcc ldm` again",
        ),
    ],
)
def test_a_damaged_audit_is_refused(run, phantom_shards, change, message):
    images = ImageData(DataConfig(), phantom_shards, Split("c", (), tuple(phantom_shards.keys()), ()))
    write_json(run / "audit.json", change(json.loads((run / "audit.json").read_text())))
    with pytest.raises(UserError, match=message):
        curate(CurateConfig(out=""), None, images, run / "samples", run / "audit.json", run / "curation")
    assert not (run / "curation").exists()


@pytest.fixture
def page(curated, run):
    install()
    pytest.importorskip("selenium")
    driver = browser(run / "downloads")
    driver.get((run / "curation" / "page.html").as_uri())
    yield driver
    driver.quit()


def test_selection_by_keyboard_and_mouse_is_applied_to_the_shards(page, curated, run):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    def press(*keys):
        ActionChains(page).send_keys(*keys).perform()

    def text(name):
        return page.find_element(By.ID, name).text

    proposed = curated["proposed"]
    assert text("counts") == "6 accepted (target 6), 6 rejected"
    assert text("key") == proposed[0]
    press("r")  # rejects the first and moves to the second
    assert text("key") == proposed[1]
    press("r", "u")  # rejects the second and undoes it
    assert text("counts") == "5 accepted (target 6), 7 rejected"
    press("j", "k", "\ue014", "\ue012")  # forward and back, with letters and arrow keys
    assert text("key") == proposed[1]
    press("n")
    assert curated["images"][0]["nearest"] in text("nearest-key")
    shown = page.execute_script("return document.getElementById('nearest-image').naturalWidth")
    assert shown == 32
    tiles = page.find_elements(By.CSS_SELECTOR, ".tile")
    assert [tile.get_attribute("data-key") for tile in tiles[:6]] == proposed
    assert tiles[-1].get_attribute("data-key") == "synthetic-000004"
    tiles[8].click()  # not proposed
    added = tiles[8].get_attribute("data-key")
    assert "accepted" in tiles[8].get_attribute("class")
    tiles[2].click()
    page.find_element(By.CSS_SELECTOR, "#filter option[value=changed]").click()
    changed = {tile.get_attribute("data-key") for tile in page.find_elements(By.CSS_SELECTOR, ".tile")}
    assert changed == {proposed[0], proposed[2], added}
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name.slice(0, 5))")
    assert set(loaded) <= {"data:"}  # no other files, no network
    assert page.get_log("browser") == []
    press("s")
    path = run / "downloads" / "selection.json"
    deadline = time.monotonic() + 10
    while not path.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    expected = sorted({*proposed, added} - {proposed[0], proposed[2]})
    saved = json.loads(path.read_text())
    assert sorted(saved["accepted"]) == expected
    assert len(saved["rejected"]) == 7
    before = {file.name: sha256_of(file) for file in (run / "samples").iterdir()}
    assert apply_selection(path, run / "samples", run / "curated") == 5
    left = ShardFolder.open(run / "curated")
    assert left.keys() == expected
    samples = ShardFolder.open(run / "samples")
    for i, key in enumerate(expected):
        assert np.array_equal(left[i].image, samples[samples.index_of(key)].image)
    assert {file.name: sha256_of(file) for file in (run / "samples").iterdir()} == before
    origin = provenance(left)
    assert origin["selection"] == {"sha256": sha256_of(path), "accepted": 5, "of": 12}
    assert (origin["images"], origin["request"]) == (5, REQUEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": REQUEST | {"seed": 4}}, r"made from samples with seed 4, but .* has seed 3"),
        ({"samples": REQUEST | {"checkpoint": "x"}}, "made from samples with checkpoint x"),
        ({"accepted": ["synthetic-000099"]}, r"1 of its records are not in .*, the first is 'synthetic-000099'"),
        ({"rejected": ["synthetic-000001"]}, "names 'synthetic-000001' twice"),
        ({"accepted": []}, "accepts no image"),
        ({"accepted": "synthetic-000001"}, "json: damaged"),
        ({"rejected": None}, "json: damaged"),
        ({"samples": None}, "json: damaged"),
        ({"version": 2}, "has version 2, not 1"),
        ({"format": "x"}, "is not a mgcc-dist selection file"),
    ],
)
def test_a_selection_that_does_not_match_the_samples_is_refused_and_nothing_is_written(run, change, message):
    good = {"format": FORMAT, "version": 1, "samples": REQUEST, "accepted": ["synthetic-000001"], "rejected": []}
    write_json(run / "selection.json", good | change)
    with pytest.raises(UserError, match=message):
        apply_selection(run / "selection.json", run / "samples", run / "curated")
    assert not (run / "curated").exists()
    write_json(run / "selection.json", good)
    assert apply_selection(run / "selection.json", run / "samples", run / "curated") == 1
    with pytest.raises(UserError, match="already exists"):
        apply_selection(run / "selection.json", run / "samples", run / "curated")


def test_images_that_are_no_samples_are_refused(run, phantom_shards):
    selection = {"format": FORMAT, "version": 1, "samples": REQUEST, "accepted": ["a"], "rejected": []}
    write_json(run / "selection.json", selection)
    with pytest.raises(UserError, match=r"holds no samples of `mgcc ldm`\. Pass its samples, such as OUT/samples\."):
        apply_selection(run / "selection.json", phantom_shards.folder, run / "curated")


def test_samples_that_name_a_file_elsewhere_are_refused_and_it_is_unchanged(run):
    """Joined to the output folder, an absolute name is that file itself."""
    index = json.loads((run / "samples" / "index.json").read_text())
    shard = run / "samples" / index["shards"][0]["name"]
    before = sha256_of(shard)
    index["shards"][0]["name"] = str(shard)
    write_json(run / "samples" / "index.json", index)
    selection = {"format": FORMAT, "version": 1, "samples": REQUEST, "accepted": ["synthetic-000001"], "rejected": []}
    write_json(run / "selection.json", selection)
    with pytest.raises(UserError, match=r"index\.json: '.*' is not a plain file name"):
        apply_selection(run / "selection.json", run / "samples", run / "curated")
    assert sha256_of(shard) == before
    assert not (run / "curated").exists()


def test_a_damaged_or_missing_selection_is_refused(run):
    (run / "selection.json").write_text('{"format": ')
    with pytest.raises(UserError, match="is not JSON"):
        apply_selection(run / "selection.json", run / "samples", run / "curated")
    with pytest.raises(UserError, match="does not exist"):
        apply_selection(run / "none.json", run / "samples", run / "curated")
