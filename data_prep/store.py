"""Data sets in object stores and on web servers: copied into a cache of bounded size, and read there like any local folder.

    local_copy(Path("s3://bucket/shards"))        ->  ~/.cache/inscon-stores/5f0c...
    local_copy(Path("/data/shards"))              ->  /data/shards, untouched

An epoch is one shuffle of the whole set, so its first steps touch nearly every shard. So the whole set is fetched before the first
step, each file once; a cache that cannot hold it is refused, for it would fetch the same shards again and again.

    CACHE/door              locked while a process makes room
    CACHE/KEY.lock          bytes of the set KEY; locked, shared, by all who read the set; as old as its last use
    CACHE/KEY/              the set. KEY is made of address and contents, so a set that changes gets another one
    CACHE/KEY/x.unfinished  what has come of x; locked by who fetches it, and gone on with after a stop
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import Progress

from data_prep.index import BETON_NAME, FORMAT, MANIFEST_NAME, Manifest, ShardError, StoredFile, stored_file
from inscon import guard

CACHE_GB = 200.0
CONNECTIONS = 8  # files that a process fetches side by side
PIECE_BYTES = 1 << 22  # asked for at a time; a cut costs as much at most
TRIES, WAIT_S = 5, 0.1  # so often is a store asked while nothing comes; each wait is four times the one before
TIMEOUT_S = 60.0  # without a byte from a web server
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
"""What fsspec needs beside the extra, by the address's scheme."""
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_in_use: list[BinaryIO] = []  # locks of the sets that this process reads


def address_of(data: str | os.PathLike[str]) -> str | None:
    """The address of a store, or None for a path. A `Path` leaves one slash of "s3://"."""
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.+)", os.fspath(data))
    slashes = "///" if found and found[1] == "file" else "//"
    return f"{found[1]}:{slashes}{found[2]}".rstrip("/").removesuffix(f"/{BETON_NAME}") if found else None


def local_copy(data: Path, cache_dir: Path | None = None, cache_gb: float = CACHE_GB, pictures: bool = False) -> Path:
    """`data` itself where it is a path; else what lies at that address, whole, in the cache, while this process runs.

    Args:
        data: a path, or any address that fsspec knows: s3://, gs://, hf://, https://, memory://, ...
        cache_dir: for all sets. None: ~/.cache/inscon-stores, or in $XDG_CACHE_HOME.
        cache_gb: 10^9 bytes that may lie there; sets that nobody reads make room, the longest unused first.
        pictures: take pictures or tars too, for packing; else only a packed set will do.

    Raises ValueError, one sentence with the address and the remedy.
    """
    address = address_of(data)
    if address is None:
        return data
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(cache_dir or Path(cache_home, "inscon-stores")).absolute()
    try:
        store = Store(address, cache, cache_gb)
        return store.fetch_set(pictures) or store.fetch_pictures(pictures)
    except OSError as error:
        raise ValueError(
            f"{address} cannot be kept in {cache} ({guard.sentence_of(error)}); make room there or set another --cache-dir"
        ) from None


