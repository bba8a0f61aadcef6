"""The MXNet checkpoints released with GloRe for ImageNet: what they are, download, extraction.

Chen et al., CVPR 2019; the tars and their addresses are those of facebookresearch/GloRe. Each
holds a graph (``*-symbol.json``), parameters (``*-0000.params``) and the code that made the graph,
which is never run here.

``python -m checkpoint.released list | download NAME | extract TAR`` from a shell; scripts call
:func:`locate` for whatever the user gave as a checkpoint.
"""

import argparse
import bz2
import contextlib
import difflib
import glob
import gzip
import http.client
import json
import logging
import lzma
import math
import os
import posixpath
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any, Optional

from glore_common import (
    GloReError,
    UsageError,
    closest_first,
    file_lock,
    module_command,
    progress,
    run_main,
    sha256_of,
    write_text,
)

from .params import STREAM_START, ZIP_START, CheckpointError, listing
from .paths import SYMBOL, Files, epochs, split_key, stem_of

LOGGER = logging.getLogger("glore")

# Names, which are those of the networks, and top-1 accuracy in per cent of a single centre crop of
# ImageNet-1k, as the project's README states it.
RELEASED = {
    "resnet50": 76.2,
    "resnet50_w-glore_0-3": 78.4,
    "resnet50_w-glore_2-3": 78.2,
    "resnet50_w-se": 77.2,
    "resnet50_w-se_w-glore_0-3": 78.7,
    "resnet200_w-glore_0-3": 79.4,
    "resnet200_w-glore_2-3": 79.7,
    "resnext101-32x4d_w-glore_2-3": 79.8,
    "dpn98_w-glore_2-3": 80.2,
    "dpn131_w-glore_2-3": 80.3,
}
URL_PREFIX = "https://dl.fbaipublicfiles.com/glore/imagenet/"
CHUNK = 1 << 20
# The largest released checkpoint holds some 90 million values of 4 bytes.
MAX_BYTES = 4 << 30
MAX_MEMBERS = 1000
COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
TAR_ENDING = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz)$")
# What an extracted folder holds beside the tar's content: checksums, so that damage shows.
STAMP = ".glore-extracted.json"
# What reading a damaged archive raises.
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)


class DownloadError(GloReError):
    """A released file that cannot be fetched or is not what it was; the message says what to do."""


def url_of(name: str) -> str:
    """Return where the project published a checkpoint."""
    return f"{URL_PREFIX}{name}.tar"


def released_name(text: str) -> str:
    """Return the name of a released checkpoint, given in any letter case, also with ``.tar``.

    Raises
    ------
    UsageError
        When there is none of that name; the message lists all, the nearest first.
    """
    found = {name.lower(): name for name in RELEASED}.get(re.sub(r"\.tar$", "", text.lower()))
    if found is None:
        raise UsageError(
            f"no released checkpoint is called {text!r}; nearest first: "
            f"{', '.join(closest_first(text, RELEASED))}"
        )
    return found


def default_root() -> str:
    """Return where downloads are kept: ``$GLORE_HOME/released``, else ``~/.glore/released``."""
    home = os.environ.get("GLORE_HOME") or os.path.join(os.path.expanduser("~"), ".glore")
    return os.path.join(home, "released")


def _lock(root: str, name: str) -> contextlib.AbstractContextManager:
    """Keep other processes from downloading or extracting ``name`` below ``root`` meanwhile."""
    return file_lock(os.path.join(root, f".{name}.lock"), math.inf)


