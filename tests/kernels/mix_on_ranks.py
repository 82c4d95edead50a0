"""Started by torchrun on two ranks under TRITON_INTERPRET=1: one step with synchronised norms on halves of a batch."""

import sys

import torch
import torch.distributed as dist
from torch import nn

from mgcc_dist.kernels import convmixer
from mgcc_dist.models.blocks import ConvMixerLayer


def main(saved: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if dist.get_world_size() != 2:
        raise RuntimeError("this test is of two ranks")
    given = torch.load(saved, weights_only=True)
    run = nn.Sequential(*(ConvMixerLayer(2, 5) for _ in range(2))).double().train()
    run.load_state_dict(given["state"])
    fused = convmixer.FusedConvMixer.from_module(nn.SyncBatchNorm.convert_sync_batchnorm(run))
    part = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal on purpose
    x = given["x"][part].requires_grad_()
    y = fused(x)
    y.backward(given["upstream"][part])
    gradients = [parameter.grad for parameter in fused.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    result = {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": list(fused.buffers())}
    torch.save(result, f"{saved}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
