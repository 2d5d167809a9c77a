"""What a device has instructions for."""

import contextlib

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these instructions oneDNN emulates bfloat16, slower than float32.
        with contextlib.suppress(AttributeError, RuntimeError):
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def multiplies_int8(device: torch.device) -> bool:
    """Whether the hardware has instructions for products of bytes summed in 32 bits (VNNI)."""
    if device.type == "cpu":
        with contextlib.suppress(AttributeError, RuntimeError):  # the question is not of torch's documented interface
            return torch.cpu._is_vnni_supported()
    return False
