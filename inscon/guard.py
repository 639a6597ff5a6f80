"""What every command shares: one sentence instead of a traceback, outputs tried before the work, files that appear when they
are whole, one process per folder, workers that end with their parent.

    guard.run_script("train.py", lambda: main(sys.argv[1:]))
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import BinaryIO, NoReturn

REFUSALS = (ValueError, OSError, FloatingPointError, MemoryError)
"""What reaches the user as a sentence; OSError includes ChildProcessError and TimeoutError."""
_READ_S = 3.0  # Ctrl-C reaches a rank twice, also from torchrun: what follows the sentence sooner is no answer.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # The last is Slurm's, before the end of a job.
_ON_CTRL_C = b"\nFinishing the step, then a checkpoint. Ctrl-C again stops at once and loses the steps since the last checkpoint.\n"

# Importing torchvision asks for the user's name, and fails where there is none, as in a container by `docker run -u 1234`.
os.environ.setdefault("USER", str(os.getuid()))


def run_script(name: str, main: Callable[[], object]) -> NoReturn:
    """Run a command and end the process: status 0, or the int that `main` returns; 1 after a refusal, 130 after Ctrl-C.

    A refusal is one line, "`name`: what was found and the remedy", or as the user called it, "inscon train". Under torchrun, ranks
    that would say the same say it once, and only the one that says it fails. INSCON_TRACEBACK=1 shows where it came from instead.
    """
    name = sys.argv[0] if sys.argv[0].startswith("inscon ") else name
    try:
        returned = main()
        status = returned if isinstance(returned, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt as stopped:
        status = 130 if say_once(f"{name}: {stopped.args[0] if stopped.args else 'stopped by Ctrl-C'}") else 0
    except (*REFUSALS, RuntimeError) as error:
        of_collective = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Dist" in type(error).__name__)
        of_memory = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
        if os.environ.get("INSCON_TRACEBACK") or not (of_collective or of_memory or isinstance(error, REFUSALS)):
            raise
        about = sentence_of(error)
        if of_memory:
            room = re.search(r"allocate [\d.]+ \w+", str(error))
            about = f"memory ran out, no room to {room[0] if room else 'go on'}; set a smaller --batch-size"
        if of_collective:
            time.sleep(5)  # until the rank that ended has said why, and torchrun has stopped the others
            about = "another rank is gone, look for its own message, and run again"
        status = 1 if say_once(f"{name}: {about}") else 0
    raise SystemExit(status)


def share_cores(load: Path = Path("/proc/loadavg")) -> None:
    """Let torch's threads sleep while they wait for each other, if others compute on this machine now; before torch is imported.
    Alone, spinning is faster, but two jobs on the same two cores slowed each other 25 times (docs/measured.md)."""
    with contextlib.suppress(OSError):  # no Linux
        looks = [time.sleep(0.01) or int(load.read_text().split()[3].partition("/")[0]) for _ in range(5)]
        if min(looks) > 1:  # this one and another
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def sentence_of(error: BaseException) -> str:
    """An error in one line; of the system's own ones the file and the reason, without "[Errno 28]"."""
    if isinstance(error, OSError) and error.errno is not None:
        about = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{about}{error.strerror}" + ("; free some and run again" if error.errno == errno.ENOSPC else "")
    if isinstance(error, MemoryError) and not error.args:
        return "memory ran out"
    return " ".join(str(error).split("\n")) or type(error).__name__


def kind_and_first_line(error: Exception) -> str:
    """Of what a compiler of other people's finds to say."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def say_once(sentence: str) -> bool:
    """One line on stderr; of torchrun's ranks on a machine only the first one with the same sentence prints it, and gets True."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = Path(error_file).parent.parent / f"said-{hashlib.sha256(sentence.encode()).hexdigest()}"
        about = {"message": sentence, "timestamp": int(time.time())}
        try:
            said.touch(exist_ok=False)  # in torchrun's folder of this attempt, which torchrun removes
            Path(error_file).write_text(json.dumps(about))  # for torchrun's table
        except FileExistsError:
            return False
        except OSError:
            pass  # then every rank says it
    print(sentence, file=sys.stderr, flush=True)
    return True


