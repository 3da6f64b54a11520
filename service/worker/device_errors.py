"""What torch says when a device lacks memory."""

import torch

_CUDA_MEMORY_ALLOCATION = 2
"""`cudaErrorMemoryAllocation`: a library, and not torch itself, found no memory. Of all CUDA errors it alone passes."""

_NO_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Torch has no class for this."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory for what was asked, and smaller batches might do."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == _CUDA_MEMORY_ALLOCATION
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_CPU_MEMORY in str(error)
