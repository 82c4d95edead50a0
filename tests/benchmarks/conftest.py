import pytest
import torch

from mgcc_dist.models import mgcc


@pytest.fixture(autouse=True)
def global_flags():
    """Restore the process-wide flags that settings change."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    perturbations, threads = mgcc.PERTURBATIONS, torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    mgcc.PERTURBATIONS = perturbations
    torch.set_num_threads(threads)
