"""Remote shards, real clients and a server that misbehaves → the bytes that a disk would give, or a named error."""

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import loopback
import pytest
from conftest import environment, picture
from loopback import NO_RANGE, RESET, STALL, Fault, LoopbackServer, drop_after, status, wrong_length
from test_shards import contents, open_table, tar_of, write

from phi3v_dist.data import cache as cache_module
from phi3v_dist.data import store
from phi3v_dist.data.cache import ShardCache
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample
from phi3v_dist.data.store import Patience, StoreError
from phi3v_dist.errors import DataError

PAIRS = [
    (f"{n:03d}.{name}", data)
    for n in range(8)
    for name, data in (("jpg", picture("red", 40, 30)), ("txt", b"%d" % n * 30_000))
]
TAR = tar_of(PAIRS)
TARS = {f"/shards/{n:03d}.tar": tar_of([(f"{n}{name}", data) for name, data in PAIRS]) for n in range(4)}
WHOLE = {f"{n:03d}": {"jpg": picture("red", 40, 30), "txt": b"%d" % n * 30_000} for n in range(8)}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "PATIENCE", Patience(attempts=4, first_wait_s=0.01, silence_s=1.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def server():
    with LoopbackServer({"/a.tar": TAR} | TARS) as server:
        yield server


def through(cache: ShardCache | None, *addresses: str) -> Fetcher:
    return Fetcher(open_table(*addresses), cache)


def gets(server: LoopbackServer, path: str = "/a.tar") -> list[str | None]:
    return [request.range for request in server.log if request.path == path and request.range != "bytes=0-0"]


@pytest.mark.supports("http", on="one process")
def test_a_remote_shard_is_read_like_a_local_one(server: LoopbackServer) -> None:
    table = open_table(server.url("/a.tar"))
    server.forget()
    assert contents(table) == WHOLE
    assert len(gets(server)) == 8  # one request a sample
    assert contents(open_table(server.url("/a.tar"))) == WHOLE


def test_the_index_of_a_remote_shard_is_made_once_and_kept(server: LoopbackServer, tmp_path: Path) -> None:
    indexed: list[tuple[int, int]] = []
    for _ in range(3):
        open_table(server.url("/a.tar?signature=secret"), indexed=indexed)
    assert indexed == [(1, 1)]
    server.forget()
    open_table(server.url("/a.tar"))
    assert gets(server) == []


def test_an_index_beside_a_remote_shard_is_used(server: LoopbackServer, tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", PAIRS)
    open_table(shard)
    server.files["/a.tar.index.safetensors"] = (tmp_path / "a.tar.index.safetensors").read_bytes()
    table = open_table(server.url("/a.tar"))
    assert gets(server) == [] and contents(table) == WHOLE
    assert table.digest == open_table(shard).digest


def test_braces_name_remote_shards_and_all_that_are_missing_are_named(server: LoopbackServer) -> None:
    assert len(open_table(server.url("/shards/{000..003}.tar"))) == 32
    with pytest.raises(DataError, match=r"2 of 6 shards missing \(.*004\.tar, .*005\.tar\)"):
        open_table(server.url("/shards/{000..005}.tar"))
    with pytest.raises(DataError, match=r"`\*` does not work over http, .*\{000..127\}"):
        open_table(server.url("/shards/*.tar"))


@pytest.mark.fault(60)
@pytest.mark.parametrize(
    "faults",
    [
        [RESET, RESET], [status(503), status(500), status(429)], [drop_after(1000)], [STALL],
        [drop_after(60_000), drop_after(60_000), drop_after(60_000), drop_after(9), drop_after(9)],
        [Fault(stall_after=100)], [wrong_length(+500)],
    ],
)  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_a_transfer_survives_what_servers_do(server, tmp_path: Path, faults: list[Fault], cached: bool) -> None:
    cache = ShardCache(tmp_path / "node", 1 << 30) if cached else None
    fetcher = through(cache, server.url("/a.tar"))
    server.script("/a.tar", *faults)
    assert fetcher.fetch(3) == WHOLE["003"]


@pytest.mark.fault(60)
def test_a_cut_transfer_goes_on_at_the_byte_where_it_broke(server: LoopbackServer, tmp_path: Path) -> None:
    server.script("/a.tar", drop_after(100_000), drop_after(50_000))
    store.download(server.url("/a.tar"), tmp_path / "copy", len(TAR))
    assert (tmp_path / "copy").read_bytes() == TAR
    last = len(TAR) - 1
    assert gets(server) == [f"bytes=0-{last}", f"bytes=100000-{last}", f"bytes=150000-{last}"]


@pytest.mark.fault(60)
@pytest.mark.parametrize(
    ("always", "message"),
    [
        (RESET, "4 attempts in a row failed"), (status(503), "4 attempts.*503"), (STALL, "4 attempts|too slow"),
        (loopback.drip(1, 0.2), "too slow"),
    ],
)  # fmt: skip
def test_after_the_budget_the_error_names_the_object_and_no_secret(server, always: Fault, message: str) -> None:
    fetcher = through(None, server.url("/a.tar?X-Amz-Signature=secret"))
    server.script("/a.tar?X-Amz-Signature=secret", always=always)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=f"/a.tar: .*{message}") as error:
        fetcher.fetch(3)
    assert not isinstance(error.value, BadSample) and "secret" not in str(error.value)
    assert time.monotonic() - begin < 120


@pytest.mark.fault(60)
@pytest.mark.parametrize("code", [401, 403])
def test_refused_credentials_stop_at_once_and_say_what_to_set(server: LoopbackServer, code: int) -> None:
    fetcher = through(None, server.url("/a.tar"))
    server.forget()
    server.script("/a.tar", always=status(code))
    with pytest.raises(StoreError, match=rf"access refused \(status {code}\): sign the address anew.*netrc"):
        fetcher.fetch(0)
    assert len(server.log) == 1


@pytest.mark.fault(60)
def test_an_object_that_changes_under_the_run_is_noticed(server: LoopbackServer, tmp_path: Path) -> None:
    for cache in (None, ShardCache(tmp_path / "node", 1 << 30)):
        server.files["/a.tar"] = TAR
        fetcher = through(cache, server.url("/a.tar"))
        server.files["/a.tar"] = TAR.replace(b"333", b"334")
        with pytest.raises(BadSample, match="not those that were indexed"):
            fetcher.fetch(3)
        assert fetcher.fetch(2) == WHOLE["002"]


@pytest.mark.fault(50)
def test_a_remote_shard_that_goes_away_is_bad_by_name(server: LoopbackServer) -> None:
    fetcher = through(None, server.url("/a.tar"))
    del server.files["/a.tar"]
    with pytest.raises(BadSample, match=r"/a\.tar: sample '003': .* cannot be read: .*no such object"):
        fetcher.fetch(3)


def test_a_server_without_ranges_needs_copies_and_says_so(server: LoopbackServer, tmp_path: Path) -> None:
    server.script("/a.tar", always=NO_RANGE)
    with pytest.raises(StoreError, match=r"no byte ranges.*data\.cache\.path"):
        through(None, server.url("/a.tar")).fetch(3)
    assert through(ShardCache(tmp_path / "node", 1 << 30), server.url("/a.tar")).fetch(3) == WHOLE["003"]


# --- the node's copies -----------------------------------------------------------------------------------------------


def test_threads_that_miss_the_same_shard_wait_for_one_download(server: LoopbackServer, tmp_path: Path) -> None:
    fetcher = through(ShardCache(tmp_path / "node", 1 << 30), server.url("/a.tar"))
    server.forget()
    server.script("/a.tar", loopback.drip(100_000, 0.05))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetcher.fetch, range(8))) == list(WHOLE.values())
    assert len(gets(server)) == 1


