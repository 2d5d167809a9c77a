"""How this process deals with freed memory, and how it is told that there is too little."""

import contextlib
import ctypes
import re

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_BLOCK = -1, -3, 2**30

# What `keep_freed_memory` does, for a process that is started with these variables, and for its other threads, too:
# otherwise they have pools of their own, which large blocks never come from.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_BLOCK),
    "MALLOC_TRIM_THRESHOLD_": str(LARGEST_BLOCK),
    "MALLOC_ARENA_MAX": "1",
}

# What torch's errors say where they are no OutOfMemoryError: its allocators for CPUs and Apple's GPUs, the CUDA driver,
# cuDNN (8, 9) and cuBLAS, whose handle also needs memory and only says that it has not been initialised.
_TOO_LITTLE = re.compile(
    "DefaultCPUAllocator: can't allocate memory|MPS backend out of memory|CUDA error: out of memory"
    "|CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"
    "|failed to map segment from shared object|cannot allocate memory in static TLS block"  # while torch is imported
)


def keep_freed_memory() -> None:
    """Keep glibc from handing large freed blocks back to the kernel: VGG16 asks for the same ones image after image.

    Getting them back costs page faults, a third of the time of a batch on a CPU. Elsewhere than on glibc: no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BLOCK)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, numpy's and torch's ways to say it. (By name: importing torch here would slow down --help.)"""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _TOO_LITTLE.search(str(error)) is not None
    )
