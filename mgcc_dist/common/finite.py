"""Stop at the first NaN or infinity, before it becomes a black image or an empty mask."""

from collections.abc import Sequence

from torch import Tensor

from mgcc_dist.common.errors import UserError


def require_finite(values: Tensor, stage: str, items: Sequence[object], remedy: str) -> None:
    """Check a batch `values` [B,...], whose entries are `items`. Waits for the device.

    Raises:
        UserError: a value is NaN or infinite; the message names the stage and the first item.
    """
    finite = values.isfinite().flatten(1).all(dim=1).tolist()
    for item, good in zip(items, finite, strict=True):
        if not good:
            raise UserError(f"{stage}: the result for {item} is not finite (NaN or infinity). {remedy}")
