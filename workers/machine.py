"""Makes torch fit the machine: threads, device, and arithmetic that does not depend on luck."""

from __future__ import annotations

import torch

from service.contract.settings import SettingsError
from workers.settings import WorkerSettings


def prepare(settings: WorkerSettings) -> str:
    """Set this process's threads and return the device to compute on. Raises SettingsError."""
    torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"CATMERGE_DEVICE is {settings.device!r}, which torch can't use here: {error}") from None
    return device


def device_bytes(device: str) -> int | None:
    """The memory of a GPU; None for the CPU, whose memory is the machine's."""
    if torch.device(device).type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def allow_tf32(allowed: bool) -> None:
    """Whether an NVIDIA GPU may round what float32 products and convolutions multiply to 10 bits (torch: TF32).

    torch itself would let convolutions do so.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
