"""The commands of docs/how-to/evaluation.md work in their order."""

import re
import shlex

from PIL import Image
from predict_runs import noise, save_run

from mgcc_dist import evaluate, predict
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.splits import make_split, write_split
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "evaluation.md"


def test_commands_work_as_written(tmp_path, monkeypatch, no_pictures):
    """With a run of random weights in the place of the tour's."""
    monkeypatch.chdir(tmp_path)
    shards = write_shards(Phantoms(count=30, seed=0, size=32), tmp_path / "out" / "tour" / "shards")
    split = make_split(shards.records, 0, validation=12, labeled=9, grouped=False, name="tour")
    write_split(tmp_path / "out" / "tour" / "split.json", split)
    save_run(tmp_path / "out" / "tour" / "unet")

    images = tmp_path / "out" / "tour" / "images"
    images.mkdir()
    Image.fromarray(noise(40, 30)).save(images / "a.png")

    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) == 11
    for line in lines:
        words = shlex.split(line)
        command, begin = ("evaluate", words.index("mgcc_dist.evaluate")) if words[0] == "torchrun" else (words[1], 1)
        program = {"evaluate": evaluate, "predict": predict}[command]
        program.main([*words[begin + 1 :], "--workers", "0"])
    for name in ("evaluation", "val", "other", "robustness", "uncertainty", "temperature", "calibrated", "all"):
        assert (tmp_path / "out" / "tour" / name / "summary.json").is_file()
    assert (tmp_path / "out" / "tour" / "reviewed" / "uncertainty" / "a.png").is_file()
