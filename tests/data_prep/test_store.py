"""Sets behind an address: fetched once whatever the server does, shared, bounded, and every failure a sentence."""

import html
import http.server
import importlib.util
import itertools
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_prep import store
from data_prep.index import DatasetIndex, ShardError
from data_prep.make_dali import DaliConfig, pack_folder
from data_prep.make_ffcv import pack_beton
from data_prep.store import PIECE_BYTES, address_of, local_copy
from inscon.config import LoaderConfig
from tests.packed import Sample, write_set

LARGE = 9_000_000
"""Bytes of the only sample of the first shard: three pieces."""


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP. `faults[name]` are those of the next requests for a file; `asked` are (name, first byte) of all GETs."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked, self.ranges, self.go_on = folder, {}, [], True, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):  # clients that leave
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        name = urllib.parse.unquote(self.path.strip("/"))
        path, faults = self.server.folder / name, self.server.faults.get(name, iter(()))
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        start, stop = (int(edge) if edge else None for edge in asked.split("-"))
        fault = next(faults, None)
        if not head:
            self.server.asked.append((name, start))
        if path.is_dir():
            links = ["../", "?C=N;O=D", *(p.name + "/" * p.is_dir() for p in sorted(path.iterdir()))]
            tags = (f'<a href="{urllib.parse.quote(link, safe="/?=;")}">{html.escape(link)}</a>' for link in links)
            content, kind = "\n".join(tags).encode(), "text/html"
        elif fault in (403, 404, 503) or not path.is_file():
            return self.send_error(fault or 404)
        else:
            content, kind = path.read_bytes(), "application/octet-stream"
        part = self.server.ranges and "Range" in self.headers
        body = content[start : (stop or len(content)) + 1] if part else content
        self.send_response(206 if part else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if not head:
            self.send_body(body, fault)

    def send_body(self, body, fault):
        if fault == "hang":
            self.server.go_on.wait(60)
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "slow":
            for start in range(0, len(body), len(body) // 10 + 1):
                time.sleep(0.02)
                self.wfile.write(body[start : start + len(body) // 10 + 1])
            return
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def _released():
    """What one test has read is in no use in the next."""
    yield
    store._in_use.clear()


@pytest.fixture
def fetch(tmp_path, server):
    """The set "set", or another one, of the server: its copy in the cache."""
    return lambda name="set", **settings: local_copy(Path(f"{server.address}/{name}"), tmp_path / "cache", **settings)


def write(folder, large=1000, seed=0):
    """A set of two shards; the first sample has `large` bytes, so the first shard as many and 3,072 more."""
    rng = np.random.default_rng(seed)
    samples = [Sample(rng.bytes(size), name=f"a/{i}.jpg") for i, size in enumerate([large, 500, 600])]
    return write_set(folder, samples, per_shard=2)


def same(folder, other):
    """Whether every file of a set is another's, byte for byte, and nothing else is there."""
    names = {path.name for path in folder.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (folder / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_an_address_is_told_from_a_path():
    assert address_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"  # a Path has one slash less
    assert address_of("https://host:80/x/samples.beton") == "https://host:80/x"
    assert address_of(Path("file:///data/x/")) == "file:///data/x"
    for path in ("/data/shards", "shards", "a/b:/c", "../s3", "x:y"):
        assert address_of(Path(path)) is None
        assert local_copy(Path(path)) == Path(path)
    assert LoaderConfig().cache_gb == DaliConfig(data=Path("x"), out=Path("y")).cache_gb == store.CACHE_GB


def test_a_set_is_fetched_once_and_opens_like_any_other(server, fetch):
    made = write(server.folder / "set")
    folder = fetch()
    assert same(folder, server.folder / "set")
    assert [bytes(DatasetIndex.open(folder).read(i)) for i in range(3)] == [bytes(made.read(i)) for i in range(3)]
    assert max(Counter(server.asked).values()) == 1
    server.asked.clear()
    assert fetch() == folder and server.asked == [("set/manifest.json", 0)]


@pytest.mark.parametrize("faults", [[503], ["cut", 503], ["wrong"], ["slow"]])
def test_a_server_that_falters_is_waited_for(server, fetch, faults):
    write(server.folder / "set")
    names = ["shard-000000.tar", "names.txt"] + ["manifest.json"] * (faults[0] != "wrong")
    server.faults = {f"set/{name}": iter(faults) for name in names}
    assert same(fetch(), server.folder / "set")
    again = 0 if faults[0] == "slow" else len(faults)
    assert server.asked.count(("set/shard-000000.tar", 0)) == 1 + again
    assert server.asked.count(("set/shard-000001.tar", 0)) == 1


def test_what_was_cut_goes_on_where_it_stopped(server, fetch):
    """The second of three pieces is cut, and then the server is away for a moment."""
    write(server.folder / "set", LARGE)
    server.faults["set/shard-000000.tar"] = iter([None, "cut", 503])
    assert same(fetch(), server.folder / "set")
    starts = [start for name, start in server.asked if name == "set/shard-000000.tar"]
    assert starts == [0, PIECE_BYTES, PIECE_BYTES, PIECE_BYTES, 2 * PIECE_BYTES]


@pytest.mark.parametrize("faults", [[], [None, None, "cut"]])
def test_a_server_without_ranges_sends_whole_files(server, fetch, faults):
    write(server.folder / "set", LARGE)
    server.ranges, server.faults = False, {"set/shard-000000.tar": iter(faults)}
    assert same(fetch(), server.folder / "set")


def test_a_set_that_changed_is_another_set(server, fetch):
    write(server.folder / "set")
    before = fetch()
    for path in (server.folder / "set").iterdir():
        path.unlink()
    (server.folder / "set").rmdir()
    write(server.folder / "set", seed=1)
    assert fetch() != before and same(fetch(), server.folder / "set") and not same(before, server.folder / "set")


@pytest.mark.parametrize(("fault", "words"), [
    (404, "/set/shard-000001.tar is not there: see to the address"),
    (403, "/set/shard-000001.tar may not be read \\(403, .*your rights"),
    ("no set", "/set is no packed set, it holds no manifest.json: see to the address"),
    ("wrong", "/set/shard-000001.tar came twice with the checksum .* where manifest.json says .*: copy the set there again"),
    ("no json", "/set: .*manifest.json is no manifest that this program reads"),
    ("outside", "/set names a file outside of its folder \\(../evil\\): do not trust it"),
])  # fmt: skip
def test_what_cannot_be_mended_is_a_sentence(server, fetch, tmp_path, fault, words):
    folder = server.folder / "set"
    write(folder)
    manifest = folder / "manifest.json"
    if fault in (403, 404):
        server.faults["set/shard-000001.tar"] = iter([fault])
    if fault == "no set":
        manifest.unlink()
    if fault == "wrong":
        server.faults["set/shard-000001.tar"] = itertools.repeat("wrong")
    if fault == "no json":
        manifest.write_text("<html>please log in</html>")
    if fault == "outside":
        manifest.write_text(manifest.read_text().replace('"shard-000001.tar"', '"../evil"'))
    with pytest.raises(ShardError, match=server.address + words) as said:
        fetch()
    assert "\n" not in str(said.value)
    assert not list((tmp_path / "cache").glob("*/manifest.json")) and not (tmp_path / "cache/evil").exists()


@pytest.mark.slow
def test_a_server_that_stays_away_is_given_up(server, fetch):
    write(server.folder / "set", LARGE)
    server.faults["set/shard-000000.tar"] = itertools.chain([None], itertools.repeat(503))
    with pytest.raises(
        ShardError, match=r"set/shard-000000.tar cannot be fetched \(503.*asked 5 times: .* goes on where"
    ):
        fetch()
    server.faults.clear()
    server.asked.clear()
    assert same(fetch(), server.folder / "set")
    assert ("set/shard-000000.tar", 0) not in server.asked and ("set/shard-000000.tar", PIECE_BYTES) in server.asked


CHILD = """
import sys
from pathlib import Path
from data_prep.store import local_copy
print(local_copy(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])), flush=True)
sys.stdin.read()
"""


def child(address, cache, cache_gb=1.0):
    """A process that fetches, says where it is, and reads the set until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, address, cache, str(cache_gb)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_two_processes_fetch_each_shard_once(server, tmp_path):
    write(server.folder / "set", LARGE)
    server.faults = {"set/shard-000001.tar": iter(["hang"])}
    children = [child(f"{server.address}/set", tmp_path / "cache") for _ in range(2)]
    assert all("Fetching" in one.stderr.readline() for one in children)  # neither came late
    server.go_on.set()
    said = [one.communicate(timeout=60) for one in children]
    assert all(same(Path(out.strip()), server.folder / "set") for out, _ in said), said
    asked = Counter(server.asked)
    assert asked.pop(("set/manifest.json", 0)) == 2
    assert set(asked.values()) == {1} and len(asked) == 6  # three pieces, the other shard, index and names


def test_a_killed_fetch_goes_on(server, fetch, tmp_path):
    write(server.folder / "set", LARGE)
    server.faults["set/shard-000000.tar"] = iter([None, "hang"])
    killed = child(f"{server.address}/set", tmp_path / "cache")
    deadline = time.monotonic() + 60
    while ("set/shard-000000.tar", PIECE_BYTES) not in server.asked:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    server.go_on.set()
    server.asked.clear()
    assert same(fetch(), server.folder / "set")
    assert [start for name, start in server.asked if name.endswith("0.tar")] == [PIECE_BYTES, 2 * PIECE_BYTES]


def cached(cache):
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_cache_keeps_its_bound_and_what_is_read(tmp_path):
    """Sets of 0.1 MB in a cache of 0.25: the third takes the place of the oldest that nobody reads."""
    for name in "abcd":
        write(tmp_path / name, 100_000, seed=ord(name))
    cache, room = tmp_path / "cache", 0.25e-3
    reader = child(f"file://{tmp_path}/a", cache, room)
    a = Path(reader.stdout.readline().strip())
    copies = {}
    for name in "bcdb":
        copies[name] = local_copy(Path(f"file://{tmp_path}/{name}"), cache, room)
        assert same(copies[name], tmp_path / name) and same(a, tmp_path / "a") and cached(cache) <= 0.25e6
        store._in_use.clear()
    assert not (copies["d"] / "shard-000000.tar").exists()  # b's place
    kept = local_copy(Path(f"file://{tmp_path}/b"), cache, room)
    with pytest.raises(ValueError, match=r"/c takes 0.0001\d* GB, and of the 0.00025 GB .* 0.0002\d* are being read"):
        local_copy(Path(f"file://{tmp_path}/c"), cache, room)
    reader.communicate()
    local_copy(Path(f"file://{tmp_path}/c"), cache, room)  # a's place
    assert same(kept, tmp_path / "b") and not same(a, tmp_path / "a")


def test_a_cache_smaller_than_the_set_is_refused(server, fetch, tmp_path):
    write(server.folder / "set", LARGE)
    with pytest.raises(
        ValueError, match=r"set takes 0.009\d* GB, and of the 0.005 GB .*: one shuffle draws .* --cache-gb 0.01 or"
    ):
        fetch(cache_gb=0.005)
    assert not [name for name, _ in server.asked if "shard" in name]
    assert same(fetch(cache_gb=0.01), server.folder / "set")


def test_a_full_disk_is_a_sentence(server, fetch, small_files):
    write(server.folder / "set", LARGE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            small_files(5_000_000),
            pytest.raises(ValueError, match=r"/set cannot be kept in .*cache \(File too large\); make room there"),
        ):
            fetch()
    finally:
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_package_that_is_missing_is_named(tmp_path, scheme, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(
        ValueError, match=rf"{scheme}://bucket/set needs a package .*pip install 'inscon\[stores\]' {package}$"
    ):
        local_copy(Path(f"{scheme}://bucket/set"), tmp_path)


@pytest.mark.parametrize("module", ["fsspec.core", "aiohttp"])
def test_the_extra_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"https://host/set needs a package .*pip install 'inscon\[stores\]'$"):
        local_copy(Path("https://host/set"), tmp_path)


def test_an_unknown_address_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="fsspec knows no address foo://x .*give s3://"):
        local_copy(Path("foo://x"), tmp_path)
    with pytest.raises(ValueError, match=r"memory://nothing is no packed set"):
        local_copy(Path("memory://nothing"), tmp_path)
    with pytest.raises(ValueError, match=r"memory://nothing/ is not there"):
        local_copy(Path("memory://nothing"), tmp_path, pictures=True)
    write(tmp_path / "set")
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=rf"/set cannot be kept in {tmp_path}/file/cache \(.*Not a directory\).*--cache-dir"
    ):
        local_copy(Path(f"file://{tmp_path}/set"), tmp_path / "file/cache")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders with blanks in their names, files that are no pictures, and the same as a tar."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "of all", np.random.default_rng(0)
    for i in range(12):
        (folder / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"class {i % 2}/{i} ü.jpg")
    (folder / "class 0/notes.txt").write_text("none")
    (folder / "manifest.json").write_text("{}")  # of somebody else's
    subprocess.run(["tar", "-C", folder, "-cf", folder.parent / "all.tar", "class 0", "class 1"], check=True)
    return folder


@pytest.fixture
def memory():
    """fsspec's store in the memory of this process."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("kind", ["memory", "http", "tar", "packed"])
def test_pictures_of_a_store_are_packed_as_those_of_a_folder(server, memory, pictures, tmp_path, kind):
    local = pack_folder(pictures if kind != "tar" else pictures.parent / "all.tar", tmp_path / "local", workers=1)
    memory.put(str(pictures), "/bucket/pictures", recursive=True)
    memory.put(str(tmp_path / "local"), "/bucket/packed", recursive=True)
    server.folder = pictures.parent
    server.faults = {"all.tar": iter([503] * 4)}  # two HEADs and GETs for its size: fsspec says that it does not exist
    address = {
        "memory": "memory://bucket/pictures", "http": f"{server.address}/of all", "tar": f"{server.address}/all.tar",
        "packed": "memory://bucket/packed",
    }[kind]  # fmt: skip
    pack = pack_beton if kind == "packed" else pack_folder
    made = pack(address, tmp_path / "made", workers=1, cache_dir=tmp_path / "cache")
    assert made.fingerprint == local.fingerprint and made.class_names == ("class 0", "class 1") and len(made) == 12
    assert [made.name(i) for i in range(12)] == [local.name(i) for i in range(12)]
    assert kind in ("tar", "packed") or made.manifest.ignored == {".json": 1, ".txt": 1}
    assert max(Counter(name for name, _ in server.asked if name.endswith(".jpg")).values(), default=1) == 1