RANK = """
import sys
from pathlib import Path
from phi3v_dist.data.cache import ShardCache
import os
folder, address, size = sys.argv[1:]
with ShardCache(Path(folder), 1 << 30).open(address, int(size)) as descriptor:
    print(len(os.pread(descriptor, int(size), 0)))
"""


def test_processes_of_a_node_share_one_download_and_a_killed_one_leaves_no_harm(server, tmp_path: Path) -> None:
    server.script("/a.tar", Fault(stall_after=200_000))
    command = [sys.executable, "-c", RANK, str(tmp_path / "node"), server.url("/a.tar"), str(len(TAR))]
    first = subprocess.Popen(command, env=environment())
    partial = None
    for _ in range(600):
        partial = next((tmp_path / "node").glob("*.partial"), None) if (tmp_path / "node").is_dir() else None
        if partial and partial.stat().st_size >= 100_000:
            break
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert partial
    there = partial.stat().st_size
    assert 0 < there <= 200_000
    ranks = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate()[0] for rank in ranks] == [f"{len(TAR)}\n"] * 2
    assert gets(server) == [f"bytes=0-{len(TAR) - 1}", f"bytes={there}-{len(TAR) - 1}"]
    assert {path.suffix for path in (tmp_path / "node").iterdir()} == {""}


@pytest.mark.supports("cache", on="one process")
def test_copies_keep_the_limit_and_the_least_recently_used_goes_first(server: LoopbackServer, tmp_path: Path) -> None:
    size = len(TARS["/shards/000.tar"])
    cache = ShardCache(tmp_path / "node", 2 * size + 10)
    addresses = [server.url(path) for path in TARS]

    def use(number: int) -> None:
        with cache.open(addresses[number], size) as descriptor:
            assert descriptor is not None and os.pread(descriptor, size, 0) == TARS[f"/shards/{number:03d}.tar"]

    for number in (0, 1, 0, 2):
        use(number)
    there = sum(path.stat().st_size for path in (tmp_path / "node").iterdir())
    assert there == 2 * size
    server.forget()
    use(0)
    assert server.log == []  # 1 went, not 0
    with cache.open(addresses[0], size) as zero, cache.open(addresses[2], size) as two:
        assert zero is not None and two is not None
        with cache.open(addresses[1], size) as descriptor:
            assert descriptor is None  # nothing can go: both are being read
    use(1)


