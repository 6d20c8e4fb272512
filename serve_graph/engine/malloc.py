"""How the C library keeps the memory that tensors give back."""

import ctypes
import platform
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
"""Source: glibc's malloc.h; the man page of mallopt(3) says what each does."""

_KEPT_BYTES: Final = 2**30
_GROWTH_BYTES: Final = 2**24
_MAPPED_BYTES: Final = 2**25
"""glibc's own upper bound for the threshold on 64 bits; what is larger is mapped and unmapped every time."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for its next tensors. Returns whether it could be told to.

    By default glibc hands the activations of a step back to the kernel as soon as they are freed, in some
    processes and not in others, as their heaps happen to lie; the next step faults every page in again, which
    took a tenth of a small clip's time on the CPU. Only glibc has the call.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _GROWTH_BYTES), (_M_MMAP_THRESHOLD, _MAPPED_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
