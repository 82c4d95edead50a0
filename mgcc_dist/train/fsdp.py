"""PyTorch's FSDP2 through Accelerate: which modules are gathered one at a time, and by which methods."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy


def is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def wrap_blocks(module: nn.Module, accelerator: Accelerator) -> None:
    """Make Accelerate wrap the smallest blocks of more than `fsdp_min_num_params` parameters. Call it before `prepare`.

    Wrapping by size, in Accelerate 1.15, also wraps lists of modules, which torch refuses. So the classes to wrap are
    passed instead.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.min_num_params > 0:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(_block_classes(module, plugin.min_num_params))


def register_methods(module: nn.Module) -> None:
    """Let FSDP2 gather weights also for the methods that are called instead of `forward`.

    Those of autoencoders, of encoder-decoder networks and of ConvMixer stacks.
    """
    for each in module.modules():
        for name in ("encode", "decode", "outputs"):
            if isinstance(each, FSDPModule) and hasattr(each, name):
                register_fsdp_forward_method(each, name)


def _block_classes(module: nn.Module, size: int) -> set[str]:
    def is_block(each: nn.Module) -> bool:
        callable_parent = any(True for _ in each.children()) and type(each).forward is not nn.Module.forward
        return callable_parent and sum(parameter.numel() for parameter in each.parameters()) > size

    blocks = [each for each in module.modules() if each is not module and is_block(each)]
    larger = {id(each) for each in blocks if any(inner is not each and is_block(inner) for inner in each.modules())}
    return {type(each).__name__ for each in blocks if id(each) not in larger}
