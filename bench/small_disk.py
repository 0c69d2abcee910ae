"""Small file systems in memory that one process and its server have for themselves, with as much room as is wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
BALLAST = "ballast"


class SmallDisk:
    """A tmpfs that is mounted where a server sees it, and nobody else but through that server's process."""

    def __init__(self, path: Path) -> None:
        """`path` is where the server sees it."""
        self.path = path
        self._pid = 0

    def of(self, pid: int) -> None:
        """Look at it through this process."""
        self._pid = pid

    @property
    def seen(self) -> Path:
        """Where it is seen from here."""
        return Path(f"/proc/{self._pid}/root{self.path}")

    @property
    def used_bytes(self) -> int:
        """What is taken, the ballast left out."""
        stat = os.statvfs(self.seen)
        ballast = self.seen / BALLAST
        held = ballast.stat().st_size if ballast.exists() else 0
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize - held

    def leave(self, room_bytes: int) -> None:
        """Fill all but this much."""
        self.free()
        stat = os.statvfs(self.seen)
        count = stat.f_bavail * stat.f_frsize - room_bytes
        if count > 0:
            with (self.seen / BALLAST).open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, count)

    def free(self) -> None:
        """Give the room back."""
        (self.seen / BALLAST).unlink(missing_ok=True)


def mounting(*disks: SmallDisk, size_bytes: int) -> list[str]:
    """A command that mounts the disks where nobody else sees them, and then becomes the command behind it."""
    mounts = " && ".join(f'mount -t tmpfs -o size={size_bytes} none "$DISK{n}"' for n in range(len(disks)))
    variables = [f"DISK{n}={disk.path}" for n, disk in enumerate(disks)]
    return ["env", *variables, "unshare", "--map-root-user", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]


def may_mount() -> bool:
    """Whether an unprivileged mount namespace, or a privileged one, can be had here."""
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