class Store:
    """What lies at an address, on its way into `cache`."""

    def __init__(self, address: str, cache: Path, cache_gb: float):
        self._address, self._cache, self._cache_gb = address, cache, cache_gb
        self._fs, self._root = _file_system(address)
        self._stopped, self._tell = threading.Event(), lambda byte_count: None

    def fetch_set(self, pictures: bool) -> Path | None:
        """The packed set at the address; None where there is none, or the manifest of something else beside `pictures`."""

        def read() -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return self._fs.cat_file(f"{self._root}/{MANIFEST_NAME}")

        content = self._patiently(MANIFEST_NAME, read)
        if content is None or (pictures and FORMAT.encode() not in content[:100]):
            return None
        folder = self._fetch(content, Manifest.parse(content, f"{self._address}: {MANIFEST_NAME}").files)
        with guard.whole_file(folder / MANIFEST_NAME) as file:  # last: a folder that has one is complete
            file.write(content)
        return folder

    def fetch_pictures(self, wanted: bool) -> Path:
        """The tar at the address, or the folder of pictures or tars; refused where these are not `wanted`."""
        if not wanted:
            raise ShardError(
                f"{self._address} is no packed set, it holds no {MANIFEST_NAME}: see to the address, or pack the pictures with "
                "data_prep/make_dali.py and copy the folder there"
            )
        found = [{"name": self._root}] if self._root.endswith(".tar") else self._patiently("", self._listed)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            infos = list(pool.map(self._sized, found))
        if not infos:
            raise ValueError(f"{self._address} holds no files: give the address of a folder or of a .tar to --data")
        if tar := self._root.endswith(".tar") and self._root.rpartition("/")[2]:
            self._address, self._root = (path.removesuffix(f"/{tar}") for path in (self._address, self._root))
        plain, start = urllib.parse.unquote if _is_web(self._address) else str, len(self._root) + 1
        files = [StoredFile(plain(info["name"][start:]), info["size"], 0, checksum="") for info in infos]
        folder = self._fetch(json.dumps(infos, default=str).encode(), files)
        return folder / files[0].name if tar else folder

    def _listed(self) -> list[dict[str, Any]]:
        """What the store says of every file below the address, by name."""
        walked = self._fs.walk(self._root, detail=True, on_error="raise")
        files = (info for _, _, files in walked for name, info in files.items() if name)
        # Web servers link other orders of the same page, "?C=N;O=D".
        return sorted((f for f in files if not (_is_web(f["name"]) and "?" in f["name"])), key=lambda f: f["name"])

    def _sized(self, info: dict[str, Any]) -> dict[str, Any]:
        """With the file's size, which a web server's page lacks."""
        if info.get("size") is None:
            info = self._patiently(info["name"], lambda: self._fs.info(info["name"]))
        if info["size"] is None:
            raise ValueError(f"{info['name']} has no size, says its server: copy the pictures to a folder, pack that")
        return info

    def _patiently(self, what: str, ask: Callable[[], Any], come: Callable[[], int] = lambda: 0) -> Any:
        """What `ask` returns; asked again where the store fails, as long as more has `come`, bytes. Else ShardError."""
        failures, most, where = 0, come(), what if "://" in what else f"{self._address}/{what}"
        while True:
            try:
                return ask()
            except Exception as error:  # each store has its own
                # Of a web server's 503, too, fsspec may say that nothing is there, and what it was as the cause.
                status = getattr(error, "status", getattr(error.__cause__, "status", None))
                missing = status == 404 or (status is None and isinstance(error, FileNotFoundError))
                if missing or status in (401, 403) or isinstance(error, PermissionError):
                    fault = "is not there" if missing else f"may not be read ({error})"
                    raise ShardError(f"{where} {fault}: see to the address and your rights, or copy it there") from None
                if self._stopped.is_set() or getattr(error, "errno", None) in _OF_THE_DISK:
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
            failures, most = (1 if come() > most else failures + 1), max(most, come())
            if failures == TRIES:
                raise ShardError(
                    f"{where} cannot be fetched ({reason}), asked {TRIES} times: see to the store and the network and run the same "
                    "command again, it goes on where it stopped"
                )
            self._stopped.wait(WAIT_S * 4 ** (failures - 1))

    def _fetch(self, content: bytes, files: list[StoredFile]) -> Path:
        """The folder in the cache that has all of `files`; those that another process fetches are waited for."""
        folder = self._cache / hashlib.sha256(self._address.encode() + b"\n" + content).hexdigest()[:16]
        for file in files:
            if ".." in Path(file.name).parts or Path(file.name).is_absolute():
                raise ShardError(f"{self._address} names a file outside of its folder ({file.name}): do not trust it")
        _in_use.append(_claim(folder, sum(file.byte_count for file in files), self._cache_gb, self._address))
        missing = [file for file in files if not _is_here(folder / file.name, file.byte_count)]
        left, quiet = sum(file.byte_count for file in missing), os.environ.get("LOCAL_RANK", "0") != "0"
        console = Console(stderr=True, quiet=quiet or not missing, soft_wrap=True, markup=False, highlight=False)
        console.print(f"Fetching {left / 1e9:.4g} GB of {self._address} into {folder}.")
        with Progress(console=console, transient=True) as bar, ThreadPoolExecutor(CONNECTIONS) as pool:
            task, coming = bar.add_task("", total=left), iter(missing)  # of which every thread takes the next
            self._tell = lambda byte_count: bar.advance(task, byte_count)
            try:
                threads = [pool.submit(self._fetch_files, folder, coming) for _ in range(CONNECTIONS)]
                for thread in as_completed(threads):
                    thread.result()
            finally:
                self._stopped.set()
        return folder

    def _fetch_files(self, folder: Path, coming: Iterator[StoredFile]) -> None:
        """Returns when all have come, also by another process, or are to stop."""
        for stored in coming:
            path, unfinished = folder / stored.name, folder / f"{stored.name}.unfinished"
            path.parent.mkdir(parents=True, exist_ok=True)
            while not (self._stopped.is_set() or _is_here(path, stored.byte_count)):
                with unfinished.open("ab") as file:
                    if not _locked(file, unfinished):
                        self._stopped.wait(WAIT_S)
                    elif _is_here(path, stored.byte_count):  # it came while this one was opened
                        unfinished.unlink()
                    else:
                        self._download(stored, file, unfinished)
                        os.replace(unfinished, path)

    def _download(self, stored: StoredFile, file: BinaryIO, path: Path) -> None:
        """What lacks of a file. Where its checksum is wrong, all of it once more."""
        self._tell(file.tell())
        for _ in range(2):
            if file.tell() < stored.byte_count:
                self._patiently(stored.name, lambda: self._append(stored, file), file.tell)
                file.flush()
            found = stored_file(path, 0).checksum if stored.checksum else ""
            if found == stored.checksum:
                return
            self._begin_anew(file)
        raise ShardError(
            f"{self._address}/{stored.name} came twice with the checksum {found} where {MANIFEST_NAME} says {stored.checksum}: "
            "copy the set there again, or pack it again"
        )

    def _append(self, stored: StoredFile, file: BinaryIO) -> None:
        try:
            self._copy(stored, file, size=stored.byte_count, block_size=PIECE_BYTES, cache_type="none")
        except ValueError:  # fsspec's, of a server that knows no ranges and sends the whole file
            self._begin_anew(file)
            self._copy(stored, file, block_size=0)

    def _copy(self, stored: StoredFile, file: BinaryIO, **options: Any) -> None:
        name = urllib.parse.quote(stored.name) if _is_web(self._address) else stored.name
        with self._fs.open(f"{self._root}/{name}", "rb", **options) as source:
            source.seek(file.tell())
            while (left := stored.byte_count - file.tell()) > 0:
                piece = source.read(min(left, PIECE_BYTES))
                if not piece or self._stopped.is_set():
                    raise OSError(f"it ends at byte {file.tell()} of {stored.byte_count}")
                file.write(piece)
                self._tell(len(piece))

    def _begin_anew(self, file: BinaryIO) -> None:
        self._tell(-file.tell())
        file.seek(0)
        file.truncate()


