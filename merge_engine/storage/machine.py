"""Which machine this is."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def gives_memory_back() -> bool:
    """Whether this is a virtual machine whose host takes free memory away (free page reporting of virtio's balloon).

    Memory that was free for some seconds is then slow to touch: it has to come from the host again.
    """
    reporting = 5  # the number of the feature, VIRTIO_BALLOON_F_REPORTING
    try:
        return any(
            features.read_text()[reporting : reporting + 1] == "1"
            for features in Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
        )
    except OSError:
        return False


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
