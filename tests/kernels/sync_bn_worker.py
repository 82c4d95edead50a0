"""One training step with SyncBatchNorm on two ranks, each with part of a batch; run by torchrun in the interpreter."""

import sys

import torch
import torch.distributed as dist
from torch import nn

from mgcc_dist.kernels import convmixer
from mgcc_dist.models.blocks import ConvMixerLayer


def main(inputs_path: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if dist.get_world_size() != 2:
        raise RuntimeError("expected two ranks")
    inputs = torch.load(inputs_path, weights_only=True)
    stack = nn.Sequential(*(ConvMixerLayer(2, 5) for _ in range(2))).double().train()
    stack.load_state_dict(inputs["state"])
    fused = convmixer.FusedConvMixer.from_module(nn.SyncBatchNorm.convert_sync_batchnorm(stack))
    part = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal sizes on purpose
    x = inputs["x"][part].requires_grad_()
    y = fused(x)
    y.backward(inputs["grad_output"][part])
    gradients = [parameter.grad for parameter in fused.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    result = {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": list(fused.buffers())}
    torch.save(result, f"{inputs_path}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
