"""Errors with exit codes, safe files and the start-up shim."""

import errno
import json
import os
import platform
import subprocess
import sys
import threading

import portalocker
import pytest

import glore_common
from glore_common import (
    GloReError,
    Locked,
    UsageError,
    atomic_path,
    check_writable,
    closest_first,
    file_lock,
    printable,
    progress,
    run_main,
    sha256_of,
    write_text,
)


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = tmp_path / "result.txt"
    write_text(target, "first")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        with open(temporary, "w") as stream:
            stream.write("half of the sec")
        raise ZeroDivisionError
    assert target.read_text() == "first"
    write_text(target, "second")
    assert target.read_text() == "second"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_atomic_path_keeps_extension_and_usual_permissions(tmp_path):
    with atomic_path(tmp_path / "new" / "plot.png") as temporary:
        assert temporary.endswith(".png")
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "new" / "plot.png").stat().st_mode == plain.stat().st_mode


def test_atomic_path_applies_the_umask_without_setting_it(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        # Another thread's files would have the wrong permissions for as long as it is set.
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the process's"))
        write_text(tmp_path / "closed", "")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "closed").stat().st_mode & 0o777 == 0o640


def test_sha256_of_known_content(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_closest_first_puts_the_typo_beside_its_name():
    known = ["TINY_GLORE", "RESNET101_GLORE", "RESNET50_3D", "RESNET50_GLORE"]
    assert closest_first("resnet5o_glore", known)[0] == "RESNET50_GLORE"


def test_progress_yields_everything_and_logs_without_a_terminal(caplog):
    with caplog.at_level("INFO", "glore"):
        assert list(progress(iter([1, 2, 3]), "reading", total=3, every=0.0, unit="files")) == [
            1,
            2,
            3,
        ]
    assert "reading: 3/3 files" in caplog.messages


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (GloReError("no such list"), 1, "error: no such list"),
        (UsageError("--lr must be positive"), 2, "error: --lr must be positive"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_main_turns_mistakes_into_exit_codes(raised, code, text, capsys):
    def main(argv):
        raise raised

    assert run_main(main) == code
    printed = capsys.readouterr().err
    assert text in printed
    assert "Traceback" not in printed


def test_run_main_keeps_the_trace_of_a_bug():
    with pytest.raises(KeyError):
        run_main(lambda argv: {}["missing"])


def python(code, root, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MXNET_"))}
    variables.update(environment)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=variables, capture_output=True, text=True
    )


def test_mxnet_imports_quietly_and_computes(root):
    done = python("from mxnet_compat import mx; print(mx.nd.ones(3).sum().asscalar())", root)
    assert done.stdout == "3.0\n"
    assert done.stderr == ""


def test_a_users_own_variables_win(root):
    code = "import mxnet_compat, os; print(os.environ['OMP_NUM_THREADS'])"
    assert python(code, root, OMP_NUM_THREADS="1").stdout == "1\n"
    import mxnet_compat

    assert python(code, root).stdout == f"{mxnet_compat.physical_cores()}\n"


FAULTS = """
import resource
from mxnet_compat import mx
def use():
    arrays = [mx.nd.zeros(4 << 20) for _ in range(4)]
    mx.nd.waitall()
    del arrays
    mx.nd.waitall()
for _ in range(10):  # in which the heap grows
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc",
    reason="of glibc's malloc",
)
def test_the_memory_of_an_array_serves_the_next(root):
    """Without a clock: how many pages of 64 MiB the system had to map again, ten times over."""
    pages = 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(python(FAULTS, root).stdout) < pages / 3
    # A user's own setting wins.
    assert int(python(FAULTS, root, MALLOC_MMAP_MAX_="65536").stdout) > 0.9 * pages


def test_a_lock_is_held_once_and_names_its_holder(tmp_path):
    path = str(tmp_path / "folder" / ".lock")
    with file_lock(path) as has_locks:
        assert has_locks
        who = rf"process {os.getpid()} on .* holds .*\.lock"
        with pytest.raises(Locked, match=who), file_lock(path, timeout=0.2):
            pass
    with file_lock(path):
        pass


def test_a_lock_is_waited_for(tmp_path, caplog):
    caplog.set_level("INFO")
    path = str(tmp_path / ".lock")
    held = file_lock(path)
    held.__enter__()
    timer = threading.Timer(0.3, held.__exit__, (None, None, None))
    timer.start()
    with file_lock(path, timeout=30):
        pass
    timer.join()
    assert "waiting for it" in caplog.text


def test_a_lock_ends_with_its_process(tmp_path):
    path = str(tmp_path / ".lock")
    program = (
        "import os, sys\nfrom glore_common import file_lock\n"
        "with file_lock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=os.path.dirname(os.path.abspath(glore_common.__file__)),
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(Locked, match=f"process {holder.pid} "), file_lock(path):
        pass
    holder.kill()
    holder.wait()
    with file_lock(path, timeout=10):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise portalocker.LockException("no locks available")

    monkeypatch.setattr(portalocker, "lock", no_locks)
    with file_lock(str(tmp_path / ".lock")) as has_locks:
        assert not has_locks
    assert "cannot be locked" in caplog.text


def test_a_lock_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GloReError, match="cannot write to"), file_lock(str(tmp_path / "file/x")):
        pass


def test_places_are_tried_without_writing(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "file.json", "--output")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/x cannot be written: .*file is no folder"):
        check_writable(tmp_path / "file" / "x", "--output")
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path, "--output")
    with pytest.raises(GloReError, match=r"takes \d+ MiB, the disk of .* MiB left"):
        check_writable(tmp_path / "big", "the checkpoint", 2**60)


def test_a_read_only_place_is_named():
    if not os.path.isdir("/proc/sys"):
        pytest.skip("there is no read-only file system to try")
    with pytest.raises(GloReError, match="read-only"):
        check_writable("/proc/sys/x/file", "--output")


def test_a_full_disk_is_a_message(capsys):
    def main(_):
        raise OSError(errno.ENOSPC, "No space left on device", "a/b.json")

    assert run_main(main) == 1
    assert capsys.readouterr().err.endswith("error: a/b.json: No space left on device\n")
    with pytest.raises(OSError, match="other"):
        run_main(lambda _: (_ for _ in ()).throw(OSError(errno.EBADF, "other")))


def test_names_that_are_not_utf8_are_written_and_read_again(tmp_path):
    name = os.fsdecode(b"Stra\xdfe.jpg")
    path = tmp_path / "out.json"
    write_text(path, json.dumps({"name": name}, ensure_ascii=False))
    content = path.read_bytes().decode("utf-8")
    assert json.loads(content)["name"] == name
    assert os.fsencode(json.loads(content)["name"]) == b"Stra\xdfe.jpg"
    assert printable(f"a\tb\nc\r{name} грач") == "a\\tb\\nc\\rStra\\udcdfe.jpg грач"
