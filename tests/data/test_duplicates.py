import csv

import numpy as np
import pytest
from all_pairs import all_similar_pairs, components, correlation_matrix
from PIL import Image, ImageDraw

from mgcc_dist.data.duplicates import THRESHOLD, correlations, groups, thumbnail
from mgcc_dist.data.images import read_grey
from mgcc_dist.data.phantom import draw
from mgcc_dist.data.readers.busi import busi


@pytest.fixture(scope="module")
def images():
    return [draw(seed=11, index=i, size=160).image for i in range(40)]


def find_pairs(images):
    return {(i, j) for i, j, _ in all_similar_pairs([thumbnail(image) for image in images])}


def with_callipers(image):
    marked = Image.fromarray(image)
    marks = ImageDraw.Draw(marked)
    for x, y in ((50, 60), (110, 90)):
        marks.line((x - 4, y, x + 4, y), fill=255)
        marks.line((x, y - 4, x, y + 4), fill=255)
    marks.text((10, 140), "RT 10", fill=255)
    return np.asarray(marked)


def resaved(image):
    """Change size, brightness and contrast."""
    resized = np.asarray(Image.fromarray(image).resize((211, 140)), dtype=float)
    return np.clip(resized * 0.7 + 20, 0, 255).astype(np.uint8)


CHANGES = {
    "exact copy": lambda image: image,
    "callipers and text": with_callipers,
    "saved again": resaved,
    "a frame later": lambda image: np.roll(image, (4, -6), (0, 1)),
    "cropped": lambda image: image[5:-2, 3:-6],
    "noise": lambda image: np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255).astype(
        np.uint8
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_find_pairs(images, change):
    copies = [np.ascontiguousarray(CHANGES[change](image)) for image in images[:10]]
    pairs = find_pairs(images + copies)
    assert {(i, len(images) + i) for i in range(10)} <= pairs


def test_different_phantoms_are_not_linked(images):
    assert len(find_pairs(images)) <= 1  # of 780 pairs


def test_images_without_structure_are_not_similar():
    assert find_pairs([np.zeros((100, 80), np.uint8), np.full((90, 90), 200, np.uint8)]) == set()
    assert groups([]) == {}


@pytest.fixture(scope="module")
def copies_and_groups(images):
    """Thumbnails by key and their groups by brute force: phantoms, changed copies of them, and a chain in which each
    image is like the next one."""
    copies = [np.ascontiguousarray(change(images[i])) for i, change in enumerate(CHANGES.values())]
    chain = [np.roll(images[20], 6 * i, axis=1) for i in range(6)]
    pictures = [*images, *copies, *map(resaved, images[30:]), *chain]
    thumbnails = {f"key {i:03}": thumbnail(picture) for i, picture in enumerate(pictures)}
    return thumbnails, components(list(thumbnails), all_similar_pairs(list(thumbnails.values())))


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("order", [1, -1])
def test_groups_are_the_connected_components_of_all_similar_pairs(copies_and_groups, monkeypatch, block, order):
    monkeypatch.setattr("mgcc_dist.data.duplicates.BLOCK", block)
    thumbnails, expected = copies_and_groups
    assert len(set(expected.values())) < len(thumbnails) - 16
    assert groups(list(thumbnails.items())[::order]) == expected


def test_correlations_are_those_of_all_shifts(images):
    thumbnails = np.stack([thumbnail(image) for image in images])
    rolled = np.roll(thumbnails, (2, -3), axis=(1, 2))
    expected = correlation_matrix(thumbnails, rolled)
    np.testing.assert_allclose(correlations(thumbnails, rolled), np.diag(expected), atol=1e-6)
    np.testing.assert_allclose(correlations(rolled[::-1], thumbnails), np.diag(expected[:, ::-1]), atol=1e-6)
    assert np.diag(expected).min() > 0.8


def test_frames_of_a_video_are_not_all_compared(images, monkeypatch):
    compared = []
    monkeypatch.setattr(
        "mgcc_dist.data.duplicates.correlations",
        lambda first, second: compared.append(len(first)) or correlations(first, second),
    )
    monkeypatch.setattr("mgcc_dist.data.duplicates.BLOCK", 16)
    noise = np.random.default_rng(0)
    frames = [np.clip(images[0] + noise.normal(0, 3, images[0].shape), 0, 255).astype(np.uint8) for _ in range(60)]
    assert set(groups((str(i), thumbnail(frame)) for i, frame in enumerate(frames)).values()) == {"0"}
    assert sum(compared) < 10 * len(frames)  # of 1770 pairs


@pytest.fixture(scope="module")
def busi_thumbnails(busi_root):
    return {item.key: thumbnail(read_grey(item.image)) for item in busi(busi_root).items}


@pytest.fixture(scope="module")
def busi_pairs(busi_thumbnails):
    keys, pairs = list(busi_thumbnails), all_similar_pairs(list(busi_thumbnails.values()))
    assert groups(busi_thumbnails.items()) == components(keys, pairs)
    return {tuple(sorted((keys[i], keys[j]))): correlation for i, j, correlation in pairs}


def test_every_published_busi_near_duplicate_is_found(busi_pairs, data_root):
    with (data_root / "BUSI_near_duplicates.csv").open() as file:
        listed = {tuple(sorted((row["a"], row["b"]))) for row in csv.DictReader(file)}
    both = listed & busi_pairs.keys()
    assert len(both) == len(listed) == 190
    # The list has only copies; the other pairs are other frames of the same lesions, with or without callipers.
    assert 0.7 < len(both) / len(busi_pairs) < 0.8


def test_other_frames_of_a_lesion_are_found_but_not_other_patients(busi_pairs):
    # Checked by eye; none is in the published list.
    same = [
        ("malignant (27)", "malignant (28)"),
        ("benign (240)", "benign (300)"),
        ("malignant (80)", "malignant (81)"),
    ]
    other = [
        ("malignant (208)", "malignant (72)"),
        ("benign (62)", "malignant (1)"),
        ("malignant (177)", "malignant (72)"),
    ]
    assert all(pair in busi_pairs for pair in same)
    assert not any(tuple(sorted(pair)) in busi_pairs for pair in other)
    assert min(busi_pairs.values()) > THRESHOLD


def test_different_patients_of_busbra_are_rarely_linked(data_root):
    root = data_root / "BUSBRA"
    if not root.is_dir():
        pytest.skip(f"needs BUS-BRA in {root}")
    with (root / "bus_data.csv").open() as file:
        patient = {row["ID"]: row["Case"] for row in csv.DictReader(file)}
    files = sorted((root / "Images").glob("*.png"))
    group_of = groups((path.stem, thumbnail(read_grey(path))) for path in files)
    linked = {key: group for key, group in group_of.items() if key != group}  # a group is named after its first image
    wrong = [key for key, group in linked.items() if patient[key] != patient[group]]
    assert len(linked) > 2 * len(wrong)
    assert len(wrong) <= 5  # of 725 images
