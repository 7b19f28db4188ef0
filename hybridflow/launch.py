"""Training runs as processes of their own: one on each device at a time, each resumable."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybridflow.cli import take_option
from hybridflow.errors import InputError
from hybridflow.run import RunFolder

__all__ = ["Job", "launch", "locked", "terminated_as_interrupted", "threads_per_run"]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One run of `python -m hybridflow.train`."""

    arguments: tuple[str, ...]
    """Its command line, but for --device and --out."""
    folder: RunFolder
    log: Path
    """File to which what it prints is appended."""

    @property
    def finished(self) -> bool:
        """Whether it has been trained to its end."""
        return self.folder.results.exists()

    def start(self, device: str, threads: int, keep: tuple[int, ...] = ()) -> subprocess.Popen:
        """Start it, or continue it from its checkpoint; a folder without one is made anew.

        The process has a group of its own: Ctrl-C in a terminal does not reach it.
        """
        path = self.folder.path
        arguments = [*self.arguments, "--out", str(path)]
        if self.folder.checkpoint.exists():
            data_dir, _ = take_option(list(self.arguments), "--data-dir")
            arguments = ["--resume", str(path), *(["--data-dir", data_dir] if data_dir else [])]
        elif path.exists():
            shutil.rmtree(path)
        for parent in (path.parent, self.log.parent):
            parent.mkdir(parents=True, exist_ok=True)
        # A progress bar has no place in a log; metrics.csv tells how far the run is.
        settings = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hybridflow.train", *arguments, "--device", device],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                process_group=0,
                pass_fds=keep,
            )

    def last_words(self) -> str:
        """The last line it printed."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def launch(
    jobs: Sequence[Job], devices: Sequence[str], keep: tuple[int, ...] = ()
) -> Generator[tuple[Job, int], None, None]:
    """Run jobs, one on each of `devices` at a time; yields each with its exit status as it ends.

    When the generator is left early, by Ctrl-C for example, the runs at work are told to stop by
    SIGTERM and awaited: they save their checkpoints, and the next launch continues them.

    Args:
        jobs: what to run, in this order.
        devices: as --device takes them; one named n times runs n jobs at once.
        keep: file descriptors that the processes inherit.
    """
    waiting, free, threads = deque(jobs), deque(devices), threads_per_run(len(devices))
    active: dict[subprocess.Popen, tuple[Job, str]] = {}
    try:
        while waiting or active:
            while waiting and free:
                job, device = waiting.popleft(), free.popleft()
                active[job.start(device, threads, keep)] = job, device
            for process in [p for p in active if p.poll() is not None]:
                job, device = active.pop(process)
                free.append(device)
                yield job, process.returncode
            time.sleep(_POLL_SECONDS)
    finally:
        for process in active:
            process.terminate()
        for process in active:
            process.wait()


def threads_per_run(runs: int) -> int:
    """Threads of each of so many runs at once, which share OMP_NUM_THREADS, or all processors."""
    shared = os.environ.get("OMP_NUM_THREADS", "")
    total = int(shared) if shared.isdecimal() else len(os.sched_getaffinity(0))
    return max(1, total // runs)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep others from launching runs in a folder; yields a file descriptor for the runs to inherit.

    The lock lasts until they have ended too, even if this process is killed.

    Raises:
        InputError: the folder cannot be made, or others are at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--out: cannot write in {folder}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out: runs are at work in {folder}; wait, or stop them") from None
        yield file.fileno()


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
