"""Kernels in C++ beside the plain path, for float32 features on a CPU: film, film + ReLU, conditional norms.

torch's own operations go over the features once for the product, once for the sum, once for the ReLU, and
more often on the way back. `enable()` compiles `kernels.cpp` with the machine's compiler (seconds, once on
each machine); from then on large features are modulated in one pass, forward and backward. Nothing else
changes: what the kernels do not take (other devices and precisions, transforms, compilers, odd layouts) goes
the plain way, which they are tested against.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("kernels.cpp")
_OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_REMEDY = "Name another with the variable CXX, or leave the kernels off: the plain path does the same."

_SIGNATURES: dict[str, list[Any]] = {
    "film_forward": [c_void_p] * 4 + [c_int64] * 4 + [c_int] * 3,
    "film_backward": [c_void_p] * 7 + [c_int64] * 4 + [c_int] * 3,
    "norm_forward": (_NORM_FORWARD := [c_void_p] * 8 + [c_int64] * 5 + [c_double, c_int]),
    "norm_backward": (_NORM_BACKWARD := [c_void_p] * 12 + [c_int64] * 5 + [c_int]),
    "token_norm_forward": _NORM_FORWARD,
    "token_norm_backward": _NORM_BACKWARD,
}

kernels: ctypes.CDLL | None = None
"""The library in use; None is the plain way."""


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded here; everything goes the plain way."""


def enable(folder: Path | None = None) -> None:
    """Use the kernels from here on, in all threads of this process; build them if this machine has not yet.

    They round otherwise than torch does: a conditional norm then starts as torch's norm but for the last
    bits. gamma * x + beta with gamma 1 and beta 0 stays x to the bit.

    Args:
        folder: where the built library is kept; default: torchfilm/ in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        NativeError: without a C++ compiler (g++ or clang++, or the one that $CXX names), or where it fails.

    Example:
        >>> from torchfilm import native
        >>> native.enable()  # doctest: +SKIP
    """
    global kernels
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchfilm"
    kernels = _library(folder or cache, os.environ.get("CXX"))


def disable() -> None:
    """Go the plain way again."""
    global kernels
    kernels = None


def enabled() -> bool:
    """Whether the kernels are in use."""
    return kernels is not None


@functools.cache
def _library(folder: Path, named: str | None) -> ctypes.CDLL:
    """Load the library for this source, compiler and processor, built first where it is not there."""
    compiler = _compiler(named)
    told = _output([*compiler, "--version"])
    parts = (_SOURCE.read_text(encoding="utf-8"), *compiler, told, torch.__version__, _processor())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    place = folder / f"kernels-{key}.so"
    if not place.is_file():
        _build(compiler, place)
    return _loaded(place)


def _compiler(named: str | None) -> list[str]:
    if named:
        return named.split()
    found = next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)
    if found is None:
        raise NativeError(f"native.enable: expected a C++ compiler (g++ or clang++), found none. {_REMEDY}")
    return [found]


def _processor() -> str:
    """Return what machine code depends on: the processor's abilities, as Linux lists them."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    abilities = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {abilities}"


def _build(compiler: list[str], place: Path) -> None:
    """Compile into `place`, whole or not at all; with threads and for this very processor if that works."""
    wide = ["-mprefer-vector-width=512"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else []
    own = ["-march=native", *wide]
    reason = ""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as within:
        compiled, library = Path(within) / "kernels.o", Path(within) / "kernels.so"
        for threads, processor in (("-fopenmp", own), ("-fopenmp-simd", own), ("-fopenmp-simd", [])):
            try:
                _output([*compiler, *_OPTIONS, threads, *processor, "-c", str(_SOURCE), "-o", str(compiled)])
                # Without an OpenMP of its own: the threads are torch's, whose runtime is there already.
                _output([*compiler, "-shared", str(compiled), "-o", str(library)])
                _loaded(library)
            except NativeError as error:
                reason = str(error)
                continue
            library.replace(place)
            return
    raise NativeError(f"native.enable: {compiler[0]} built nothing that loads. {_REMEDY} It said:\n{reason}")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeError(f"native.enable: {command[0]}: {error.strerror}. {_REMEDY}") from None
    if done.returncode:
        raise NativeError(done.stderr.strip()[-1000:] or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _loaded(place: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(place))
    except OSError as error:
        raise NativeError(str(error)) from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
