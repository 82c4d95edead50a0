"""A file of weights: safetensors with a JSON header that says what they are, written atomically."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import replacing

HEADER = "mgcc_dist"  # one key, because safetensors writes several in no fixed order


def save_weights(weights: dict[str, Tensor], path: Path, header: dict[str, Any] | None = None) -> None:
    """Write a state dict as safetensors, atomically. `header` is stored as JSON in the file's metadata, under HEADER.

    Raises:
        UserError: the file can't be written, for example because the disk is full.
    """
    with explained(path), replacing(path) as scratch:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        save_file(tensors, scratch, metadata={HEADER: json.dumps(header)} if header else None)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a UserError that states the free space."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = next(parent for parent in path.parents if parent.is_dir())
        raise UserError(
            f"{path}: can't be written ({error}); {shutil.disk_usage(folder).free:,} bytes are free in {folder}. "
            "Earlier checkpoints are kept. Free some space and rerun the same command to resume."
        ) from error
