"""The cache on disk: what is damaged is rebuilt, by a process that does not crash; what others can write is refused.

Would catch: a library that is loaded before it is verified (SIGBUS where it was cut off), a record that is believed
because it is JSON, files that are placed before they are whole, a folder that others can write to and is taken.
The entry is a library of one function, in a process without torch.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_tilelang.cli import doctor
from mhc_tilelang.compiler import disk_cache, trust
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.compiler.kernel import Signature
from mhc_tilelang.errors import CompilerError, TrustError

CODE = """
import ctypes, shutil, sys
from mhc_tilelang.compiler import disk_cache

def make(scratch):
    print("made")
    shutil.copy(sys.argv[1], scratch / "made.so")
    return {"symbol": "answer"}, scratch / "made.so"

def use(facts, library):
    return getattr(ctypes.CDLL(str(library)), facts["symbol"])()

print(disk_cache.get_or_make("place", "entry", make, use))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of more than two pages, whose function returns 42."""
    folder = tmp_path_factory.mktemp("library")
    source = folder / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    build.run_compiler(source, folder / "answer.so")
    return folder / "answer.so"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing that is trusted but what should be."""
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    return tmp_path / "cache"


def call(library: Path) -> tuple[list[str], str]:
    """Return what a fresh process prints, "made" if it made the entry, then the answer; and its stderr."""
    command = [sys.executable, "-c", CODE, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.split(), done.stderr


def entry(name: str = "entry") -> Path:
    """An entry that is made here, of a record alone; its record."""
    disk_cache.get_or_make("place", name, lambda _: ({"made": True}, None), lambda facts, _: facts)
    return disk_cache.location() / "place" / f"{name}.json"


def kept() -> dict:
    """The facts of that entry; those of a new one if it is rebuilt."""
    return disk_cache.get_or_make("place", "entry", lambda _: ({"anew": True}, None), lambda facts, _: facts)


def changed(record: Path, change: Callable[[dict], object], sealed: bool) -> None:
    """Change a record, and seal it again as one who knows how would."""
    facts = json.loads(record.read_text())
    change(facts)
    if sealed:
        facts["seal"] = disk_cache.seal_of(facts)
    record.write_text(json.dumps(facts))


def flipped(path: Path) -> None:
    """Change a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def in_place_of(path: Path) -> None:
    """A folder with a file in it, in place of the file."""
    path.unlink()
    path.mkdir()
    (path / "file").touch()


DAMAGE_OF_LIBRARY: dict[str, Callable[[Path], object]] = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one page": lambda path: path.write_bytes(path.read_bytes()[:4096]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped byte": flipped,
    "missing": Path.unlink,
    "a folder": in_place_of,
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGE_OF_LIBRARY.values(), ids=DAMAGE_OF_LIBRARY)
def test_a_damaged_library_is_rebuilt(cache: Path, library: Path, damage: Callable[[Path], object]) -> None:
    """The process neither crashes nor fails and names the file in one line; the next one finds it whole."""
    assert call(library) == (["made", "42"], "")
    path = cache / "place" / "entry.so"
    damage(path)
    printed, said = call(library)
    assert printed == ["made", "42"]
    assert said.startswith(f"mhc-tilelang: {path}: expected ")
    assert said.endswith(": rebuilt\n")
    assert said.count("\n") == 1
    assert call(library) == (["42"], "")
    assert sorted(file.name for file in path.parent.iterdir()) == ["entry.json", "entry.so"]


DAMAGE_OF_RECORD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped byte": flipped,
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1, 2]"),
    "number": lambda path: path.write_text("7"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\xfd"),
    "nested": lambda path: path.write_text("[" * 200_000),
    "a folder": in_place_of,
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    **{f"no {name}": lambda path, name=name: changed(path, lambda r: r.pop(name), False) for name in disk_cache.RECORD},
    "a field of another type": lambda path: changed(path, lambda r: r.update(facts=[], file=[]), True),
    "a file of another type": lambda path: changed(path, lambda r: r.update(file={"bytes": "9", "sha256": "0"}), True),
    "another format": lambda path: changed(path, lambda r: r.update(format=0), True),
    "changed facts": lambda path: changed(path, lambda r: r["facts"].update(made=False), False),
    "another entry's": lambda path: shutil.copy(entry("other"), path),
}


@pytest.mark.parametrize("damage", DAMAGE_OF_RECORD.values(), ids=DAMAGE_OF_RECORD)
def test_a_damaged_record_is_rebuilt(
    cache: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    """Never a TypeError, never facts that were not written."""
    damage(entry())
    assert kept() == {"anew": True}
    said = capsys.readouterr().err
    assert "entry.json" in said
    assert said.endswith(": rebuilt\n")
    assert said.count("\n") == 1
    assert kept() == {"anew": True}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("scalars"), "scalars: expected dict, got none"),
        (lambda facts: facts.update(scalars={"splits": 1}), "scalars: expected a list of strings"),
        (lambda facts: facts.update(buffers=None), "buffers: expected list, got NoneType"),
        (lambda facts: facts.update(buffers=["x"]), "buffers: expected an object, got str"),
        (lambda facts: facts["buffers"][0].pop("dtype"), "dtype: expected str, got none"),
        (lambda facts: facts["buffers"][0].update(shape=[1.5]), r"shape: expected sizes or names, got \[1.5\]"),
    ],
)
def test_a_signature_that_is_none_is_refused(change: Callable[[dict], object], message: str) -> None:
    """The error names the field, wherever a signature is read: the cache recompiles, a bundle raises a BundleError."""
    facts = {"buffers": [{"name": "x", "dtype": "float32", "shape": ["num_tokens", 4]}], "scalars": {"splits": "int32"}}
    assert Signature.from_json(facts, "post").names == ("x", "splits")
    change(facts)
    with pytest.raises(ValueError, match=f"post.*: {message}"):
        Signature.from_json(facts, "post")


def test_facts_of_no_use_are_rebuilt_once(cache: Path) -> None:
    """A kept entry that `use` refuses is recomputed; for a new one, the error is the caller's."""
    entry()
    made = []

    def use(facts: dict, _file: Path) -> int:
        return facts["needed"]

    def make(needed: dict) -> dict:
        made.append(1)
        return needed

    assert disk_cache.get_or_make("place", "entry", lambda _: (make({"needed": 5}), None), use) == 5
    entry("other")
    with pytest.raises(KeyError, match="needed"):
        disk_cache.get_or_make("place", "other", lambda _: (make({}), None), use)
    assert len(made) == 2


@pytest.mark.parametrize("fails_at", ["make", "library", "record"])
def test_a_writer_that_stops_leaves_nothing_to_find(
    cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    """A full disk while the compiler writes, before the library is in its place, or before its record is."""
    placed = []

    def put(made: Path, place: Path, put: Callable = disk_cache.put) -> None:
        placed.append(place.suffix)
        if fails_at == {".so": "library", ".json": "record"}[place.suffix]:
            raise OSError(28, "No space left on device")
        put(made, place)

    def make(scratch: Path) -> disk_cache.Made:
        if fails_at == "make":
            raise OSError(28, "No space left on device")
        return {"symbol": "answer"}, Path(shutil.copy(library, scratch))

    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "put", put)
        with pytest.raises(CompilerError, match=r"cannot keep kernels in .*No space left.*MHC_TILELANG_CACHE"):
            disk_cache.get_or_make("place", "entry", make, lambda *_: pytest.fail("used"))
    assert placed == {"make": [], "library": [".so"], "record": [".so", ".json"]}[fails_at]
    assert not (cache / "place" / "entry.json").exists()
    assert not [path for path in (cache / "place").iterdir() if path.is_dir()]
    assert call(library) == (["made", "42"], "")


def test_a_copy_is_as_good(cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole cache elsewhere is found there; one file of it, beside another build's record, is not."""
    call(library)
    shutil.copytree(cache, cache.with_name("copy"))
    monkeypatch.setenv(disk_cache.VARIABLE, str(cache.with_name("copy")))
    assert call(library) == (["42"], "")
    (cache.with_name("copy") / "place/entry.so").write_bytes(library.read_bytes()[::-1])
    assert call(library)[0] == ["made", "42"]


# Trust


def owned_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file away; where one may not, be another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def group_can_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the group write, and be in no such group."""
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    monkeypatch.setattr(os, "getegid", lambda: 12345)
    monkeypatch.setattr(os, "getgroups", lambda: [12346])


REFUSED: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "everyone": (lambda path, _: path.chmod(path.stat().st_mode | stat.S_IWOTH), r"which everyone can write to \(mode"),
    "a group": (group_can_write, r"which group \d+ can write to \(mode 0\d+\), of which this process is not"),
    "another user": (owned_by_another, r"which belongs to uid \d+ \(mode"),
}
PLACES = {"above": "..", "the cache": ".", "its folder": "place", "the record": "place/entry.json"}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("let", "message"), REFUSED.values(), ids=REFUSED)
def test_what_others_can_write_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, place: str, let: Callable, message: str
) -> None:
    """The error names the path, and the variable that allows it all the same; nothing is used or recompiled."""
    entry()
    path = (cache / place).resolve()
    let(path, monkeypatch)
    with pytest.raises(TrustError, match=message) as refused:
        kept()
    named = path if os.geteuid() == 0 or "uid" not in message else ""  # what is first: another user owns all of them
    assert f"got {named}" in str(refused.value)
    assert f"set {trust.VARIABLE}=/" in str(refused.value)
    monkeypatch.setenv(trust.VARIABLE, f"/nowhere{os.pathsep}{cache.parent}")
    assert kept() == {"made": True}
    monkeypatch.setenv(trust.VARIABLE, str(cache.with_name("cach")))
    with pytest.raises(TrustError):
        kept()


def test_a_library_that_others_can_write_is_refused(cache: Path, library: Path) -> None:
    """The file of an entry, too."""
    call(library)
    (cache / "place/entry.so").chmod(0o777)
    with pytest.raises(TrustError, match=r"entry\.so, which everyone can write to \(mode 0777\)"):
        disk_cache.get_or_make("place", "entry", lambda _: pytest.fail("made"), lambda *_: pytest.fail("used"))


@pytest.mark.parametrize("place", ["..", ".", "place"])
def test_nothing_is_made_where_others_can_write(cache: Path, place: str) -> None:
    """An empty folder of theirs, too: what is made there would be theirs to change."""
    (cache / "place").mkdir(parents=True)
    (cache / place).resolve().chmod(0o777)
    with pytest.raises(TrustError, match="which everyone can write to"):
        entry()
    assert list((cache / "place").iterdir()) == []


def test_our_group_and_sticky_folders_are_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that we are in may write; everyone may to a sticky folder above, as /tmp is, but not to the cache."""
    entry()
    cache.chmod(0o770)
    monkeypatch.setattr(os, "getegid", lambda: 12345)
    monkeypatch.setattr(os, "getgroups", lambda: [cache.stat().st_gid])
    assert kept() == {"made": True}
    cache.parent.chmod(0o1777)
    assert kept() == {"made": True}
    cache.chmod(0o1777)
    with pytest.raises(TrustError, match="everyone can write"):
        kept()


def test_a_link_is_followed_once(cache: Path, tmp_path: Path) -> None:
    """The link's target is what is checked, and what is used."""
    (tmp_path / "real").mkdir()
    cache.symlink_to(tmp_path / "real")
    assert entry().exists()
    assert trust.check(cache) == (tmp_path / "real").resolve()
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(TrustError, match=r"real, which everyone can write to"):
        kept()


def test_a_switch_is_no_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MHC_TILELANG_TRUST=1 is not taken for a yes, nor passed over."""
    monkeypatch.setenv(trust.VARIABLE, "1")
    with pytest.raises(TrustError, match=r"MHC_TILELANG_TRUST: expected absolute paths of folders.*got '1'"):
        entry()


def test_the_default_is_for_this_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a umask: 0700 for created folders of ~/.cache/mhc-tilelang, and nothing that others can write."""
    monkeypatch.delenv(disk_cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        entry()
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
        assert modes[tmp_path / ".cache"] == modes[tmp_path / ".cache/mhc-tilelang"] == 0o700
        assert [oct(mode) for mode in modes.values() if mode & 0o022] == []
        monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "named"))  # an image is made by root, and run by others
        assert stat.S_IMODE(entry().parent.parent.stat().st_mode) == 0o755
        assert kept() == {"made": True}
    finally:
        os.umask(before)


def test_doctor_reports_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache or bundle that is refused is missing, with the reason; one that is taken is as before."""
    entry()
    assert doctor.cache_row().status == "ok"
    monkeypatch.setenv("MHC_TILELANG_BUNDLE", os.pathsep.join((str(cache), str(cache / "absent"))))
    assert [row.status for row in doctor.bundle_rows()] == ["ok", "missing"]
    cache.chmod(0o777)
    for row in (doctor.cache_row(), doctor.bundle_rows()[0]):
        assert (row.status, row.value) == ("missing", f"{cache}, refused")
        assert f"set {trust.VARIABLE}={cache}" in row.hint
