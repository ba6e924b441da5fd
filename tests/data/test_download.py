"""Downloads from a real server on this machine that misbehaves by script."""

import gzip
import hashlib
import io
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from loopback import (
    EMPTY,
    ENDLESS,
    HTML_AS_JPEG,
    NO_RANGE,
    RESET,
    STALL,
    Fault,
    LoopbackServer,
    drip,
    drop_after,
    gzip_bomb,
    redirect,
    stall_after,
    status,
    wrong_length,
)
from PIL import Image

from phi3v_dist.config import parse
from phi3v_dist.data.importers import transfer
from phi3v_dist.data.importers.download import Downloads, DownloadSettings
from phi3v_dist.data.pictures import PICTURE_ERRORS, decode_image
from phi3v_dist.data.store import shown
from phi3v_dist.errors import ConfigError, DataError

QUICK = DownloadSettings(concurrency=24, timeout_s=1.5, total_s=20.0, backoff_s=0.01, max_wait_s=0.1, max_bytes=1 << 20)


def jpeg(number: int) -> bytes:
    """A picture of noise, a different one for each number; about 9 kB."""
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def not_a_picture(data: bytes) -> str | None:
    try:
        decode_image(data)
    except PICTURE_ERRORS as error:
        return f"not a picture: {error}"
    return None


@pytest.fixture
def server():
    with LoopbackServer({f"/{i}.jpg": jpeg(i) for i in range(8)}) as server:
        yield server


@pytest.fixture
def fetch(tmp_path):
    """URLs → results, into one folder, with changes to QUICK."""

    def fetch(*urls: str, **settings):
        values = {**vars(QUICK), **settings}
        verify = values.pop("verify", None)
        return list(Downloads(tmp_path / "cache", DownloadSettings(**values), verify).stream(urls))

    return fetch


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


HOPELESS = {  # fault of every request → (how many of the thousand, what the reason says)
    "not found": (status(404), 30, "HTTP 404 Not Found"),
    "forbidden": (status(403), 10, "HTTP 403 Forbidden"),
    "page": (HTML_AS_JPEG, 30, "begin with b'<!DOCTYP'"),
    "broken": (status(500), 15, "HTTP 500"),
    "silent": (STALL, 8, "nothing came for 4.5 s"),
    "empty": (EMPTY, 10, "the server sent no bytes"),
    "announces less": (wrong_length(-500), 20, "not a picture"),
    "announces more": (Fault(length_error=500, ignore_range=True), 10, "bytes came"),
    "endless": (ENDLESS, 4, "larger than the limit"),
    "bomb": (gzip_bomb(30 << 20), 4, "larger than the limit"),
    "loop": (redirect("/loop.jpg"), 9, "redirect"),
}
PASSING = {  # faults of the first requests → how many of the thousand
    "dropped": ((drop_after(3000),), 40),
    "dropped twice": ((drop_after(3000), drop_after(100)), 20),
    "reset": ((RESET,), 30),
    "busy": ((status(503, Retry_After="1"), status(500)), 20),
    "silent": ((STALL,), 8),
    "silent midway": ((stall_after(2000),), 8),
    "announces more": ((wrong_length(500),) * 3, 10),
    "no ranges": ((drop_after(3000), NO_RANGE), 14),
}


