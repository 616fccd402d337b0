"""DeepSpeed's steps without waits of the host for the device that its arithmetic has no need of."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor

NORM_MARK = "mask_nan_or_inf_with_val_inplace"  # DeepSpeed's, of a gradient's norm that is not finite


def end_reductions_without_waiting(optimizer: stage_1_and_2.DeepSpeedZeroOptimizer) -> None:
    """Let the end of a backward make the device's streams wait for one another, in place of the host for the device.

    DeepSpeed 0.19 reduces gradients on a stream of its own (`overlap_comm`), and in stages 1 and 2 waits for the whole
    device at the end of each backward that reduced. What follows needs the reduced gradients, or takes memory that is
    free from then on, and all of it is of the current stream: it is enough that this one waits for the other.
    """
    end, accelerator = optimizer.independent_gradient_partition_epilogue, get_accelerator()

    def order(device: object = None) -> None:
        accelerator.current_stream().wait_stream(optimizer.reduction_stream)

    def end_in_order() -> None:
        accelerator.synchronize = order  # this object's, in front of its class's
        try:
            end()
        finally:
            del accelerator.synchronize

    optimizer.independent_gradient_partition_epilogue = end_in_order


def mark_norms_without_waiting() -> None:
    """Let DeepSpeed mark a norm that is not finite without a copy; a version without that function is left as it is.

    DeepSpeed 0.19 copies the mark, -1, from the host to the device for each group of weights at each update, and the
    host waits for each copy.
    """
    for module in (stage_1_and_2, stage3):
        if hasattr(module, NORM_MARK):
            setattr(module, NORM_MARK, _mark)


def _mark(norm: Tensor, device: object = None, val: float = -1.0) -> None:
    """norm: float, any shape; what is infinite or no number becomes `val`, in place. device: the norm's, of no use."""
    norm.masked_fill_(~norm.isfinite(), val)
