"""What every command shares: one sentence instead of a traceback, outputs tried before the work, files that appear when they
are whole, one process per folder, workers that end with their parent.

    guard.run_script("train.py", lambda: main(sys.argv[1:]))
"""

import contextlib
import errno
import fcntl
import getpass
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

REFUSALS = (ValueError, OSError, FloatingPointError, MemoryError)
"""What reaches the user as a sentence; OSError includes ChildProcessError and TimeoutError."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What a file system says that knows no locks."""


def run_script(name: str, main: Callable[[], object]) -> NoReturn:
    """Run a command and end the process: status 0, or the int that `main` returns; 1 after a refusal, 130 after Ctrl-C.

    A refusal is one line, "`name`: what was found and the remedy". Under torchrun, ranks that would say the same say it once, and
    only the one that says it fails. INSCON_TRACEBACK=1 shows where it came from instead.
    """
    try:
        returned = main()
        status = returned if isinstance(returned, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except REFUSALS as error:
        if os.environ.get("INSCON_TRACEBACK"):
            raise
        status = 1 if say_once(f"{name}: {sentence_of(error)}") else 0
    except RuntimeError as error:
        if not _is_lost_rank(error) or os.environ.get("INSCON_TRACEBACK"):
            raise
        status = 0 if _another_rank_spoke() else 1
        if status:
            say_once(f"{name}: another rank is gone, look for its own message, and run again")
    except KeyboardInterrupt as stopped:
        status = 130 if say_once(f"{name}: {stopped.args[0] if stopped.args else 'stopped by Ctrl-C'}") else 0
    raise SystemExit(status)


def sentence_of(error: BaseException) -> str:
    """An error in one line; of the system's own ones the file and the reason, without "[Errno 28]"."""
    if isinstance(error, OSError) and error.errno is not None:
        about = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{about}{error.strerror}{_free_space(error)}"
    if isinstance(error, MemoryError) and not error.args:
        return "memory ran out"
    return " ".join(str(error).split("\n")) or type(error).__name__


def say_once(sentence: str) -> bool:
    """One line on stderr; of torchrun's ranks on a machine only the first one with the same sentence prints it, and gets True."""
    said = _said_by_ranks()
    if said is not None:
        try:
            (said / hashlib.sha256(sentence.encode()).hexdigest()).touch(exist_ok=False)
            about = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(about))  # for torchrun's table
        except FileExistsError:
            return False
        except OSError:
            pass
    print(sentence, file=sys.stderr, flush=True)
    return True


def _said_by_ranks() -> Path | None:
    """What ranks of this machine have said, a file for each; in torchrun's folder of this attempt, which torchrun removes."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return None
    said = Path(error_file).parent.parent / "said"
    with contextlib.suppress(OSError):
        said.mkdir(exist_ok=True)
    return said


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether this is what a collective says when another rank has ended."""
    return "gloo" in str(error) or any(base.__name__ == "DistError" for base in type(error).__mro__)