def test_a_thousand_urls_of_which_three_hundred_misbehave(server, tmp_path):
    """The promise of the import: every good picture in, every bad one listed with its reason, nothing asked twice."""
    names = [f"/{i}.jpg" for i in range(1000)]
    server.files = {name: jpeg(i) for i, name in enumerate(names)}
    shuffled = iter(random.Random(0).sample(names, len(names)))
    expected_reasons = {}
    for fault, count, reason in HOPELESS.values():
        for name in itertools.islice(shuffled, count):
            server.script(name, always=fault)
            expected_reasons[server.url(name)] = reason
    server.script("/loop.jpg", always=redirect("/loop.jpg"))
    for faults, count in PASSING.values():
        for name in itertools.islice(shuffled, count):
            server.script(name, *faults)
    assert len(expected_reasons) == 150 and len(list(shuffled)) == 700

    downloads = Downloads(tmp_path / "cache", replace(QUICK, timeout_s=4.5), verify=not_a_picture)
    urls = [server.url(name) for name in names]
    results = list(downloads.stream(urls))
    assert [fetched.url for fetched in results] == urls
    for fetched, name in zip(results, names, strict=True):
        if fetched.url in expected_reasons:
            assert fetched.path is None and expected_reasons[fetched.url] in fetched.reason, fetched
        else:
            assert fetched.reason is None and fetched.path.read_bytes() == server.files[name], fetched
    assert {line["url"]: line["reason"] for line in listed(downloads.folder)} == {
        fetched.url: fetched.reason for fetched in results if fetched.reason
    }
    assert len(listed(downloads.folder)) == 150

    server.forget()
    assert list(downloads.stream(urls)) == results
    assert server.log == []


READER = """
import sys
from pathlib import Path
from phi3v_dist.data.importers.download import Downloads, DownloadSettings
origin, folder = sys.argv[1:]
urls = [f"{origin}/{i}.jpg" for i in range(120)]
for fetched in Downloads(Path(folder), DownloadSettings(concurrency=4)).stream(urls):
    assert fetched.path, fetched
    print(fetched.path, flush=True)
"""


def test_a_killed_download_goes_on_and_fetches_nothing_whole_twice(tmp_path):
    folder = tmp_path / "cache"
    with LoopbackServer({f"/{i}.jpg": jpeg(i) for i in range(120)}) as server:
        for path in server.files:
            server.script(path, always=drip(4000, 0.01))
        words = [sys.executable, "-c", READER, server.origin, str(folder)]
        path_of_name = {hashlib.sha256(server.url(path).encode()).hexdigest(): path for path in server.files}
        kills = random.Random(0)
        for attempt in range(1, 4):
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())
            for _ in range(attempt * 20 + kills.randint(0, 15)):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            whole = {path_of_name[file.name] for file in folder.glob("??/*") if file.name in path_of_name}
            assert 20 <= len(whole) < 120
            for path in whole:
                assert (folder / _place(server.url(path))).read_bytes() == server.files[path]
            server.forget()
            continued = Downloads(folder, QUICK).stream(map(server.url, server.files))
            assert [next(continued).reason for _ in range(5)] == [None] * 5
            continued.close()
            assert not {request.path for request in server.log} & whole
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=True)
        assert [Path(path).read_bytes() for path in done.stdout.split()] == list(server.files.values())
    assert sorted(path.name for path in folder.glob("**/*.*")) == ["failures.jsonl"]
    assert listed(folder) == []


def _place(url: str) -> str:
    name = hashlib.sha256(url.encode()).hexdigest()
    return f"{name[:2]}/{name}"


@pytest.mark.fault(60)
def test_a_cut_transfer_goes_on_from_the_byte_where_it_was_cut(server, fetch):
    server.script("/1.jpg", drop_after(1000), stall_after(2000))
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.path.read_bytes() == server.files["/1.jpg"]
    assert [request.range for request in server.log] == [None, "bytes=1000-", "bytes=3000-"]


@pytest.mark.parametrize(
    "second",
    [
        NO_RANGE,
        status(416, Content_Range="bytes */7"),
        Fault(status=206, headers={"Content-Range": "bytes 0-99/100"}, body=bytes(100)),
    ],
    ids=["sends all", "refuses", "sends another part"],
)
def test_a_server_that_cannot_go_on_is_asked_for_all(server, fetch, second):
    server.script("/1.jpg", drop_after(1000), second)
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.path.read_bytes() == server.files["/1.jpg"]


def test_a_file_that_changed_between_two_attempts_is_not_put_together_from_both(server, fetch):
    before = Fault(body=jpeg(99), headers={"ETag": '"before"'}, drop_after=1000)
    server.script("/1.jpg", before)
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.path.read_bytes() == server.files["/1.jpg"]
    assert server.log[1].range == "bytes=1000-"


