"""What the machine under a CPU run is: who made its processor, how much memory this process may have."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def processor() -> str:
    """The maker of the processor, "AuthenticAMD" or "GenuineIntel" for two; "" where nothing says."""
    for line in _lines(_CPUINFO):
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    if sys.platform != "win32":  # elsewhere it starts a process to be told no maker
        return ""
    return platform.processor().rpartition(" ")[2]  # "AMD64 Family 25 Model 1, AuthenticAMD"


def memory() -> int | None:
    """Bytes that this process may use: the machine's, or its container's where that is less. None: nothing says."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # not on Windows
        return None
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_group_limits())


def _group_limits() -> list[int]:
    """The limits of the control groups (version 1 or 2) that this process is in, and of all above them."""
    found = [2**63]
    for line in _lines(_OWN_GROUPS):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (_GROUPS, "memory.max")
        # Inside a container the path may be the host's, and its own group's files lie at the top.
        own = top / path.lstrip("/")
        places = [place for place in (own, *own.parents) if place.is_relative_to(top)]
        words = [word for place in places for word in _lines(place / name)[:1]]
        found += [int(word) for word in words if word.isdigit()]  # "max" is none
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
