"""Joins the process group and says what it found."""

import torch

from mgcc_dist.train.process_group import start

accelerator = start()
total = accelerator.reduce(torch.tensor(accelerator.process_index), reduction="sum").item()
kind = accelerator.distributed_type.value
print(f"rank {accelerator.process_index}: world size {accelerator.num_processes} ({kind}), sum of ranks {total}")
