"""torch and its companions made ready for one device."""

import diffusers
import torch
import transformers

from service.errors import StartupError


def open_device(name: str, cpu_threads: int) -> torch.device:
    """Select a device, and quieten the libraries: what matters of loading is reported by the worker.

    Args:
        name: E.g. "cpu" or "cuda:0".
        cpu_threads: Threads of torch on a CPU.

    Raises:
        StartupError: There is no such device.
    """
    for library in (diffusers.utils.logging, transformers.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    torch.set_num_threads(cpu_threads)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartupError(f"no such device: {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise StartupError(f"device {name!r} does not exist: torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device
