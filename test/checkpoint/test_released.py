"""checkpoint.released: download against a server on this machine, extraction of hostile tars."""

import gzip
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading

import pytest

from checkpoint.graph import save
from checkpoint.params import CheckpointError, read_params
from checkpoint.released import (
    RELEASED,
    DownloadError,
    default_root,
    download,
    extract,
    find_checkpoint,
    locate,
    main,
    url_of,
)
from glore_common import GloReError, UsageError
from mxnet_compat import mx
from network.builder import get_spec
from network.specs import PUBLISHED_TOP1

NAME = "resnet50_w-se"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a folder with a small checkpoint: 60,000 bytes of parameters, so several packets."""
    folder = tmp_path_factory.mktemp("checkpoint")
    symbol = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=150, name="classifier")
    weight = mx.nd.arange(150 * 100).reshape((150, 100))
    save(
        str(folder / "net"),
        0,
        symbol,
        {"classifier_weight": weight, "classifier_bias": mx.nd.ones(150)},
    )
    return folder


@pytest.fixture(scope="module")
def tar(checkpoint, tmp_path_factory):
    """Return the path of a tar as the released ones are: one folder with graph, weights, code."""
    path = tmp_path_factory.mktemp("tar") / f"{NAME}.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(checkpoint, f"{NAME}")
        code = tarfile.TarInfo(f"{NAME}/symbol.py")
        code.size = 7
        archive.addfile(code, io.BytesIO(b"1 / 0\n\n"))
    return str(path)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; see the attributes for how badly."""

    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.etag = '"one"'
        self.knows_ranges = True
        # Bytes after which the connection ends.
        self.cut = None
        self.requests = []
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{NAME}.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Keep quiet."""

    def do_GET(self):
        server, content = self.server, self.server.content
        server.requests.append(dict(self.headers))
        if content is None:
            self.send_error(404)
            return
        start = 0
        wanted = self.headers.get("Range")
        current = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.knows_ranges and current:
            start = int(wanted[len("bytes=") : -1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = content[start:][: server.cut]
        server.sent += len(body)
        self.wfile.write(body)


@pytest.fixture
def server(tar):
    served = Server(content_of(tar))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def content_of(path):
    with open(path, "rb") as stream:
        return stream.read()


def sha256(path):
    return hashlib.sha256(content_of(path)).hexdigest()


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def as_stream(pair):
    return pair[0], io.BytesIO(pair[1])


def test_table_has_the_ten_released_networks_with_address_and_accuracy():
    assert len(RELEASED) == 10
    name = "dpn131_w-glore_2-3"
    assert url_of(name) == f"https://dl.fbaipublicfiles.com/glore/imagenet/{name}.tar"
    assert RELEASED[name] == 80.3
    assert get_spec(name).growth == (16, 32, 32, 128)
    assert RELEASED["resnet50"] == 76.2
    for name in RELEASED:
        assert get_spec(name).ndim == 2
        assert PUBLISHED_TOP1[name] == RELEASED[name]
    assert "resnet18" not in RELEASED
    assert "RESNET50_GLORE" not in RELEASED


def test_default_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("GLORE_HOME", "/somewhere")
    assert default_root() == "/somewhere/released"
    monkeypatch.delenv("GLORE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == "/home/someone/.glore/released"


def test_download_records_a_checksum_and_verifies_it_later(server, tar, tmp_path):
    path = download(NAME, str(tmp_path), server.url)
    assert path == str(tmp_path / f"{NAME}.tar")
    assert sha256(path) == sha256(tar)
    record = json.loads((tmp_path / f"{NAME}.tar.json").read_text())
    assert record == {"url": server.url, "size": os.path.getsize(tar), "sha256": sha256(tar)}
    assert not list(tmp_path.glob("*.part*"))

    download(NAME.upper(), str(tmp_path), server.url)
    assert len(server.requests) == 1

    with open(path, "r+b") as stream:
        stream.seek(2000)
        stream.write(b"?")
    with pytest.raises(DownloadError, match="has changed .* Delete it and .*json"):
        download(NAME, str(tmp_path), server.url)


def cut_short(server, tmp_path, length=20000):
    server.cut = length
    with pytest.raises(DownloadError, match=f"ended after {length} of {len(server.content)} bytes"):
        download(NAME, str(tmp_path), server.url)
    server.cut, server.sent = None, 0
    assert not (tmp_path / f"{NAME}.tar").exists()


def test_interrupted_download_goes_on_where_it_ended(server, tar, tmp_path):
    cut_short(server, tmp_path)
    path = download(NAME, str(tmp_path), server.url)
    assert server.requests[-1]["Range"] == "bytes=20000-"
    assert server.requests[-1]["If-Range"] == '"one"'
    assert server.sent == len(server.content) - 20000
    assert sha256(path) == sha256(tar)


def test_file_that_changed_meanwhile_is_downloaded_afresh(server, tar, tmp_path):
    cut_short(server, tmp_path)
    server.etag = '"two"'
    server.content = server.content[:512] + server.content[512:].replace(b"1 / 0", b"2 / 0")
    path = download(NAME, str(tmp_path), server.url)
    assert server.sent == len(server.content)
    assert content_of(path) == server.content


@pytest.mark.parametrize("etag", ['"one"', None])
def test_server_without_ranges_sends_all_again(server, tar, tmp_path, etag):
    server.etag, server.knows_ranges = etag, False
    cut_short(server, tmp_path)
    assert sha256(download(NAME, str(tmp_path), server.url)) == sha256(tar)
    assert server.sent == len(server.content)


@pytest.mark.parametrize("size", [100, 90000])
def test_without_etag_a_file_of_another_size_is_not_glued_together(server, tmp_path, size):
    server.etag = None
    cut_short(server, tmp_path)
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w") as archive:
        archive.addfile(*as_stream(member("other", b"2" * size)))
    server.content = other.getvalue()
    assert (len(server.content) > 20000) == (size > 20000)
    assert content_of(download(NAME, str(tmp_path), server.url)) == server.content


def test_complete_part_of_a_process_that_died_is_used(server, tar, tmp_path):
    part = {"url": server.url, "total": len(server.content), "etag": '"one"', "modified": None}
    (tmp_path / f"{NAME}.tar.part").write_bytes(server.content)
    (tmp_path / f"{NAME}.tar.part.json").write_text(json.dumps(part))
    assert sha256(download(NAME, str(tmp_path), server.url)) == sha256(tar)
    assert server.requests == []


def test_what_is_no_tar_is_refused_and_not_kept(server, tmp_path):
    server.content = b"<html>Please log in</html>"
    with pytest.raises(DownloadError, match="no whole tar"):
        download(NAME, str(tmp_path), server.url)
    assert not [name for name in os.listdir(tmp_path) if "part" in name or name.endswith(".tar")]


def test_without_a_network_the_message_says_what_to_put_where(server, tmp_path, tar):
    server.content = None
    with pytest.raises(DownloadError) as caught:
        download(NAME, str(tmp_path), server.url)
    target = tmp_path / f"{NAME}.tar"
    for part in (NAME, server.url, "404", str(target)):
        assert part in str(caught.value)
    # Which is what the user does:
    target.write_bytes(content_of(tar))
    assert download(NAME, str(tmp_path), server.url) == str(target)
    assert json.loads((tmp_path / f"{NAME}.tar.json").read_text())["sha256"] == sha256(tar)


def test_copy_by_hand_that_was_cut_is_refused_and_not_recorded(tar, tmp_path):
    (tmp_path / f"{NAME}.tar").write_bytes(content_of(tar)[:30000])
    with pytest.raises(DownloadError, match="cut short"):
        download(NAME, str(tmp_path))
    assert not (tmp_path / f"{NAME}.tar.json").exists()


def test_file_addresses_work_and_others_are_usage_errors(tar, tmp_path):
    assert sha256(download(NAME, str(tmp_path), f"file://{tar}")) == sha256(tar)
    with pytest.raises(UsageError, match="no http, https or file"):
        download(NAME, str(tmp_path / "b"), "ftp://example.org/a.tar")
    with pytest.raises(UsageError, match="nearest first: resnet50_w-se,"):
        download("resnet50_w_se", str(tmp_path))


def test_two_at_once_download_once(server, tar, tmp_path):
    found = []

    def fetch():
        found.append(download(NAME, str(tmp_path), server.url))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [str(tmp_path / f"{NAME}.tar")] * 3
    assert len(server.requests) == 1


def test_extract_gives_a_loadable_checkpoint_and_runs_nothing(tar, tmp_path):
    target = str(tmp_path / "out")
    params = extract(tar, target)
    assert params == os.path.join(target, NAME, "net-0000.params")
    assert read_params(params)["arg:classifier_weight"][149, 99] == 14999
    assert os.path.exists(os.path.join(target, NAME, "symbol.py"))
    assert os.listdir(tmp_path) == ["out"]

    stamp = os.stat(params).st_mtime_ns
    assert extract(tar, target) == params
    assert os.stat(params).st_mtime_ns == stamp
    with open(params, "ab") as stream:
        stream.write(b"?")
    with pytest.raises(UsageError, match="is not what .* holds"):
        extract(tar, target)


HOSTILE = {
    "absolute": ([member("/tmp/evil", b"x")], "absolute"),
    "drive": ([member("C:evil", b"x")], "absolute"),
    "backslash": ([member("..\\evil", b"x")], "absolute"),
    "parent": ([member("a/../../evil", b"x")], "out of the folder"),
    "symlink": ([member("a", type=tarfile.SYMTYPE, linkname="/etc")], "neither a plain file"),
    "hard link": ([member("a", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "neither a plain"),
    "device": ([member("a", type=tarfile.CHRTYPE)], "neither a plain"),
    "pipe": ([member("a", type=tarfile.FIFOTYPE)], "neither a plain"),
    "twice": ([member("a", b"1"), member("./a", b"2")], "twice"),
    "twice but for case": ([member("a", b"1"), member("A", b"2")], "twice"),
    "many": ([member(f"f{index}") for index in range(11)], "more than 10 files"),
    "large": ([member("a", b"0" * 600), member("b", b"0" * 600)], "or 1000 bytes"),
    "no checkpoint": ([member("readme", b"1")], "holds 0 checkpoints"),
    "file as folder": ([member("a", b"1"), member("a/b", b"2")], "cannot be extracted"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_are_refused_and_leave_nothing(kind, tmp_path):
    members, message = HOSTILE[kind]
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        for pair in members:
            archive.addfile(*as_stream(pair))
    with pytest.raises(GloReError, match=message):
        extract(str(path), str(tmp_path / "in" / "out"), max_bytes=1000, max_members=10)
    assert os.listdir(tmp_path / "in") == []
    assert sorted(os.listdir(tmp_path)) == ["evil.tar", "in"]


def test_compressed_tars_work_and_huge_headers_are_refused(tar, tmp_path):
    packed = tmp_path / "net.tar.gz"
    packed.write_bytes(gzip.compress(content_of(tar)))
    assert read_params(extract(str(packed), str(tmp_path / "out")))
    # A header that says it is 64 MiB long: memory that nothing here should ask for.
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20)))
    with pytest.raises(CheckpointError, match="a header of 67108864 bytes"):
        extract(str(bomb), str(tmp_path / "bomb"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_tar_is_one_clear_message(tar, tmp_path, share):
    content = content_of(tar)
    half = tmp_path / "half.tar"
    half.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="half.tar .*(truncated|0 checkpoints)"):
        extract(str(half), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["half.tar"]


def test_several_checkpoints_are_named(checkpoint, tmp_path):
    for name in ("net-0000.params", "net-0001.params", "net-symbol.json"):
        source = "net-symbol.json" if "symbol" in name else "net-0000.params"
        (tmp_path / name).write_bytes((checkpoint / source).read_bytes())
    with pytest.raises(CheckpointError, match="2 checkpoints .* net-0000.params, net-0001.params"):
        find_checkpoint(str(tmp_path))


def test_locate_leaves_paths_and_finds_tars_folders_and_names(checkpoint, tar, tmp_path):
    root = str(tmp_path / "root")
    prefix = str(checkpoint / "net")
    assert locate(prefix, root) == prefix
    assert locate(f"{prefix}-0000.params", root) == f"{prefix}-0000.params"
    assert locate(str(checkpoint), root) == f"{prefix}-0000.params"
    assert locate("no/such/thing", root) == "no/such/thing"
    assert not os.path.exists(root)

    found = locate(tar, root)
    assert found.startswith(os.path.join(root, "extracted", f"{NAME}-"))
    assert read_params(found)
    assert locate(tar, root) == found

    download(NAME, root, f"file://{tar}")
    expected = os.path.join(root, NAME, NAME, "net-0000.params")
    assert locate(NAME, root) == locate(f"{NAME}.tar".upper(), root) == expected
    with pytest.raises(UsageError, match="nearest first: resnet50_w-glore_2-3,"):
        locate("resnet50_w-glore_2-4", root)


def test_a_path_goes_before_a_released_name(checkpoint, tmp_path, monkeypatch):
    for name in ("net-0000.params", "net-symbol.json"):
        (tmp_path / name.replace("net", NAME)).write_bytes((checkpoint / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert locate(NAME, str(tmp_path / "root")) == NAME


def test_command_line_lists_downloads_and_extracts(tar, tmp_path, capsys):
    root = str(tmp_path)
    assert main(["download", NAME, "--root", root, "--url", f"file://{tar}"]) == 0
    lines = capsys.readouterr().out.split()
    assert lines == [f"{root}/{NAME}.tar", f"{root}/{NAME}/{NAME}/net-0000.params"]
    assert main(["list", "--root", root]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("yes |")]
    assert len(rows) == 1
    assert f"`{NAME}` | 77.2 |" in rows[0]
    assert main(["extract", f"{root}/{NAME}.tar"]) == 0
    assert capsys.readouterr().out.strip().endswith(f"{NAME}_extracted/{NAME}/net-0000.params")
    with pytest.raises(UsageError, match="one NAME"):
        main(["download", NAME, "resnet50", "--root", root, "--url", f"file://{tar}"])