def _read_json(path: str) -> Optional[dict]:
    """Return the dictionary in a file of ours, or None when there is none to be had."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DownloadError(f"{path} cannot be read ({error}); delete it and try again") from error
    if not isinstance(content, dict):
        raise DownloadError(f"{path} is none of our records; delete it and try again")
    return content


def _write_json(path: str, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _is_tar(path: str) -> bool:
    """Tell whether a file is a tar from its first header to the end of its last member."""
    try:
        with _open_tar(path) as archive:
            return sum(1 for _ in archive) > 0
    except DAMAGE:
        return False


def _looks_like_tar(path: str) -> bool:
    """Tell a tar, whole or not, by its first bytes: PyTorch's own examples write ``.pth.tar``.

    The name decides where these say nothing.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if start.startswith((ZIP_START, STREAM_START)):
        return False
    if start.startswith(tuple(magic for magic, _ in COMPRESSED)) or start[257:262] == b"ustar":
        return True
    return TAR_ENDING.search(path) is not None


def _verify(path: str, url: str) -> str:
    """Compare a tar with its record; the first time the record is made."""
    record_path = f"{path}.json"
    record = _read_json(record_path)
    digest, size = sha256_of(path), os.path.getsize(path)
    if record is None:
        # Put there by hand, or downloaded by a process that died before its record.
        if not _is_tar(path):
            raise DownloadError(f"{path} is no tar or is cut short; delete it and download {url}")
        _write_json(record_path, {"url": url, "size": size, "sha256": digest})
        LOGGER.info("%s: recorded sha256 %s", path, digest)
    elif record.get("sha256") != digest:
        raise DownloadError(
            f"{path} has changed since it was first used: its sha256 is {digest} ({size} bytes), "
            f"recorded is {record.get('sha256')} ({record.get('size')} bytes). Delete it and "
            f"{record_path} to download it again."
        )
    return digest


def _offline(name: str, url: str, path: str, reason: Any) -> DownloadError:
    return DownloadError(
        f"{name} cannot be downloaded from {url}: {reason}. Where there is a network, "
        f"download that file and copy it to {path}; then run this again. (A part that was "
        "downloaded is kept and continued.)"
    )


def _request(url: str, offset: int, part: dict) -> urllib.request.Request:
    """Return a request for ``url``, from ``offset`` on if it is still the file of ``part``."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        # A weak ETag does not promise equal bytes; RFC 9110 forbids it here.
        etag = part.get("etag") or ""
        validator = etag if etag and not etag.startswith("W/") else part.get("modified")
        if validator:
            request.add_header("If-Range", validator)
    return request


def _resumed_total(headers: Any, offset: int, part: dict) -> Optional[int]:
    """Return the whole file's size if a 206 answer continues what we have, else None."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range") or "")
    if match is None or int(match[1]) != offset:
        return None
    total = int(match[2])
    return total if part.get("total") in (None, total) else None