def _is_web(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    options = {}
    try:
        from fsspec.core import url_to_fs

        if _is_web(address):
            import aiohttp

            # Its own limit are five minutes for a whole file, and without trust_env it knows no proxy.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        file_system, root = url_to_fs(address, **options)
        return file_system, root.rstrip("/")
    except ImportError as error:
        packages = f"'inscon[stores]' {PACKAGES.get(address.partition(':')[0], '')}".rstrip()
        raise ValueError(f"{address} needs a package that is not installed ({error}): pip install {packages}") from None
    except ValueError as error:
        raise ValueError(
            f"fsspec knows no address {address} ({error}): give s3://, gs://, hf://, https://, a folder"
        ) from None


def _locked(file: BinaryIO, path: Path) -> bool:
    """Whether `file` is this one's alone until it is closed, and `path` is still its name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_here(path: Path, byte_count: int) -> bool:
    """Under its name, which a file gets when it has been compared with its checksum."""
    return path.exists() and path.stat().st_size == byte_count


def _claim(folder: Path, byte_count: int, cache_gb: float, address: str) -> BinaryIO:
    """The lock of a set that takes `byte_count`, with room made for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "door", "ab") as door, contextlib.ExitStack() as stack:
        fcntl.flock(door, fcntl.LOCK_EX)
        own, idle, read = folder.with_suffix(".lock"), [], 0
        for path in sorted({*folder.parent.glob("*.lock")} - {own}, key=lambda path: path.stat().st_mtime):
            other = stack.enter_context(path.open("r+b"))
            if _locked(other, path):
                idle.append(path.with_suffix(""))
            else:
                read += int(other.read())
        if read + byte_count > cache_gb * 1e9:
            raise ValueError(
                f"{address} takes {byte_count / 1e9:.4g} GB, and of the {cache_gb:.4g} GB that the cache {folder.parent} may take "
                f"{read / 1e9:.4g} are being read: one shuffle draws from all of a set, so set --cache-gb "
                f"{math.ceil((read + byte_count) / 1e6) / 1e3} or more, or pack smaller pictures"
            )
        files = [file for path in idle for file in path.rglob("*") if file.is_file()]
        excess = sum(file.stat().st_size for file in files) + read + byte_count - cache_gb * 1e9
        for file in files:
            if excess > 0:
                excess -= file.stat().st_size
                file.unlink()
        mine = own.open("w")
        fcntl.flock(mine, fcntl.LOCK_SH)
        mine.write(str(byte_count))
        mine.flush()
        return mine
