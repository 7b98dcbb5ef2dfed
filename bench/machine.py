"""The machine that was measured on, in words that name nobody: no host name, no path."""

import os
import platform
import subprocess
from pathlib import Path


def described() -> dict[str, str]:
    """Kernel, iptables, Python, cores and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    version = subprocess.run(["iptables", "-V"], capture_output=True, text=True, check=False).stdout
    return {
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:3]),
        "iptables": version.split()[1] if version else "none",
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def load() -> float:
    """The load average of the last minute: how busy others keep the machine."""
    return os.getloadavg()[0]
