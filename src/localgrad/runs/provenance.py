"""The origin of a result: device, versions, commit, date."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """The origin of a result: the fields `device` (its name), `versions`, `commit` and `date` of `Result`."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    versions = {package: version(package) for package in ("torch", "torchvision", "lightning")}
    return {
        "device": name,
        "versions": {"localgrad": version("localgrad"), "python": platform.python_version(), **versions},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    """Name of the CPU, with the number of threads that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} thread(s)"


def _commit() -> str | None:
    """Commit of localgrad's code, with `-dirty` if it was changed; None if this file is in no git repository."""
    source = Path(__file__)
    git = ["git", "-C", str(source.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True, timeout=10)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
