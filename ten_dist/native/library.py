"""Compiled extensions that are built once, and only read after that.

A finished build is a folder `NAME_IDENTITY` with the library and its checksum. The
identity says what the library is made of and for which processor, so that checkouts and
machines may share a folder of builds. A build is made in a hidden folder beside and
renamed into its place, so that whoever has a library mapped keeps it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ten_dist.own_rank import own_rank

_CHECKSUM = "sha256"
_OWN_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "host"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Extension:
    """An extension in C++, by what `torch.utils.cpp_extension.load` would be given.

    Args:
        title: what it is, for the line that says that it is compiled.
        name: by which its sources register it.
        sources: paths; headers beside them and in `extra_include_paths` count as well.
        options: others of `cpp_extension.load`.

    Raises:
        RuntimeError: there is no C++ compiler, or it does not know the flags.
    """

    def __init__(
        self, title: str, name: str, sources: Sequence[str], **options: Any
    ) -> None:
        self._title = title
        self._name = name
        self._sources = list(sources)
        self._options = options
        self._folder_name = f"{name}_{self._identity()}"

    def load(self) -> ModuleType | None:
        """Load it; it is compiled where nobody has done that before.

        Where a build is found, nothing is written. A new one goes into
        TORCH_EXTENSIONS_DIR, and where that cannot be used, into the user's cache or a
        folder for temporary files.

        Returns:
            The module, or None where it is a library of operators.

        Raises:
            RuntimeError: the compiler refuses.
            OSError: no folder can be used.
        """
        roots = list(_roots())
        for root in roots:
            # One that cannot be loaded, such as from a file system without programs,
            # is told of below, where it is needed.
            with contextlib.suppress(OSError, ImportError):
                if _is_whole(root / self._folder_name):
                    return self._open(root / self._folder_name)
        problem = None
        for root in roots:
            try:
                return self._load_or_build(root, problem)
            except (OSError, ImportError) as error:
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                problem = problem or f"{root} cannot be used: {reason}"
        raise OSError(f"{problem}; name another folder with TORCH_EXTENSIONS_DIR")

    def _load_or_build(self, root: Path, problem: str | None) -> ModuleType | None:
        folder = root / self._folder_name
        root.mkdir(
            mode=0o777 if problem is None else 0o700, parents=True, exist_ok=True
        )
        with _only_builder(root, self._name, self._title):
            if _is_whole(folder):
                return self._open(folder)
            if problem is not None:
                _notice(f"{problem}; TORCH_EXTENSIONS_DIR can name another folder")
            _notice(f"compiling {self._title} in {folder}, once")
            return self._build(folder)

    def _build(self, folder: Path) -> ModuleType | None:
        """Compile in a folder beside `folder`, which is then put in its place."""
        temporary = self._hidden_beside(folder)
        temporary.mkdir()
        try:
            module = self._compile(temporary)
            library = _library(temporary)
            (temporary / _CHECKSUM).write_text(_checksum(library))
            _keep_only(temporary, (library.name, _CHECKSUM))
            self._put_in_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(module, ModuleType):
            module.__file__ = str(_library(folder))
            return module
        return None

    def _compile(self, folder: Path) -> ModuleType | str:
        """Compile and load: what cannot be loaded is not kept."""
        # Imported here: it takes a second, and inspects the machine.
        from torch.utils import cpp_extension

        if shutil.which("ninja") is None and not _beside_python("ninja"):
            raise RuntimeError("ninja is not installed")
        # It flushes both streams, which may be closed.
        silence = io.StringIO()
        try:
            with (
                contextlib.redirect_stdout(silence),
                contextlib.redirect_stderr(silence),
            ):
                return inspect.unwrap(cpp_extension.load)(
                    self._name,
                    self._sources,
                    build_directory=str(folder),
                    **self._options,
                )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{self._title} could not be compiled: {_telling_line(str(error))}"
            ) from None

    def _put_in_place(self, temporary: Path, folder: Path) -> None:
        if _is_whole(folder):
            # Of another process, where the file system has no locks.
            return
        if folder.exists():
            # Damaged. A process that still has it mapped keeps it.
            damaged = self._hidden_beside(folder)
            os.rename(folder, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another node may have been first, where locks hold on one node only.
            if not _is_whole(folder):
                raise

    def _hidden_beside(self, folder: Path) -> Path:
        return folder.with_name(f".{self._name}.{_OWN_HOST}.{uuid.uuid4().hex}")

    def _open(self, folder: Path) -> ModuleType | None:
        path = _library(folder)
        if not self._options.get("is_python_module", True):
            torch.ops.load_library(path)
            return None
        spec = importlib.util.spec_from_file_location(path.stem, path)
        # Python has a loader for every file that ends in .so.
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _identity(self) -> str:
        """What makes one build differ from another; nodes may share a file system."""
        settings = {k: v for k, v in self._options.items() if k != "verbose"}
        # Paths differ between checkouts of the same content.
        includes = settings.pop("extra_include_paths", None) or []
        folders = {os.path.dirname(source) for source in self._sources} | {*includes}
        headers = [h for folder in sorted(folders) for h in Path(folder).glob("*.h")]
        parts = (
            *(Path(source).read_bytes() for source in self._sources),
            *sorted(header.read_bytes() for header in headers),
            repr(sorted(settings.items())).encode(),
            repr((torch.__version__, torch.version.git_version)).encode(),
            repr((torch.compiled_with_cxx11_abi(), platform.libc_ver())).encode(),
            str(sysconfig.get_config_var("SOABI")).encode(),
            _macros(tuple(settings.get("extra_cflags", ()))),
        )
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(digests).hexdigest()[:12]


@contextlib.contextmanager
def compiled_once(title: str) -> Iterator[None]:
    """Have `torch.utils.cpp_extension.load`, which DeepSpeed's operators go through,
    load and build as :class:`Extension` does."""
    from torch.utils import cpp_extension

    plain = cpp_extension.load

    @functools.wraps(plain)
    def load(name: str, sources: Sequence[str], **options: Any) -> ModuleType | None:
        return Extension(title, name, sources, **options).load()

    # Callers give all but the first two by name.
    cpp_extension.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        cpp_extension.load = plain


def _macros(flags: tuple[str, ...]) -> bytes:
    """What the compiler defines by itself: its version, and what the processor can do."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: {compiler} is not on PATH")
    result = subprocess.run(
        [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        check=False,
    )
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").splitlines() or ["it failed"]
        raise RuntimeError(f"the C++ compiler {compiler} cannot be used: {lines[0]}")
    return b"\n".join(sorted(result.stdout.splitlines()))


def _roots() -> Iterator[Path]:
    """Folders that may hold builds, the preferred one first."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        yield Path(os.environ["TORCH_EXTENSIONS_DIR"]).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):
        yield Path(cache) / "torch_extensions"
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"ten_dist_{os.getuid()}"
    if _is_ours_alone(folder):
        yield folder.absolute()


def _is_ours_alone(folder: Path) -> bool:
    """Whether nobody else can put libraries there; everybody can make names in /tmp."""
    try:
        found = os.lstat(folder)
    except OSError:
        return True
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _library(folder: Path) -> Path:
    (library,) = folder.glob("*.so")
    return library


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether a build is there with all its bytes: loading half of one can be fatal."""
    try:
        return (folder / _CHECKSUM).read_text() == _checksum(_library(folder))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _only_builder(root: Path, name: str, title: str) -> Iterator[None]:
    """Keep other processes out of a build, with a lock that ends with its process.

    Where the file system has no locks each builds for itself, and one of them is kept.
    """
    handle = os.open(root / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _notice(f"waiting for another process, which compiles {title}")
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        else:
            # Locks may hold on one node only: those of others may be at work.
            for leftover in root.glob(f".{name}.{_OWN_HOST}.{'[0-9a-f]' * 32}"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Remove what else a build has left, and bring the rest to the disk."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _telling_line(output: str) -> str:
    """The first line of a compiler's output that says what is wrong."""
    lines = output.splitlines()
    told = (line for line in lines if "error:" in line or "No space left" in line)
    return next(told, lines[0] if lines else "the compiler gave no reason").strip()


def _beside_python(program: str) -> bool:
    """Make a program of this Python's environment found, where it is not activated."""
    folder = Path(sys.executable).parent
    if not (folder / program).is_file():
        return False
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return True


def _notice(message: str) -> None:
    """Tell the person at the terminal, once a machine."""
    # Not to the standard output, which belongs to the program.
    if own_rank().local_rank == 0 and sys.stderr is not None:
        print(f"ten-dist: {message}", file=sys.stderr, flush=True)
