"""The script of docs/start/own-data.md splits by patient."""

import re

import numpy as np
from PIL import Image

from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.splits import read_split
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "start" / "own-data.md"


def test_script_keeps_every_patient_on_one_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for patient in range(6):
        for number in range(1, 4):
            for kind in ("images", "masks"):
                file = tmp_path / "mydata" / kind / "benign" / f"case_{patient:03d}_{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 2, (16, 16), dtype=np.uint8) * np.uint8(255)).save(file)
    write_shards(folder(tmp_path / "mydata"), tmp_path / "out" / "mydata")

    (script,) = re.findall(
        r'```python title="split_by_patient.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    exec(compile(script, "split_by_patient.py", "exec"), {})

    split = read_split(tmp_path / "out" / "mydata_split.json")
    train = {key.rpartition("_")[0] for key in (*split.labeled, *split.unlabeled)}
    val = {key.rpartition("_")[0] for key in split.validation}
    assert val
    assert train
    assert not val & train