def _transfer(name: str, url: str, path: str, timeout: float) -> Optional[int]:
    """Download ``url`` to ``path.part``, continuing what is there; return the size it must have."""
    partial, part_record = f"{path}.part", f"{path}.part.json"
    part = _read_json(part_record) or {}
    offset = os.path.getsize(partial) if os.path.exists(partial) and part.get("url") == url else 0
    if offset and part.get("total") == offset:
        # Everything came, and the process died before the end.
        return offset
    try:
        answer = urllib.request.urlopen(_request(url, offset, part), timeout=timeout)
        resumed = getattr(answer, "status", None) == 206
        total = _resumed_total(answer.headers, offset, part) if resumed else None
    except urllib.error.HTTPError as error:
        if not offset or error.code != 416:
            raise
        # What we have is longer than the file is today.
        answer, resumed, total = error, True, None
    if resumed and total is None:
        answer.close()
        answer = urllib.request.urlopen(_request(url, 0, {}), timeout=timeout)
    if total is None:
        # From the start: a fresh download, a server without ranges, or another file by now.
        offset = 0
        length = answer.headers.get("Content-Length") or ""
        total = int(length) if length.isdigit() else None
    with answer, open(partial, "ab" if offset else "wb") as stream:
        record = {"url": url, "total": total, "etag": answer.headers.get("ETag")}
        _write_json(part_record, dict(record, modified=answer.headers.get("Last-Modified")))
        steps = None if total is None else -(-(total - offset) // CHUNK)
        chunks = iter(lambda: answer.read(CHUNK), b"")
        for chunk in progress(chunks, f"Downloading {name}", steps, unit="MiB"):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return total


def _fetch(name: str, url: str, path: str, timeout: float) -> None:
    """Make ``path`` of ``url``, with its record."""
    partial, part_record = f"{path}.part", f"{path}.part.json"
    try:
        total = _transfer(name, url, path, timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        is_answer = isinstance(error, urllib.error.HTTPError)
        reason = error if is_answer else getattr(error, "reason", error)
        raise _offline(name, url, path, reason) from error
    size = os.path.getsize(partial)
    if total is not None and size < total:
        raise _offline(name, url, path, f"the connection ended after {size} of {total} bytes")
    if (total is not None and size > total) or not _is_tar(partial):
        os.remove(partial)
        os.remove(part_record)
        raise _offline(name, url, path, "what came is no whole tar (perhaps a proxy's page)")
    _write_json(f"{path}.json", {"url": url, "size": size, "sha256": sha256_of(partial)})
    os.replace(partial, path)
    os.remove(part_record)


def download(
    name: str, root: Optional[str] = None, url: Optional[str] = None, timeout: float = 60.0
) -> str:
    """Return a released tar, downloaded if it is not there yet, and checked.

    The SHA-256 is recorded beside the tar (``NAME.tar.json``) when it is first there and compared
    at every later call. An interrupted download is continued by the next call as far as the
    server supports it and its file is the same.

    Parameters
    ----------
    name
        One of :data:`RELEASED`.
    root
        Folder of the tars; by default :func:`default_root`.
    url
        Another place to take it from: http, https or file.
    timeout
        Seconds that the server may be silent.

    Returns
    -------
    str
        Path of the tar.

    Raises
    ------
    UsageError
        For an unknown name or a URL of another kind.
    DownloadError
        If it cannot be fetched (the message says what to put where), or is not what was recorded.
    """
    name = released_name(name)
    url = url or url_of(name)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https", "file"):
        raise UsageError(f"{url} is no http, https or file address")
    root = os.path.abspath(root or default_root())
    path = os.path.join(root, f"{name}.tar")
    with _lock(root, name):
        if not os.path.exists(path):
            _fetch(name, url, path, timeout)
        _verify(path, url)
    return path


class _ShortReads:
    """A decompressed stream that refuses to be read into memory as a whole.

    ``tarfile`` reads a header of any length that an archive claims; compressed, a small file can
    claim much.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.tell, self.seek, self.close = stream.tell, stream.seek, stream.close

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, at most 16 MiB."""
        if not 0 <= size <= 16 * CHUNK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.stream.read(size)


@contextlib.contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    """Open a tar, also a gzip, bzip2 or xz compressed one, without trusting its headers."""
    with open(path, "rb") as stream:
        start = stream.read(6)
    opener = next((opener for magic, opener in COMPRESSED if start.startswith(magic)), open)
    content: Any = _ShortReads(opener(path, "rb"))
    with contextlib.closing(content), tarfile.open(fileobj=content, mode="r:") as archive:
        yield archive


def _safe_name(member: tarfile.TarInfo, path: str) -> str:
    """Return a member's path below the target; refuse what may lie elsewhere or is no file."""
    name = member.name
    shown = f"{path}: {name[:200]!r}"
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise CheckpointError(f"{shown} is an absolute path; nothing was extracted")
    if ".." in name.split("/"):
        raise CheckpointError(f"{shown} leads out of the folder; nothing was extracted")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise CheckpointError(
            f"{shown} is neither a plain file nor a folder (a link, a device, …); nothing was "
            "extracted"
        )
    return posixpath.normpath(name)


def _unpack(
    archive: tarfile.TarFile, path: str, folder: str, max_bytes: int, max_members: int
) -> dict[str, str]:
    """Write an archive's files into the empty ``folder``; return their checksums by name."""
    seen, files, total = set(), [], 0
    for count, member in enumerate(archive, 1):
        name = _safe_name(member, path)
        total += member.size
        if count > max_members or total > max_bytes:
            raise CheckpointError(
                f"{path} holds more than {max_members} files or {max_bytes} bytes; a released "
                "checkpoint does not. Nothing was extracted"
            )
        target = os.path.join(folder, *name.split("/"))
        if member.isdir():
            os.makedirs(target, exist_ok=True)
            continue
        # Some file systems do not tell A from a.
        if name.casefold() in seen:
            raise CheckpointError(f"{path} holds {name!r} twice; nothing was extracted")
        seen.add(name.casefold())
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with archive.extractfile(member) as source, open(target, "xb") as stream:
            shutil.copyfileobj(source, stream, CHUNK)
        if os.path.getsize(target) != member.size:
            raise CheckpointError(f"{path} is truncated within {name!r}; nothing was extracted")
        files.append(name)
    return {name: sha256_of(os.path.join(folder, *name.split("/"))) for name in files}


def _digest_of(path: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_whole(target: str, digest: str) -> bool:
    """Tell whether ``target`` is what was extracted from the tar of this checksum."""
    stamp = _read_json(os.path.join(target, STAMP))
    if stamp is None or stamp.get("tar_sha256") != digest:
        return False
    paths = {os.path.join(target, *n.split("/")): sha for n, sha in stamp.get("files", {}).items()}
    return all(os.path.isfile(p) and sha256_of(p) == sha for p, sha in paths.items())


def extract(
    tar: str, target: str, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS
) -> str:
    """Extract a checkpoint's tar safely: all of it appears in ``target``, or nothing.

    Refused are absolute paths and ``..``, links, devices and anything else that is no plain file
    or folder, a name that is there twice, and more or larger files than allowed. Permissions,
    owners and times are not taken over.

    Parameters
    ----------
    tar
        Its path.
    target
        Folder to make. If it is already there it must be whole and of this very tar.
    max_bytes, max_members
        Limits of what comes out.

    Returns
    -------
    str
        Path of the ``.params`` file in it, beside which its ``-symbol.json`` lies.

    Raises
    ------
    CheckpointError
        If the tar is damaged, unsafe, or holds no checkpoint (or several).
    UsageError
        If ``target`` holds something else.
    """
    digest = _digest_of(tar)
    target = os.path.abspath(target)
    if os.path.exists(target):
        if not _is_whole(target, digest):
            raise UsageError(
                f"{target} is there, but is not what {tar} holds (or was changed); delete it to "
                "extract again"
            )
        return find_checkpoint(target)
    parent, name = os.path.split(target)
    work = None
    try:
        os.makedirs(parent, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
        # mkdtemp makes a private folder; this one has the usual permissions.
        temporary = os.path.join(work, name)
        os.mkdir(temporary)
        with _open_tar(tar) as archive:
            files = _unpack(archive, tar, temporary, max_bytes, max_members)
        find_checkpoint(temporary, tar)
        record = {"tar": os.path.abspath(tar), "tar_sha256": digest, "files": files}
        _write_json(os.path.join(temporary, STAMP), record)
        os.rename(temporary, target)
    except DAMAGE as error:
        # Only the system's own errors have a number: no space, no permission, …
        if isinstance(error, OSError) and error.errno:
            raise GloReError(f"{tar} cannot be extracted to {target}: {error}") from error
        raise CheckpointError(f"{tar} is no tar, or is truncated or damaged: {error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return find_checkpoint(target)


def find_checkpoint(folder: str, where: Optional[str] = None) -> str:
    """Return the ``.params`` file of the one checkpoint in a folder and those below it.

    Parameters
    ----------
    folder
        Searched with all below it.
    where
        What messages call it.

    Raises
    ------
    CheckpointError
        If there is not exactly one ``PREFIX-NNNN.params`` with its ``PREFIX-symbol.json``.
    """
    paths = glob.glob(os.path.join(glob.escape(folder), "**", "*.params"), recursive=True)
    found = [path for path in sorted(paths) if os.path.isfile(Files(stem_of(path)).symbol)]
    if len(found) != 1:
        names = [os.path.relpath(path, folder) for path in found or sorted(paths)]
        raise CheckpointError(
            f"{where or folder} holds {len(found)} checkpoints (PREFIX-symbol.json with "
            f"PREFIX-0000.params), not one{': ' if names else ''}{listing(names)}"
        )
    return found[0]


def locate(text: str, root: Optional[str] = None) -> str:
    """Return a path that the loaders accept for what a user gave as a checkpoint.

    Parameters
    ----------
    text
        A file or a checkpoint's prefix stays itself; a tar (whatever its name) is extracted below
        ``root``; a folder
        stands for the one checkpoint in it; a name of :data:`RELEASED` is downloaded and
        extracted below ``root``.
    root
        By default :func:`default_root`.

    Returns
    -------
    str
        For ``network.pretrained.load_pretrained`` and its like.

    Raises
    ------
    UsageError
        If it is neither a path nor a released name, but looks like the latter.
    DownloadError, CheckpointError
        As :func:`download` and :func:`extract`.
    """
    text = os.fspath(text)
    root = os.path.abspath(root or default_root())
    name = re.sub(r"\.tar$", "", text.lower())
    path = split_key(text)[0]
    if os.path.isfile(path):
        if not _looks_like_tar(path):
            return text
        stem = TAR_ENDING.sub("", os.path.basename(text))
        with _lock(root, stem):
            # By content: another tar of the same name must not be taken for this one.
            target = os.path.join(root, "extracted", f"{stem}-{_digest_of(text)[:16]}")
            return extract(text, target)
    if os.path.isdir(text):
        return find_checkpoint(text)
    if epochs(text) or os.path.exists(text + SYMBOL):
        return text
    known = {other.lower(): other for other in RELEASED}
    if name in known:
        tar = download(name, root)
        with _lock(root, known[name]):
            return extract(tar, os.path.join(root, known[name]))
    if os.sep not in text and difflib.get_close_matches(name, known, 1, 0.8):
        released_name(text)
    return text


def table(root: Optional[str] = None) -> str:
    """Return a Markdown table of the released checkpoints and whether they are below ``root``."""
    root = root or default_root()
    rows = ["| name | published top-1, % | address | here |", "|---|---:|---|---|"]
    for name, top1 in RELEASED.items():
        here = "yes" if os.path.exists(os.path.join(root, f"{name}.tar")) else ""
        rows.append(f"| `{name}` | {top1} | {url_of(name)} | {here} |")
    return "\n".join(rows)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command; see ``python -m checkpoint.released --help``."""
    parser = argparse.ArgumentParser(
        prog=module_command("checkpoint.released"), description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {
        "list": commands.add_parser("list", help="print the released checkpoints"),
        "download": commands.add_parser("download", help="download, check and extract"),
        "extract": commands.add_parser("extract", help="extract a tar safely"),
    }
    parts["download"].add_argument("names", nargs="+", metavar="NAME", help="see list")
    parts["download"].add_argument("--url", help="take it from here (one NAME only)")
    parts["extract"].add_argument("tar", metavar="TAR")
    parts["extract"].add_argument(
        "target", nargs="?", metavar="FOLDER", help="to make (default: TAR's name with _extracted)"
    )
    for part in (parts["list"], parts["download"]):
        part.add_argument("--root", help=f"folder of the tars (default: {default_root()})")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.command == "list":
        print(table(args.root))
    elif args.command == "extract":
        print(extract(args.tar, args.target or f"{TAR_ENDING.sub('', args.tar)}_extracted"))
    else:
        if args.url and len(args.names) > 1:
            raise UsageError("--url is for one NAME")
        for name in args.names:
            tar = download(name, args.root, args.url)
            print(tar)
            print(extract(tar, os.path.join(os.path.dirname(tar), released_name(name))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
