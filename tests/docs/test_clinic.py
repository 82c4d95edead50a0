"""The way from a DICOM cine to DICOM-SEG in docs/how-to/clinic.md works as written."""

import re
import shlex

import numpy as np
from dicom_files import region, save, ultrasound
from predict_runs import save_run

from mgcc_dist import predict
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "clinic.md"


def test_cine_becomes_a_segmentation_that_python_reads(tmp_path, monkeypatch, capsys):
    """With a run of random weights in the place of the tour's."""
    monkeypatch.chdir(tmp_path)
    cine = np.random.default_rng(0).integers(0, 256, (3, 32, 48), dtype=np.uint8)
    save(ultrasound(cine, regions=[region(4, 0, 43, 31)]), tmp_path / "cine.dcm")
    save_run(tmp_path / "out" / "tour" / "unet")

    section = PAGE.read_text(encoding="utf-8").split("## From a cine to DICOM-SEG")[1].split("\n## ")[0]
    (command,) = re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    predict.main([*shlex.split(command)[2:], "--workers", "0"])
    (script,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    exec(compile(script, "clinic.py", "exec"), {})
    assert "Segmentation Storage 3 frames with a lesion" in capsys.readouterr().out
    for name in ("masks/*/0003.png", "overlays/*/0003.png", "contours/*/0001.json", "predictions.csv"):
        assert list((tmp_path / "out" / "clinic").glob(name))
