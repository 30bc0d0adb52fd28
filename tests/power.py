"""A workspace whose runs lie on a disk of their own, the power of which can be cut (Linux, as root).

The file system is ext4 in a file, mounted by loop. EXT4_IOC_SHUTDOWN without a flush of the log drops what was not
synced, as a power cut does; then the disk is mounted anew, and ext4 recovers from its journal.
"""

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path

from test_kill_tiny import Workspace

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs/ext4/ext4.h


def possible() -> bool:
    "Whether this process may mount a disk."
    return hasattr(os, "geteuid") and os.geteuid() == 0 and Path("/dev/loop-control").exists()


class Cuttable(Workspace):
    def __init__(self, root: Path, config: str = "tiny", size: int = 4 << 30):
        super().__init__(root, config)
        self.image, self.disk = root / "disk.img", root / "runs"
        with self.image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", str(self.image)], check=True)
        self.disk.mkdir()
        self.mount()

    def mount(self):
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.disk)], check=True)

    def cut(self):
        "From now on nothing reaches the disk, not even what was written and not synced."
        folder = os.open(self.disk, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def mend(self):
        "The power is back, once all that held the disk is gone."
        self.leave()
        self.mount()

    def leave(self):
        "Take the disk off."
        for _ in range(100):
            if subprocess.run(["umount", str(self.disk)], capture_output=True).returncode == 0:
                return
            time.sleep(0.2)
        raise OSError(f"{self.disk} is held")
