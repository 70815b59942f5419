"""Checks of the machine before anything is started; each says in one line what is short."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

# Three processes that import torch, the weights and 2 GiB of KV cache: 3.2 GiB at the peak.
MEMORY_BYTES = 4 * 2**30
HOST = "127.0.0.1"


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line for the operator, ``detail`` what the log says."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise DemoError when the file system of ``folder`` has less than ``needed_bytes`` free."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed_bytes:
        raise DemoError(f"disk: {free / 1e9:.2f} GB free in {nearest}, {needed_bytes / 1e9:.2f} GB needed")


def check_memory(needed_bytes: int = MEMORY_BYTES, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raise DemoError when less than ``needed_bytes`` of memory is available.

    ``meminfo`` is read as proc(5) describes; a system without it is not checked.
    """
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if available < needed_bytes:
                raise DemoError(
                    f"memory: {available / 2**30:.1f} GiB available, {needed_bytes / 2**30:.0f} GiB needed; "
                    "stop something first"
                )


def choose_port(port: int | None, host: str = HOST) -> int:
    """``port`` itself when it can be listened on, a free one for None. Raises DemoError when it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port or 0))
        except OSError as error:
            raise DemoError(f"port {port} on {host} cannot be used ({error.strerror}); give another one") from None
        return int(listener.getsockname()[1])
