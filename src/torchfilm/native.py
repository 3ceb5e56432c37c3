"""Kernels in C++ beside the plain path, for float32 features on a CPU: film, film + ReLU, conditional norms.

torch's own operations go over the features once for the product, once for the sum, once for the ReLU, and
more often on the way back; and each of them, like the views of gamma and beta, costs some microseconds before
it begins. `enable()` compiles `kernels.cpp` and `binding.cpp` with the machine's compiler (half a minute,
once on each machine); from then on features are modulated in one pass and one call, forward and
backward. Nothing else changes: what the kernels do not support (other devices and precisions, transforms,
compilers, odd layouts) takes the plain path, which they are tested against.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_SOURCES = ("kernels.h", "vectors.h", "tensors.h", "graphs.h", "kernels.cpp", "binding.cpp")
_FAST = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_OFF = "or leave the kernels off: the plain path does the same."
_REMEDY = f"Name another with the variable CXX, {_OFF}"

kernels: Any = None
"""The functions of binding.cpp in use; None is the plain way."""


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded here; PyTorch's own operations stay in use."""


def enable(folder: str | Path | None = None) -> None:
    """Switch the C++ kernels on for this process, in all threads; the first call on a machine builds them.

    They round otherwise than torch does: a conditional norm then starts as torch's norm but for the last
    bits. gamma * x + beta with gamma 1 and beta 0 stays x to the bit.

    Args:
        folder: where the built library is kept; default: torchfilm/ in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        NativeError: without a C++ compiler (g++ or clang++, or the command in $CXX), where it fails, and
            without a folder that can be written.

    Example:
        >>> from torchfilm import native
        >>> native.enable()  # doctest: +SKIP
    """
    global kernels
    kernels = _library(Path(folder) if folder else _cache(), os.environ.get("CXX"))


def disable() -> None:
    """Switch the kernels off: use PyTorch's own operations again."""
    global kernels
    kernels = None


def enabled() -> bool:
    """Whether the kernels are in use."""
    return kernels is not None


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchfilm"
    except RuntimeError:
        raise NativeError(
            "native.enable: expected a home folder, found none. Give a folder: enable(folder)."
        ) from None


@functools.cache
def _library(folder: Path, named: str | None) -> Any:
    """Load what is built of this source by this compiler for torch and processor, or build it."""
    compiler = _compiler(named)
    told = _output([*compiler, "--version"])
    parts = (*_sources(), *compiler, told, torch.__version__, sys.version, _processor())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    try:
        return _found(folder, key) or _build(compiler, folder, key)
    except OSError as error:
        raise NativeError(
            f"native.enable: {folder}: {error.strerror}. Give a folder that can be written: enable(folder)."
        ) from None


def _compiler(named: str | None) -> list[str]:
    import shlex  # where something is built, not with the package

    try:
        given = shlex.split(named or "")
    except ValueError as error:
        raise NativeError(
            f"native.enable: expected a command in CXX, got {named}: {error}. {_REMEDY}"
        ) from None
    if given:
        return given
    found = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if found is None:
        raise NativeError(f"native.enable: expected a C++ compiler (g++ or clang++), found none. {_REMEDY}")
    return [found]


def _sources() -> list[str]:
    try:
        return [(_HERE / name).read_text(encoding="utf-8") for name in _SOURCES]
    except OSError as error:  # the package in a zip, say
        raise NativeError(
            f"native.enable: expected {', '.join(_SOURCES)} as files in {_HERE}: {error.strerror}. "
            f"Install torchfilm into a folder, {_OFF}"
        ) from None


def _processor() -> str:
    """Return what machine code depends on: the processor's abilities, as Linux lists them."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    abilities = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {abilities}"


def _build(compiler: list[str], folder: Path, key: str) -> Any:
    """Compile into the folder, whole or not at all; with threads and for this processor if that works."""
    wide = ["-mprefer-vector-width=512"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else []
    own = ["-march=native", *wide]
    reason, headers = "", _headers()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as within:
        binding, kernels, library = (Path(within) / name for name in ("binding.o", "kernels.o", "kernels.so"))
        ways = (("-fopenmp", own), ("-fopenmp-simd", own), ("-fopenmp-simd", []))
        try:
            _compile(compiler, "binding.cpp", binding, ["-O2", *headers])
        except NativeError as error:
            reason, ways = str(error), ()
        for threads, processor in ways:
            try:
                _compile(compiler, "kernels.cpp", kernels, [*_FAST, threads, *processor])
                # Without an OpenMP of its own: the threads are torch's, whose runtime is there already.
                _output([*compiler, "-shared", str(binding), str(kernels), "-o", str(library), *_libraries()])
                found = _loaded(library)
            except NativeError as error:
                reason = str(error)
                continue
            library.replace(_place(folder, key, library))
            return found
    raise NativeError(
        f"native.enable: {compiler[0]} built nothing that loads from {folder}. Give another folder, "
        f"enable(folder), name another compiler with the variable CXX, {_OFF} It said:\n{reason}"
    )


def _compile(compiler: list[str], source: str, into: Path, options: list[str]) -> None:
    _output([*compiler, "-std=c++20", "-fPIC", *options, "-c", str(_HERE / source), "-o", str(into)])


def _headers() -> list[str]:
    """Return the options with which binding.cpp finds Python's and torch's headers, and torch's ABI."""
    import sysconfig  # as shlex above

    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").is_file():
        raise NativeError(
            f"native.enable: expected Python's headers (Python.h), found none in {python}. Install them "
            f"(python3-dev), {_OFF}"
        )
    places = (python, _TORCH / "include", _TORCH / "include" / "torch" / "csrc" / "api" / "include")
    abi = int(torch.compiled_with_cxx11_abi())
    # As those of the system, so that the compiler does not warn of what is not ours.
    return [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *(f"-isystem{place}" for place in places)]


def _libraries() -> list[str]:
    """Return the options with which the functions find torch, which is loaded already."""
    within = _TORCH / "lib"
    of_python = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [f"-L{within}", f"-Wl,-rpath,{within}", "-ltorch_python", "-ltorch_cpu", "-lc10", *of_python]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise NativeError(f"native.enable: {command[0]}: {error.strerror}. {_REMEDY}") from None
    if done.returncode:
        raise NativeError(done.stderr.strip()[-1000:] or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _place(folder: Path, key: str, library: Path) -> Path:
    """Return where a library is kept: its name says what it was built of, and what is in it."""
    return folder / f"kernels-{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _found(folder: Path, key: str) -> Any:
    """Load the library that was built of this; None where there is none that is whole and loads."""
    for library in folder.glob(f"kernels-{key}-*.so"):
        with contextlib.suppress(NativeError, OSError):  # OSError: gone meanwhile, or another user's
            if library == _place(folder, key, library):  # loading half of one would end the process
                return _loaded(library)
    return None


def _loaded(place: Path) -> Any:
    spec = importlib.util.spec_from_file_location("torchfilm._kernels", place)
    assert spec is not None
    assert spec.loader is not None
    try:
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    except ImportError as error:
        raise NativeError(str(error)) from None
    return found
