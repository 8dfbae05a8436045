"""Which device a network runs on."""

import torch

from darkroom.errors import InputError


def checked_device(name: str | torch.device) -> torch.device:
    """A device by its name; InputError if there is no such name, or none on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(name)!r} cannot be used here: {reason}") from error
    return device


def default_device() -> torch.device:
    """The accelerator of this machine if it has one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