def _another_rank_spoke() -> bool:
    """Looked at for a second: a rank leaves the group before it says why."""
    said, deadline = _said_by_ranks(), time.monotonic() + 1
    while said is not None and not (spoke := said.is_dir() and any(said.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return said is not None and spoke


# ------------------------------------------------------------------------------------------------------------ outputs


def check_output_file(path: Path, flag: str = "--out") -> None:
    """ValueError, naming `flag`, unless a file can be written at `path`. Makes its folder, leaves an older file as it is."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder where a file is to be written; set {flag} to a file name")
    _try_folder(path.parent, path, flag)


def check_output_folder(path: Path, flag: str = "--out") -> None:
    """ValueError, naming `flag`, unless files can be written in the folder `path`, which is made."""
    _try_folder(Path(path), Path(path), flag)


def _try_folder(folder: Path, target: Path, flag: str) -> None:
    probe = folder / f".{_own_name()}.try"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({sentence_of(error)}); set another {flag}") from None


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
def whole_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and, if `durable`, on the disk. Left by an error, nothing stays of it.

    What is under construction has a name of its own, so two processes never write one file. OSError, with the file's name, also
    where a library hides it (torch.save says "unexpected pos" of a full disk).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{_own_name()}.unfinished")
    file = None
    try:
        file = _Remembering(open(unfinished, "wb"))  # noqa: SIM115
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        file.close()
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        hidden = error if isinstance(error, OSError) else file and file.error
        if hidden is None or hidden.errno is None:
            raise
        raise type(hidden)(hidden.errno, hidden.strerror, str(path)) from None
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


class _Remembering:
    """A binary file that keeps the OSError of a write, for callers whose library turns it into something else."""

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def remove_unfinished(folder: Path, pattern: str = "*") -> None:
    """Take away what killed processes left of `whole_file`; the caller holds the folder's lock."""
    for path in Path(folder).glob(f"{pattern}.unfinished"):
        path.unlink(missing_ok=True)


def _own_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"


def _free_space(error: OSError) -> str:
    if error.errno != errno.ENOSPC or not isinstance(error.filename, str):
        return ""
    folder = next(folder for folder in Path(error.filename).absolute().parents if folder.is_dir())
    return f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free); free some and run again"


# ---------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def only_process(folder: Path, flag: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds `folder`, which is made, against other processes; ends with the process that holds it.

    ValueError, naming `flag`, where another one has it (and which), or nothing can be written there. A folder that was made here
    and is still empty at the end goes again. Where the file system knows no locks nothing is held.
    """
    folder = Path(folder)
    new = not folder.exists()
    check_output_folder(folder, flag)
    path = folder / ".lock"
    file = take_lock(path, fcntl.LOCK_EX, wait_s)
    if isinstance(file, str):
        raise ValueError(f"another process works in {folder} ({file}); wait until it ends, or set another {flag}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if new:
                folder.rmdir()
        file.close()


def take_lock(path: Path, kind: int, wait_s: float = 0.0) -> BinaryIO | str:
    """The locked file, open, with this process's name in it; or who has held it for `wait_s` seconds. Folders are made."""
    deadline = time.monotonic() + wait_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown"
            file.close()
            if time.monotonic() >= deadline:
                return holder
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            return file
        file.close()  # the former holder removed it


class StopRequest:
    """Set by SIGTERM or Ctrl-C, read by a loop between two steps. Made by `stop_requests`."""

    requested, name = False, "another rank"
    final = False
    """Set by the loop when nothing but the last checkpoint is left to do: nothing interrupts it."""
    _said_at: float | None = None

    def __call__(self, number: int, _frame: object) -> None:
        again = number == signal.SIGINT and self._said_at is not None and time.monotonic() - self._said_at > _READ_S
        if again and not self.final:
            raise KeyboardInterrupt("stopped by the second Ctrl-C, at once")
        if not self.requested:
            self.requested, self.name = True, signal.Signals(number).name
        if number == signal.SIGINT and self._said_at is None and os.environ.get("LOCAL_RANK", "0") == "0":
            self._said_at = time.monotonic()
            with contextlib.suppress(OSError):
                os.write(2, _ON_CTRL_C)  # not by print, which the signal may have interrupted


_READ_S = 3.0
"""Ctrl-C reaches a rank twice, from the terminal and from torchrun: what follows the sentence sooner is no answer to it."""
_ON_CTRL_C = b"\nFinishing the step, then a checkpoint. Ctrl-C again stops at once and loses the steps since the last checkpoint.\n"


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While it runs, SIGTERM and Ctrl-C only ask to stop.

    SIGTERM never does more: Slurm and systemd send it to every process of a job, and torchrun once more. A second Ctrl-C raises
    KeyboardInterrupt, if the first one was answered on the screen.
    """
    stop = StopRequest()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stops() -> None:
    """For the rest of a process that has stopped as asked: those who ask repeat themselves."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(*_: object) -> None:
    """For a worker process, at its start (a DataLoader's worker_init_fn, say): when its parent is gone, however, it ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _name_the_user() -> None:
    """Importing torchvision fails for a user without a name, as a container has with `docker run -u 1234`."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


_name_the_user()
