"""Compiling the C++ operators: once, whoever shares the folder of extensions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ten_dist import native
from ten_dist.native.library import _OWN_HOST, Extension

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="there is no C++ compiler",
)
SOURCE = 'extern "C" int answer() { return 42; }\n'
LOAD = """
import sys
from ten_dist.native.library import Extension

Extension("a test", "answer", sys.argv[1:], is_python_module=False).load()
(path,) = {line.split()[-1] for line in open("/proc/self/maps") if "answer" in line}
print(path)
"""


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A folder of extensions of this test's own, as well as what takes its place."""
    for name, folder in (
        ("TORCH_EXTENSIONS_DIR", "extensions"),
        ("XDG_CACHE_HOME", "cache"),
        ("TMPDIR", "temporary"),
    ):
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "extensions"


@pytest.fixture
def source(tmp_path):
    """A source that compiles in a second."""
    path = tmp_path / "checkout" / "answer.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def load_here(*sources, **options):
    paths = [str(source) for source in sources]
    Extension("a test", "answer", paths, is_python_module=False, **options).load()


def start_load(source, prefix=(), **variables):
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", LOAD, str(source)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_library(folder):
    (library,) = folder.glob("answer_*/*.so")
    return library


def test_without_a_compiler_the_reason_is_given(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = native.unavailable.__wrapped__()
    assert reason == "no C++ compiler: no-such-compiler is not on PATH"


@needs_compiler
def test_what_the_compiler_says_is_the_reason(source, extensions):
    source.write_text("int answer() { return nothing; }\n")
    with pytest.raises(RuntimeError, match="a test could not be compiled: .*nothing"):
        load_here(source)
    assert [path.name for path in extensions.iterdir()] == [".answer.lock"]


@needs_compiler
def test_two_checkouts_in_turn_and_any_terminal_compile_once(
    source, extensions, tmp_path, capfd, monkeypatch
):
    other = tmp_path / "another checkout" / "answer.cpp"
    other.parent.mkdir()
    other.write_text(SOURCE)
    for turn in range(10):
        monkeypatch.setenv("COLUMNS", str(40 + 29 * turn))
        load_here(source)
        load_here(other)
    assert capfd.readouterr().err.count("compiling a test in") == 1
    assert [path.name for path in extensions.glob("[!.]*")] == [
        only_library(extensions).parent.name
    ]
    other.write_text(SOURCE.replace("42", "43"))
    load_here(other)
    assert len(list(extensions.glob("answer_*/*.so"))) == 2
    header = source.with_name("answer.h")
    header.touch()
    load_here(source)
    assert len(list(extensions.glob("answer_*/*.so"))) == 3


@needs_compiler
def test_who_has_the_library_mapped_keeps_it(source, extensions):
    load_here(source)
    mapped = only_library(extensions)
    before = mapped.stat()
    source.write_text(SOURCE.replace("42", "43"))
    load_here(source)
    after = mapped.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@needs_compiler
def test_a_damaged_library_is_built_anew_beside_it(source, extensions, capfd):
    load_here(source)
    library = only_library(extensions)
    whole = library.read_bytes()
    # Another file: this process has the first one mapped.
    library.unlink()
    library.write_bytes(whole[:5000])
    # Loading it as it is would end the process: a bus error.
    load_here(source)
    assert only_library(extensions).read_bytes() == whole
    assert capfd.readouterr().err.count("compiling") == 2
    assert len(list(extensions.glob(".answer.*"))) == 1


@needs_compiler
def test_what_a_killed_build_left_blocks_nobody_and_is_removed(source, extensions):
    abandoned = extensions / f".answer.{_OWN_HOST}.{'0' * 32}"
    abandoned.mkdir(parents=True)
    (abandoned / "lock").touch()
    load_here(source)
    assert [path.name for path in extensions.glob(".*")] == [".answer.lock"]


@needs_compiler
def test_builders_at_the_same_time_compile_once(source, extensions):
    builders = [start_load(source) for _ in range(3)]
    outputs = [builder.communicate(timeout=120) for builder in builders]
    assert {out.strip() for out, _ in outputs} == {str(only_library(extensions))}
    assert "".join(err for _, err in outputs).count("compiling a test in") == 1


@needs_compiler
def test_without_locks_each_builds_and_one_is_kept(source, extensions, monkeypatch):
    import errno
    import fcntl

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    load_here(source)
    assert only_library(extensions).is_file()


def without_rights():
    """Start of a command that obeys permissions, also as root."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root, and no setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@needs_compiler
def test_a_build_is_loaded_without_writing(source, extensions):
    load_here(source)
    folder = only_library(extensions).parent
    for path in (folder, extensions):
        path.chmod(0o555)
    try:
        out, err = start_load(source, without_rights()).communicate(timeout=60)
    finally:
        extensions.chmod(0o755)
    assert (out.strip(), err) == (str(only_library(extensions)), "")


@needs_compiler
def test_a_folder_that_cannot_be_written_is_named_once(source, extensions, tmp_path):
    extensions.mkdir(mode=0o555)
    prefix = without_rights()
    out, err = start_load(source, prefix).communicate(timeout=60)
    cached = only_library(tmp_path / "cache" / "torch_extensions")
    assert out.strip() == str(cached)
    assert f"{extensions} cannot be used: Permission denied" in err
    assert "TORCH_EXTENSIONS_DIR" in err
    assert start_load(source, prefix).communicate(timeout=60)[1] == ""


@needs_compiler
def test_no_folder_at_all_names_the_variable(source, extensions, tmp_path):
    folders = [extensions, tmp_path / "cache", tmp_path / "temporary"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555)
    _, err = start_load(source, without_rights()).communicate(timeout=60)
    last = err.splitlines()[-1]
    assert "Permission denied" in last and "with TORCH_EXTENSIONS_DIR" in last


@needs_compiler
def test_a_folder_for_temporary_files_of_another_is_not_trusted(
    source, extensions, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    extensions.write_text("a file")
    theirs = tmp_path / "temporary" / f"ten_dist_{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    with pytest.raises(OSError, match="TORCH_EXTENSIONS_DIR"):
        load_here(source)
    assert not list(theirs.iterdir())


@needs_compiler
def test_closed_streams_do_not_disturb_a_build(source, extensions):
    command = f"{sys.executable} - {source} <<'CODE' >&- 2>&-\n{LOAD}\nCODE"
    result = subprocess.run(["bash", "-c", command], check=False, timeout=60)
    assert result.returncode == 0
    assert only_library(extensions).is_file()


@pytest.mark.skipif(native.unavailable() is not None, reason="there is no C++ compiler")
def test_operators_are_mapped_from_a_finished_build():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "ten_dist_cpu" in line}
    (path,) = paths
    assert (Path(path).parent / "sha256").is_file()
