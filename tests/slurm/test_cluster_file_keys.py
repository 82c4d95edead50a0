"""Values of a cluster file that Slurm would misread, or that would break the jobs, are refused with file and key."""

import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.slurm.resources import load_cluster_file, merge_resources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('time: "soon"', "time: 'soon' is not a time limit"),
        ('{time: "0:02:00", signal_seconds: 120}', "signal_seconds 120 is not shorter than time 0:02:00, so a run"),
        ("extra: {reservation: null}", "extra: reservation must be true, a string or a number, got None. Leave it out"),
        ("extra: {exclusive: false}", "extra: exclusive must be true, .* got False"),
        ("extra: {partition: gpu}", r"extra: partition would replace the key partition\. Set partition itself"),
        ("extra: {mem: 8G}", r"extra: mem would replace the key memory_gb\. Set memory_gb itself"),
        ("extra: {output: log}", r"extra: output is set for each job by `mgcc slurm submit`\. Remove it"),
        ("container: {runtime: apptainer, image: ''}", r"container\.image must not be empty"),
        ("container: {runtime: apptainer}", r"container: image is missing\. Set runtime \(apptainer, .*\) and image"),
        ("qos: a\nqos: b", "duplicate key 'qos' in line 2"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{message}"):
        merge_resources([(str(path), load_cluster_file(str(path)))])


def test_other_options_of_sbatch_are_passed_on(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extra: {exclusive: true, reservation: mri, mem_per_cpu: 4G, nice: 100}")
    options = merge_resources([(str(path), load_cluster_file(str(path)))]).sbatch_options()
    assert {"--exclusive", "--reservation=mri", "--mem-per-cpu=4G", "--nice=100"} <= set(options)
