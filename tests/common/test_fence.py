"""A process whose run folder was taken over by a later start of the run no longer writes there."""

import json
import re
import shutil

import pytest
from accelerate import Accelerator

from mgcc_dist.common import fence
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.fence import FENCE, check_fence, is_fenced_off, raise_fence


def take_over(folder):
    """Do what a later start on another node does with the folder's fence."""
    number = json.loads((folder / FENCE).read_text())["number"]
    (folder / FENCE).write_text(json.dumps({"number": number + 1, "holder": "pid 7 on n2, Slurm job 12"}))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_every_start_increases_the_number_and_the_latest_one_may_write(tmp_path, accelerator):
    check_fence(tmp_path)  # a folder that this process has not opened
    for number in (1, 2):
        raise_fence(tmp_path, accelerator)
        assert json.loads((tmp_path / FENCE).read_text())["number"] == fence.fence_number(tmp_path) == number
    check_fence(tmp_path)


def test_an_earlier_start_is_refused_and_told_who_has_taken_over(tmp_path, accelerator):
    raise_fence(tmp_path, accelerator)
    take_over(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: was taken over by pid 7 on n2, Slurm job 12")):
        check_fence(tmp_path)
    assert is_fenced_off(tmp_path / "." / "")  # the same folder under another name
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert is_fenced_off(tmp_path)
