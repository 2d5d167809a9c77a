"""What goes from this computer's memory to a GPU and back, without making either wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on `device`; for a GPU through page-locked memory, since else the host waits."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the CPU, in one copy per number format: each copy waits for all that is queued."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    found: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].flatten() for place in places]).cpu()
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


class Later:
    """A number on its way from a GPU: reading it waits for what was queued before, not for what came since."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def __float__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)
