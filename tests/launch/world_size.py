"""Print rank, world size and backend as Accelerate sees them. test_configs.py runs it."""

import torch
from accelerate import Accelerator

accelerator = Accelerator()
total = accelerator.reduce(torch.ones(1, device=accelerator.device)).item()
backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"
# One write per line, so that the ranks' lines don't mix.
print(f"rank {accelerator.process_index} of {int(total)} {backend} {accelerator.device.type}\n", end="", flush=True)
accelerator.end_training()
