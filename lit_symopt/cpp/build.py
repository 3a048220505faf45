"""Compiling a C++ file of this folder, once for a machine, and loading what comes out.

The functions have C linkage and take pointers, so that a library depends on no version of torch or Python, and is
compiled in seconds. It is kept in `$XDG_CACHE_HOME/lit-symopt/cpp` (`~/.cache/...`), under a name that holds its
source, the version of the compiler and the processor it was compiled for: a home folder that machines share is safe.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import which

from lit_symopt.errors import ConfigError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
"""Without `-ffast-math`: infinities and NaN are met, and sums are in the order that is written."""

WAY_OUT = "install g++, or name another compiler in the environment variable CXX; or choose backend 'eager'"


def require() -> None:
    """Make sure that there is a compiler.

    Raises:
        ConfigError: if there is none.
    """
    compiler = _compiler()
    if which(compiler[0]) is None:
        raise ConfigError(f"C++ kernels need a compiler, and there is no {compiler[0]!r}: {WAY_OUT}")


@cache
def library(name: str) -> ctypes.CDLL:
    """What `name`.cpp compiles to.

    Raises:
        ConfigError: if there is no compiler, or it fails, with what it said.
    """
    require()
    source = Path(__file__).with_name(f"{name}.cpp")
    made_of = [source.read_bytes(), " ".join(_compiler() + FLAGS).encode(), _target()]
    path = _cache() / f"{name}-{sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    if not path.exists():
        _compile(source, path)
    return ctypes.CDLL(str(path))


def _compiler() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)


def _target() -> bytes:
    """The version of the compiler, and what `native` means to it on this machine."""
    asked = [*_compiler(), "-march=native", "-E", "-v", "-x", "c++", os.devnull]
    found = subprocess.run(asked, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return found.stderr


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "lit-symopt" / "cpp"
    except RuntimeError as error:  # of a user without a home
        raise ConfigError(
            f"there is no folder to keep C++ kernels in: {error} Name one in the environment variable XDG_CACHE_HOME, "
            "or choose backend 'eager'"
        ) from None


def _compile(source: Path, path: Path) -> None:
    """To a file of another name first: processes that start together must not load half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as file:
            unfinished = Path(file.name)
    except OSError as error:
        raise ConfigError(
            f"C++ kernels are kept in {path.parent}, and that cannot be written: {error}; name a folder in the "
            "environment variable XDG_CACHE_HOME, or choose backend 'eager'"
        ) from None
    try:
        command = [*_compiler(), *FLAGS, str(source), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[:8])
            raise ConfigError(f"compiling {source.name} failed: {shlex.join(command)}\n{said}\n{WAY_OUT}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
