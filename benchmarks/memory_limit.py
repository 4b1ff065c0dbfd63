"""A limit of memory set from outside a process: a control group, its page cache counted in."""

import os
import subprocess
import time
from pathlib import Path

ROOT_V1, ROOT_V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class MemoryGroup:
    """A child of this process's own memory group, removed by `close`; for Linux, versions 1 and 2.

    Raises OSError where it cannot be made, which takes the rights for it.
    """

    def __init__(self, limit: int):
        own = {line.split(":")[1]: line.split(":")[2] for line in _own().splitlines()}
        first = ROOT_V1.is_dir()
        root, place = (ROOT_V1, own["memory"]) if first else (ROOT_V2, own[""])
        self.folder = root / place.lstrip("/") / f"saap-{os.getpid()}"
        self._peak = "memory.max_usage_in_bytes" if first else "memory.peak"
        self.folder.mkdir()
        name = "memory.limit_in_bytes" if first else "memory.max"
        (self.folder / name).write_text(str(limit))

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """The command, begun inside the group."""
        script = 'echo $$ > "$0" && exec "$@"'
        inside = ["sh", "-c", script, str(self.folder / "cgroup.procs"), *command]
        return subprocess.run(inside, **options)

    @property
    def peak(self) -> int:
        """The most bytes that it had at a time, pages of files counted in."""
        return int((self.folder / self._peak).read_text())

    def close(self) -> None:
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:  # the last process is still going
                time.sleep(0.1)


def _own() -> str:
    return Path("/proc/self/cgroup").read_text()


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status must tell RssAnon; got none")