def test_a_file_of_which_a_server_only_gives_a_part_is_not_taken_for_whole(server, fetch):
    data = server.files["/1.jpg"]
    part = Fault(status=206, headers={"Content-Range": f"bytes 1000-1999/{len(data)}"}, body=data[1000:2000])
    server.script("/1.jpg", drop_after(1000), part)
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.path.read_bytes() == data


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Seconds of every pause between attempts, none of which is waited for."""
    seconds: list[float] = []
    sleep = transfer.anyio.sleep

    async def record(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(transfer.anyio, "sleep", record)
    return seconds


@pytest.mark.fault(60)
def test_pauses_double_and_retry_after_counts_up_to_a_limit(server, fetch, pauses):
    in_a_while = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    server.script("/1.jpg", *[status(500)] * 3)
    server.script("/2.jpg", status(503, Retry_After="7"), status(429, Retry_After="9999"), RESET)
    server.script("/3.jpg", status(503, Retry_After=in_a_while), status(503, Retry_After="soon"))
    asked = {"retries": 3, "backoff_s": 2.0, "max_wait_s": 30.0}
    assert fetch(server.url("/1.jpg"), **asked)[0].path and pauses == [2.0, 4.0, 8.0]
    pauses.clear()
    assert fetch(server.url("/2.jpg"), **asked)[0].path and pauses == [7.0, 30.0, 8.0]
    pauses.clear()
    assert fetch(server.url("/3.jpg"), **asked)[0].path and 10 < pauses[0] <= 20 and pauses[1] == 4.0


def test_a_steady_drip_ends(server, fetch):
    server.script("/1.jpg", always=drip(1, 0.05))
    (fetched,) = fetch(server.url("/1.jpg"), total_s=0.4)
    assert "not done after 0.4 s" in fetched.reason
    assert len(server.log) == 1


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "file: is not fetched"),
        ("pipe:touch /tmp/canary", "pipe: is not fetched"),
        ("ftp://127.0.0.1/a.jpg", "ftp: is not fetched"),
        ("data:image/png;base64,AAAA", "data: is not fetched"),
        ("photos/a.jpg", "no scheme: is not fetched"),
        ("", "no scheme: is not fetched"),
        ("http://", "not an address"),
        ("http://[::1/a.jpg", "not an address"),
        ("http://127.0.0.1:99999/a.jpg", "not an address"),
        ("http://127.0.0.1/\x1b[31mred", "not an address"),
        ("http://127.0.0.1/\ud800", "not an address"),
        (f"http://{'a' * 300}.test/", "not an address"),
    ],
)
def test_what_is_no_web_address_is_refused_by_name(fetch, tmp_path, url, reason):
    (fetched,) = fetch(url)
    assert fetched.path is None and reason in fetched.reason
    (line,) = listed(tmp_path / "cache")
    assert line == {"url": shown(url), "reason": fetched.reason, "attempts": line["attempts"]}
    assert (tmp_path / "cache/failures.jsonl").read_text().strip().isprintable()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://127.0.0.1:99999/", "http:///"])
def test_a_redirect_leads_nowhere_else(server, fetch, target):
    server.script("/1.jpg", always=redirect(target))
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.path is None
    server.forget()
    fetch(server.url("/1.jpg"))
    assert server.log == []


def test_an_absurd_answer_is_a_failure_not_a_crash(server, fetch):
    server.script("/1.jpg", drop_after(1000), status(416, Content_Range=f"bytes */{'9' * 5000}"))
    assert "unusable" in fetch(server.url("/1.jpg"))[0].reason


def test_a_redirect_is_followed(server, fetch):
    server.script("/1.jpg", redirect("/2.jpg", 301))
    assert fetch(server.url("/1.jpg"))[0].path.read_bytes() == server.files["/2.jpg"]


@pytest.mark.fault(56)
@pytest.mark.parametrize("fault", [ENDLESS, gzip_bomb(200 << 20), Fault(body=bytes(2 << 20))])
def test_what_is_too_large_is_dropped_within_bounds(server, fetch, tmp_path, fault):
    server.script("/1.jpg", always=fault)
    (fetched,) = fetch(server.url("/1.jpg"))
    assert fetched.reason == "larger than the limit of 1,048,576 bytes"
    assert [path.suffix for path in (tmp_path / "cache").glob("??/*")] == [".failed"]


def test_packed_answers_are_unpacked_or_refused_by_name(server, fetch):
    text = b"words " * (1 << 16)
    server.script("/1.jpg", Fault(body=gzip.compress(text), headers={"Content-Encoding": "gzip"}))
    server.script("/2.jpg", Fault(body=gzip.compress(text)[:-9], headers={"Content-Encoding": "gzip"}))
    server.script("/3.jpg", always=Fault(body=text, headers={"Content-Encoding": "gzip"}))
    server.script("/4.jpg", always=Fault(body=text, headers={"Content-Encoding": "br"}))
    good, cut, damaged, unknown = fetch(*(server.url(f"/{i}.jpg") for i in range(1, 5)))
    assert good.path.read_bytes() == text
    assert cut.path.read_bytes() == server.files["/2.jpg"]
    assert "its gzip is damaged" in damaged.reason
    assert "packed as 'br'" in unknown.reason


def test_failures_that_may_pass_are_retried_only_when_asked(server, fetch, tmp_path):
    urls = [server.url(f"/{name}.jpg") for name in (1, 2, "missing")]
    server.script("/1.jpg", *[status(500)] * 3)
    server.script("/2.jpg", always=RESET)
    first = fetch(*urls)
    assert [fetched.path for fetched in first] == [None] * 3
    assert fetch(*urls) == first and len(server.log) == 7

    server.forget()
    again = fetch(*urls, *urls, retry_failed=True)
    assert again[0].path.read_bytes() == server.files["/1.jpg"]
    assert Counter(request.path for request in server.log) == {"/1.jpg": 1, "/2.jpg": 3}
    assert {line["url"]: line["attempts"] for line in listed(tmp_path / "cache")} == {urls[1]: 6, urls[2]: 1}


def test_a_url_that_comes_again_is_fetched_once(server, fetch, tmp_path):
    one, missing = server.url("/1.jpg"), server.url("/missing.jpg")
    results = fetch(*[one, missing] * 20, look_ahead=5, retry_failed=True)
    assert len(results) == 40 and len(server.log) == 2
    assert {fetched.path for fetched in results if fetched.url == one} == {results[0].path}
    assert len(listed(tmp_path / "cache")) == 1


def test_a_check_runs_once_for_each_file_and_what_it_refuses_is_not_kept(server, fetch, tmp_path):
    seen = []

    def verify(data: bytes) -> str | None:
        seen.append(data)
        return "a page\x1b[2J, not a picture" if data.startswith(b"<!DOCTYPE") else None

    server.script("/2.jpg", always=HTML_AS_JPEG)
    urls = [server.url("/1.jpg"), server.url("/2.jpg")]
    results = fetch(*urls, verify=verify)
    assert [fetched.reason for fetched in results] == [None, "a page\\x1b[2J, not a picture"]
    assert fetch(*urls, verify=verify, retry_failed=True) == results
    assert len(seen) == 2 and len(server.log) == 2


def test_passwords_and_control_characters_are_not_written_down(server, fetch, tmp_path, caplog):
    caplog.set_level("INFO")
    secret = server.url("/missing.jpg").replace("//", "//user:se@cret@") + "?key=secret"
    fetch(secret, secret.replace("missing", "1"), secret.replace("http:", "ftp:"), secret.replace("/mi", "/\x1b[2J"))
    cache = tmp_path / "cache"
    written = caplog.text + "".join(path.read_text() for path in [*cache.glob("**/*.failed"), cache / "failures.jsonl"])
    assert "//127.0.0.1" in written and "cret" not in written
    urls = [line["url"] for line in listed(cache)]
    assert len(urls) == 3 and all(url.isprintable() for url in urls)
    assert len(list(cache.glob("??/*"))) == 4  # with the password, the good one was there


def test_results_keep_the_order_and_urls_are_taken_only_as_far_ahead_as_allowed(server, tmp_path):
    taken = itertools.count()
    urls = (server.url(f"/{number % 8}.jpg?{next(taken)}") for number in itertools.count())
    server.script("/0.jpg?0", STALL)
    settings = DownloadSettings(**{**vars(QUICK), "look_ahead": 50, "concurrency": 4})
    stream = Downloads(tmp_path, settings).stream(urls)
    results = [next(stream) for _ in range(20)]
    stream.close()
    assert [fetched.url.rpartition("?")[2] for fetched in results] == [str(i) for i in range(20)]
    assert next(taken) == 50 + 19
    assert server.most_at_once <= 4 + 1  # the silent one may still be busy there


def test_transfers_overlap_but_no_more_than_allowed(server, fetch):
    urls = [server.url(f"/{number % 8}.jpg?{number}") for number in range(24)]
    for url in urls:
        server.script(url.removeprefix(server.origin), always=drip(1000, 0.01))
    fetch(*urls, concurrency=6)
    assert server.most_at_once == 6


def test_who_stops_reading_stops_all_transfers(server, tmp_path):
    threads = set(threading.enumerate())
    for number in range(1, 40):
        server.script(f"/1.jpg?{number}", always=drip(10, 0.05))
    stream = Downloads(tmp_path, QUICK).stream(server.url(f"/1.jpg?{number}") for number in range(40))
    assert next(stream).path
    stream.close()
    ours = [thread for thread in set(threading.enumerate()) - threads if "process_request" not in thread.name]
    assert ours == []
    assert len(list(tmp_path.glob("??/*"))) == 1
    assert len(server.log) <= 1 + QUICK.concurrency
    assert listed(tmp_path) == []  # had it waited for them, each would have had its say


def test_two_at_a_time_in_one_folder_are_refused(server, tmp_path):
    first = Downloads(tmp_path, QUICK).stream([server.url("/1.jpg"), server.url("/2.jpg")])
    next(first)
    with pytest.raises(DataError, match="in use by another download"):
        next(Downloads(tmp_path, QUICK).stream([server.url("/1.jpg")]))
    assert next(first).path


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot keep downloads here"):
        next(Downloads(tmp_path / "file", QUICK).stream([server.url("/1.jpg")]))
    url = server.url("/1.jpg")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / _place(url)[:2]).write_text("")  # in the way of a folder
    with pytest.raises(DataError, match="cache: cannot keep downloads here"):
        next(Downloads(tmp_path / "cache", QUICK).stream([url]))


def test_files_of_others_in_the_folder_stay(server, fetch, tmp_path):
    others = [tmp_path / "cache" / name for name in ("photos/a.jpg", "ab/photo.partial", "ab/notes.failed", "a.jpg")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    fetch(server.url("/1.jpg"), server.url("/missing.jpg"))
    assert [path.read_text() for path in others] == ["mine"] * 4
    assert len(listed(tmp_path / "cache")) == 1


@pytest.mark.parametrize("word", ["concurrency=0", "timeout_s=0", "retries=-1", "max_bytes=none", "timout_s=3"])
def test_settings_that_could_not_work_are_refused_by_name(word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        parse(DownloadSettings, [word])


LARGE = """
import resource, sys
from pathlib import Path
from phi3v_dist.data.importers.download import Downloads, DownloadSettings
settings = DownloadSettings(max_bytes=1 << 30)
peak_mib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
small, large, *_ = (fetched.path.stat().st_size and peak_mib() for fetched in
                    Downloads(Path(sys.argv[2]), settings).stream([f"{sys.argv[1]}/small", f"{sys.argv[1]}/large"]))
print(large - small)
"""


def test_a_large_file_goes_to_the_disk_not_into_memory(tmp_path):
    with LoopbackServer({"/small": b"1", "/large": bytes(64 << 20)}) as server:
        words = [sys.executable, "-c", LARGE, server.origin, str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=True)
    assert int(done.stdout) < 20