def test_a_shard_larger_than_the_limit_is_read_by_range(server: LoopbackServer, tmp_path: Path) -> None:
    fetcher = through(ShardCache(tmp_path / "node", 1000), server.url("/a.tar"))
    assert fetcher.fetch(3) == WHOLE["003"] and not (tmp_path / "node").exists()


def test_a_full_disk_falls_back_to_ranges_with_one_warning(server, tmp_path: Path, monkeypatch, caplog) -> None:
    class Full:
        def __init__(self, file):
            self.file = file

    def download(address: str, path: Path, size_bytes: int, on_bytes: object) -> None:
        path.write_bytes(TAR[:1000])
        raise OSError(28, "No space left on device")

    fetcher = through(ShardCache(tmp_path / "node", 1 << 30), server.url("/a.tar"))
    monkeypatch.setattr(cache_module.store, "download", download)
    with caplog.at_level(logging.WARNING):
        assert [fetcher.fetch(number) for number in range(8)] == list(WHOLE.values())
    (warning,) = caplog.messages
    assert "No space left on device" in warning and "one by one" in warning
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["lock"]


def test_a_damaged_copy_is_dropped_and_the_sample_still_right(server: LoopbackServer, tmp_path: Path) -> None:
    fetcher = through(ShardCache(tmp_path / "node", 1 << 30), server.url("/a.tar"))
    fetcher.fetch(0)
    (copy,) = (path for path in (tmp_path / "node").iterdir() if path.name != "lock")
    copy.write_bytes(bytes(len(TAR)))
    assert fetcher.fetch(3) == WHOLE["003"] and not copy.exists()
    assert fetcher.fetch(4) == WHOLE["004"] and copy.read_bytes() == TAR


# --- s3 through its own client ---------------------------------------------------------------------------------------


class _S3(LoopbackServer):
    """Answers listings of a bucket, as far as s3fs asks for them; objects are files already."""

    def begin(self, request: loopback.Request) -> Fault:
        fault = super().begin(request)
        query = parse_qs(urlsplit(request.path).query)
        if "list-type" not in query or fault != Fault():
            return fault
        bucket, prefix = urlsplit(request.path).path.strip("/"), query.get("prefix", [""])[0]
        names = [name.removeprefix(f"/{bucket}/") for name in self.files if name.startswith(f"/{bucket}/{prefix}")]
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{len(self.files[f'/{bucket}/{name}'])}</Size></Contents>"
            for name in names
        )
        body = f"<ListBucketResult><Name>{bucket}</Name><KeyCount>{len(names)}</KeyCount>{rows}</ListBucketResult>"
        return Fault(body=body.encode(), headers={"Content-Type": "application/xml"})


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("s3fs")
    files = {path.replace("/shards", "/bucket/shards"): data for path, data in TARS.items()}
    with _S3(files) as server:
        store._filesystem.cache_clear()
        for name, value in {
            "AWS_ENDPOINT_URL": server.origin, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        store._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.fault(60)
@pytest.mark.supports("s3", on="one process")
def test_s3_shards_are_found_listed_and_read_over_faults(s3: _S3, tmp_path: Path) -> None:
    table = open_table("s3://bucket/shards/*.tar")
    assert table.shards == tuple(f"s3://bucket/shards/{n:03d}.tar" for n in range(4))
    assert open_table("s3://bucket/shards/{000..003}.tar").digest == table.digest
    s3.script("/bucket/shards/001.tar", RESET, status(503), drop_after(10_000))
    assert Fetcher(table).fetch(8 + 3)["txt"] == WHOLE["003"]["txt"]
    s3.script("/bucket/shards/001.tar", drop_after(100_000), status(500))
    assert Fetcher(table, ShardCache(tmp_path / "node", 1 << 30)).fetch(8 + 3)["txt"] == WHOLE["003"]["txt"]
    with pytest.raises(DataError, match=r"004\.tar: no such shard"):
        open_table("s3://bucket/shards/{000..004}.tar")


@pytest.mark.fault(60)
def test_refused_s3_credentials_stop_at_once_and_say_what_to_set(s3: _S3) -> None:
    table = open_table("s3://bucket/shards/000.tar")
    s3.forget()
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    s3.script("/bucket/shards/000.tar", always=Fault(status=400, body=body))
    with pytest.raises(StoreError, match=r"s3://bucket/shards/000\.tar: access refused.*AWS_SESSION_TOKEN") as error:
        Fetcher(table).fetch(0)
    assert "secret" not in str(error.value) and len(s3.log) == 1


def test_nothing_is_left_running_after_a_failed_read(server: LoopbackServer) -> None:
    fetcher = through(None, server.url("/a.tar"))
    before = threading.active_count()
    server.script("/a.tar", always=RESET)
    with pytest.raises(StoreError):
        fetcher.fetch(0)
    assert threading.active_count() <= before + 1
