"""The kernels are built once, whole or not at all, and what is missing is said."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from kernels import needs_compiler
from torchfilm import native


@needs_compiler
def test_a_library_is_built_once_and_found_again(tmp_path: Path):
    native.enable(tmp_path)
    assert native.enabled()
    (built,) = tmp_path.iterdir()
    written = built.stat().st_mtime_ns
    native._library.cache_clear()
    native.enable(str(tmp_path))
    native.disable()
    assert not native.enabled()
    assert [(place, place.stat().st_mtime_ns) for place in tmp_path.iterdir()] == [(built, written)]


def test_no_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        native.NativeError, match=r"expected a C\+\+ compiler .* found none. Name another with"
    ):
        native.enable(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(
        native.NativeError, match=r"no-such-compiler: No such file or directory. Name another"
    ):
        native.enable(tmp_path)
    assert not native.enabled()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "out of magic" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(native.NativeError, match=r"(?s)compiler built nothing that loads.*out of magic"):
        native.enable(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    assert not native.enabled()


@needs_compiler
def test_a_folder_that_cannot_be_one_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(native.NativeError, match=r"file: .*[Ee]xists. Give a folder that can be written"):
        native.enable(tmp_path / "file")
    assert not native.enabled()


@needs_compiler
def test_what_is_no_library_is_built_again(tmp_path: Path, kernel_folder: Path):
    native.enable(kernel_folder)
    native.disable()
    for built in kernel_folder.glob("*.so"):
        (tmp_path / built.name).write_bytes(b"")
    native.enable(tmp_path)
    assert native.enabled()
    native.disable()
    assert all(place.stat().st_size for place in tmp_path.iterdir())


def test_missing_headers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_compiler", lambda named: ["true"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: {"include": str(tmp_path)})
    with pytest.raises(
        native.NativeError, match=r"expected Python's headers .* found none in .*Install them"
    ):
        native.enable(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
