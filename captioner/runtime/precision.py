"""Number formats: of the CNN when it captions, and of training."""

from typing import Literal

import torch
from torch import nn

from captioner.errors import InputError
from captioner.runtime.hardware import multiplies_bf16

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inference_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The CNN's number format for captioning; "auto" is bfloat16 where the hardware multiplies it natively."""
    if precision != "auto":
        return PRECISIONS[precision]
    if multiplies_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of autocast in training; "auto" is bfloat16 where the hardware multiplies it natively."""
    if precision == "fp16":
        raise InputError(
            "--precision fp16 cannot train: its gradients underflow", expected="auto, fp32 or bf16 (same speed as fp16)"
        )
    if precision != "auto":
        return PRECISIONS[precision]
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def keep_float32(dtype: torch.dtype) -> None:
    """Let what is asked to be float32 be so on a GPU too, where cuDNN's default rounds factors to 10 bits (TF32)."""
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def prepare_for_inference(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring a CNN's weights, in place, to the number format and memory layout that convolve fastest."""
    module.to(dtype).to(memory_format=torch.channels_last)