@contextlib.contextmanager
def say_if_long(what: str, after_s: float = 4.0) -> Iterator[None]:
    """One line on stderr, from the first rank of a machine, where the block takes longer: what the user waits for."""
    timer = threading.Timer(after_s, print, [f"Waiting for {what} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_output_file(path: Path, flag: str = "--out") -> None:
    """ValueError, naming `flag`, unless a file can be written at `path`. Makes its folder, leaves an older file as it is."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder where a file is to be written; set {flag} to a file name")
    check_output_folder(Path(path).parent, flag, path)


def check_output_folder(folder: Path, flag: str = "--out", path: Path | None = None) -> None:
    """ValueError, naming `flag`, unless files, such as `path`, can be written in the folder, which is made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"{path or folder} cannot be written ({error.strerror}); set another {flag}") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError, which of a write to an open file has none, the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk; until then it has one of this process's own, and an error leaves
    nothing of it. OSError has the file's name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    unfinished = path.with_name(f"{path.name}.{own}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # Of a full disk torch.save says "unexpected pos".
        hidden = error.__context__ if type(error) is RuntimeError else error
        if not isinstance(hidden, OSError) or hidden.errno is None:
            raise
        raise type(hidden)(hidden.errno, hidden.strerror, str(path)) from None


def remove_unfinished(folder: Path, pattern: str = "*") -> None:
    """Take away what killed processes left of `whole_file`; the caller holds the folder's lock."""
    for path in Path(folder).glob(f"{pattern}.unfinished"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_process(folder: Path, flag: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds `folder` against other processes, until this one ends; it is made, and one that was new goes again if it is empty.
    ValueError, naming `flag`, where another one has it for `wait_s` more seconds (and which), or nothing can be written there."""
    folder, deadline = Path(folder), time.monotonic() + wait_s
    new = not folder.exists()
    check_output_folder(folder, flag)
    while isinstance(lock := _lock(folder / ".lock"), str):
        if time.monotonic() >= deadline:
            raise ValueError(f"another process works in {folder} ({lock}); wait until it ends, or set another {flag}")
        time.sleep(0.1)
    try:
        yield
    finally:
        with lock, contextlib.suppress(OSError):
            (folder / ".lock").unlink()
            if new:
                folder.rmdir()


def _lock(path: Path) -> BinaryIO | str:
    """The locked file, open, with this process's name in it; or who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            return file.read().decode() or "unknown"
    except OSError:
        pass  # the file system knows no locks
    if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
        file.close()
        return _lock(path)  # the former holder removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


class StopRequest:
    """Set by one of `STOPS`, read by a loop between two steps. Made by `stop_requests`."""

    requested, name = False, "another rank"
    final = False  # Set by the loop when nothing but the last checkpoint is left to do: nothing interrupts it.
    _said_at: float | None = None

    def __call__(self, number: int, _frame: object) -> None:
        if not self.requested:
            self.requested, self.name = True, signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if self._said_at is None:
            self._said_at = time.monotonic()
            with contextlib.suppress(OSError):  # not by print, which the signal may have interrupted
                os.write(2, _ON_CTRL_C if os.environ.get("LOCAL_RANK", "0") == "0" else b"")
        elif time.monotonic() - self._said_at > _READ_S and not self.final:
            raise KeyboardInterrupt("stopped by the second Ctrl-C, at once")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While it runs, SIGTERM and SIGUSR1, which Slurm, systemd and torchrun repeat, and Ctrl-C only ask to stop; a second Ctrl-C
    raises KeyboardInterrupt. In another thread than the main one they do what they did."""
    stop, here = StopRequest(), threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, stop) for number in (STOPS if here else ())}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stops() -> None:
    """For the rest of a process that has stopped as asked: those who ask repeat themselves."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """For a worker process, at its start: when its parent is gone, however, it ends."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def check_ranges(settings: object, **ranges: float | tuple[float, float]) -> None:
    """ValueError, naming the flag, for a setting outside its (least, most), or below its least; None is no value."""
    for name, allowed in ranges.items():
        found = getattr(settings, name)
        least, most = allowed if isinstance(allowed, tuple) else (allowed, math.inf)
        values = found if isinstance(found, tuple) else (found,)
        fits = [v is None or (isinstance(v, Real) and least <= v <= most) for v in values]  # which NaN doesn't
        if not fits or not all(fits):
            said = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"--{name.replace('_', '-')} must be {said}. Found: {found}")
