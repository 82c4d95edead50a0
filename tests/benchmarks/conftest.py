import pytest
import ranks
import torch

from benchmarks import runs_per_gpu, train_step
from mgcc_dist.kernels import bias_free
from mgcc_dist.models import mgcc


@pytest.fixture(autouse=True)
def global_flags():
    """Restore the process-wide flags that settings change."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    perturbations, threads, devices = mgcc.PERTURBATIONS, torch.get_num_threads(), bias_free.DEVICES
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    mgcc.PERTURBATIONS, bias_free.DEVICES = perturbations, devices
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def shared_fork_server(monkeypatch):
    """Fork the processes of benchmarks from the server of all tests: a process has only one."""
    for program in (train_step, runs_per_gpu):
        monkeypatch.setattr(program, "fork_context", ranks.fork_server)
