"""The only door to the fused ops. Every op has its truth in `reference`; which implementation runs is decided here."""

from worldmodel.kernels.block_attention import BlockPlan, block_attention, plan_blocks
from worldmodel.kernels.reference import attention, modulate, rotate

__all__ = ["BlockPlan", "attention", "block_attention", "modulate", "plan_blocks", "rotate"]
