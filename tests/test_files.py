import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.errors import CheckpointError, CheckpointNotFound, DataError
from vs2_plugin.files import alone, atomic_file, atomic_folder, hidden, part_of, settle, without_part


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("default-store", ".locks"))


class Interrupted(BaseException):
    """Any exception, Ctrl-C's too."""


# ---- a file


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "x.json"
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert scratch.parent == tmp_path and not path.exists()
    assert path.read_text() == "new" and names(tmp_path) == ["x.json"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old and longer")
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old and longer"
    assert path.read_text() == "new" and names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("before", ["old", None])
@pytest.mark.parametrize("kind", [OSError, Interrupted])
def test_a_file_that_another_writer_began_is_removed_when_it_fails(kind, before, tmp_path):
    path = tmp_path / "x.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(kind) as caught, without_part(path):
        path.write_text("")
        raise kind(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == [] and getattr(caught.value, "filename", str(path)) == str(path)


def test_a_file_that_another_writer_finished_or_did_not_begin_stays(tmp_path):
    path = tmp_path / "x.json"
    with without_part(path):
        path.write_text("old")
    error = OSError(errno.EIO, "Input/output error")  # of something else
    with pytest.raises(OSError, match="Input") as caught, without_part(path):
        raise error
    assert path.read_text() == "old" and caught.value.filename is None
    with pytest.raises(OSError, match="Input"), without_part(Path(os.devnull)):
        raise error


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such modes")
@pytest.mark.parametrize(("around", "file", "inside"), [
    (0o755, 0o644, 0o755), (0o700, 0o600, 0o700), (0o2775, 0o664, 0o2775), (0o1777, 0o644, 0o755),
])  # fmt: skip
def test_who_may_read_a_folder_may_read_what_is_in_it(tmp_path, around, file, inside):
    tmp_path.chmod(around)
    mask = os.umask(0o077)
    try:
        with atomic_file(tmp_path / "file") as scratch:
            scratch.write_text("new")
        with atomic_folder(tmp_path / "folder") as scratch:
            (scratch / "part").mkdir()
            (scratch / "part" / "file").write_text("new")
    finally:
        os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.name != "default-store"}
    folders = {path for path in modes if path.is_dir()}
    assert {modes[path] for path in folders} == {inside} and {tmp_path / ".locks", tmp_path / "folder"} < folders
    assert {modes[path] for path in modes.keys() - folders} == {file}


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="for root, every file can be read")
def test_a_file_of_somebody_else_is_told_from_a_damaged_one(tmp_path):
    (tmp_path / "vs2.json").write_text("{}")
    (tmp_path / "vs2.json").chmod(0)
    with pytest.raises(CheckpointError, match="this user may not read it") as caught:
        Checkpoint.load(tmp_path)
    assert not isinstance(caught.value, CheckpointNotFound)


def test_what_the_system_forbids_is_said_with_what_the_owner_can_do(tmp_path):
    told = hidden(PermissionError(errno.EACCES, "Permission denied"), tmp_path / "vs2.json")
    assert told.endswith(f"chmod -R a+rX {tmp_path}")
    assert hidden(FileNotFoundError(), tmp_path) is None


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_file_that_fails_leaves_what_was_there(error, old, tmp_path):
    path = tmp_path / "x.json"
    if old:
        path.write_text(old)
    with pytest.raises(error), atomic_file(path) as scratch:
        scratch.write_text("half")
        raise error
    assert names(tmp_path) == (["x.json"] if old else [])
    assert not old or path.read_text() == old


def test_a_file_that_cannot_be_moved_in_leaves_no_scratch(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError), atomic_file(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert names(tmp_path) == ["x"]


def test_a_file_in_no_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError), atomic_file(tmp_path / "nope" / "x"):
        pytest.fail("the block ran")


# ---- a folder


