"""How this process deals with freed memory."""

import contextlib
import ctypes

# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_BLOCK = -1, -3, 2**30


def keep_freed_memory() -> None:
    """Keep glibc from handing large freed blocks back to the kernel: VGG16 asks for the same ones image after image.

    Getting them back costs page faults, a third of the time of a batch on a CPU. Elsewhere than on glibc: no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BLOCK)