def test_a_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "around" / "mine"
    with atomic_folder(path) as scratch:
        (scratch / "a").write_text("new")
        assert names(path.parent) == [scratch.name]
    assert (path / "a").read_text() == "new" and names(path.parent) == ["mine"]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "old").write_text("old")
    with atomic_folder(path) as scratch:
        (scratch / "new").write_text("new")
        assert names(path) == ["old"]
    assert names(path) == ["new"] and names(tmp_path) == ["mine"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_folder_that_fails_leaves_what_was_there(error, old, tmp_path):
    path = tmp_path / "mine"
    if old:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(error), atomic_folder(path) as scratch:
        (scratch / "half").write_text("half")
        raise error
    assert names(tmp_path) == (["mine"] if old else [])
    assert not old or names(path) == ["old"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_moved_in_leaves_the_old_one(failing, tmp_path, monkeypatch):
    path, replace, calls = tmp_path / "mine", os.replace, []
    path.mkdir()
    (path / "old").write_text("old")

    def fails_once(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OSError, match="no space left"), atomic_folder(path) as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == ["mine"] and names(path) == ["old"]


def test_a_folder_goes_on_with_what_is_worth_keeping(tmp_path):
    path = tmp_path / "mine"

    def keep(scratch):
        return (scratch / "half").exists()

    for name in ("useless", "half"):
        with pytest.raises(Interrupted), atomic_folder(path, keep) as scratch:
            (scratch / name).write_text("half")
            raise Interrupted
        assert names(tmp_path) == ([scratch.name] if name == "half" else [])
    with atomic_folder(path, keep) as scratch:
        assert names(scratch) == ["half"]
    assert names(tmp_path) == ["mine"]
    part_of(path).mkdir()  # a process died
    (part_of(path) / "useless").write_text("")
    with atomic_folder(path, keep) as scratch:
        assert names(scratch) == []


# ---- a process that dies


def die(tmp_path, call, number):
    """Replace the folder ``mine`` in a process that dies before the n-th call of a function. Tells whether it died."""
    code = f"""
import os
from pathlib import Path
from vs2_plugin.files import atomic_folder
calls = []
stock = {call}
def dies(*args, **settings):
    calls.append(args)
    if len(calls) == {number}:
        os._exit(9)
    return stock(*args, **settings)
with atomic_folder(Path({str(tmp_path)!r}) / "mine") as scratch:
    (scratch / "new").write_text("new")
    {call} = dies
"""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


@pytest.mark.parametrize(("number", "left"), [(1, "old"), (2, "new"), (3, "new")])
def test_a_swap_that_a_dead_writer_began_is_finished(number, left, tmp_path):
    """Its renames: the scratch folder is called whole, the old one goes aside, the new one takes its place."""
    path = tmp_path / "mine"
    path.mkdir()
    (path / "old").write_text("old")
    assert die(tmp_path, "os.replace", number)
    assert path.exists() is (number < 3)
    settle(path)
    assert names(path) == [left]
    assert names(tmp_path) == ([".mine.part", "mine"] if number == 1 else ["mine"])
    with atomic_folder(path) as scratch:
        (scratch / "third").write_text("")
    assert names(path) == ["third"] and names(tmp_path) == ["mine"]


def test_an_old_folder_that_was_left_aside_goes(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "old").write_text("old")
    (tmp_path / ".mine.old").mkdir()
    settle(path)
    assert ".mine.old" in names(tmp_path)  # nobody has to wait for it
    with alone(path):
        assert names(tmp_path) == ["mine"] and names(path) == ["old"]


def test_nothing_is_settled_where_nothing_was_left(tmp_path):
    settle(tmp_path / "not" / "there")
    assert names(tmp_path) == []


def test_a_folder_is_settled_from_inside_too(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".mine.new").mkdir()
    (tmp_path / ".mine.new" / "new").write_text("")
    monkeypatch.chdir(tmp_path / "mine")
    settle(Path())
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["new"]
    settle(Path("/"))


# ---- two writers


def test_a_second_writer_is_refused_until_the_first_has_finished(tmp_path, elsewhere):
    code = f"""
from pathlib import Path
from vs2_plugin.errors import DataError
from vs2_plugin.files import alone
try:
    with alone(Path({str(tmp_path)!r}) / "mine", seconds=0) as waited:
        print("alone", waited)
except DataError as error:
    print(error)
"""
    with alone(tmp_path / "mine"), alone(tmp_path / "mine") as waited:  # it may nest
        assert not waited
        assert elsewhere(code) == (
            f"another process is writing {tmp_path / 'mine'}; wait until it has finished, or write under another name"
        )
    assert elsewhere(code) == "alone False"


def test_a_writer_waits_for_another_and_is_told(tmp_path):
    code = f"""
import sys
from pathlib import Path
from pathlib import Path
from vs2_plugin.files import alone
with alone(Path({str(tmp_path)!r}) / "mine"):
    print("in", flush=True)
    sys.stdin.readline()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(DataError), alone(tmp_path / "mine", seconds=0.1):
        pytest.fail("two writers")
    with alone(tmp_path / "mine", -1, lambda: (other.stdin.write("go on\n"), other.stdin.flush())) as waited:
        assert waited
    assert other.wait() == 0


def test_a_lock_goes_with_its_process(tmp_path):
    code = f"""
import os
from pathlib import Path
from vs2_plugin.files import alone
with alone(Path({str(tmp_path)!r}) / "mine"):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with alone(tmp_path / "mine", seconds=0) as waited:
        assert not waited


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_keeps_nobody_out_and_leftovers_are_finished_all_the_same(
    error, tmp_path, monkeypatch
):
    def refuses(self, *args, **settings):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuses)
    (tmp_path / ".mine.new").mkdir()
    settle(tmp_path / "mine")
    assert names(tmp_path) == ["mine"]
    with atomic_folder(tmp_path / "mine") as scratch:
        (scratch / "x").write_text("")
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["x"]


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def refuses(self, *args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileLock, "acquire", refuses)
    with pytest.raises(OSError, match="No space left"), alone(tmp_path / "mine"):
        pytest.fail("alone")
