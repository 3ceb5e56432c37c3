"""The kernels are built once, whole or not at all, and what is missing is said."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from kernels import needs_compiler
from torchfilm import native


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


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
    named = script(tmp_path / "compiler", '[ "$1" = --version ] && exit 0', "echo out of magic >&2", "exit 1")
    monkeypatch.setenv("CXX", str(named))
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
@pytest.mark.parametrize("size", [0, 100, 1000, 100_000, -1])
def test_a_library_that_is_not_whole_is_built_again(
    size: int, tmp_path: Path, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    native.enable(kernel_folder)
    native.disable()
    for built in kernel_folder.glob("*.so"):  # loading 1,000 bytes ends the process
        (tmp_path / built.name).write_bytes(built.read_bytes()[:size])
    again = []
    monkeypatch.setattr(native, "_build", lambda compiler, folder, key: again.append(folder) or "built")
    native.enable(tmp_path)
    assert (native.kernels, again) == ("built", [tmp_path])
    native.disable()


def test_without_a_home_a_folder_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(
        native.NativeError, match=r"a home folder, found none. Give a folder: enable\(folder\)"
    ):
        native.enable()
    monkeypatch.setattr(native, "_library", lambda folder, named: folder)
    native.enable(tmp_path)
    assert native.kernels == tmp_path
    native.disable()


def test_sources_that_are_no_files_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_HERE", tmp_path / "z.zip" / "torchfilm")
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(
        native.NativeError, match=r"expected kernels.h, .* as files in .*z.zip.* Install torch"
    ):
        native.enable(tmp_path)


def test_a_compiler_is_named_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my tools").mkdir()
    named = script(tmp_path / "my tools" / "c++", 'echo "told $1" >&2', "exit 1")
    monkeypatch.setenv("CXX", f"'{named}' -O2")
    with pytest.raises(native.NativeError, match="told -O2"):
        native.enable(tmp_path)
    monkeypatch.setenv("CXX", f"'{named}")
    with pytest.raises(
        native.NativeError, match=r"a command in CXX, got '.*c\+\+: No closing quot.* Name ano"
    ):
        native.enable(tmp_path)
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeError, match=r"found none. Name another with"):
        native.enable(tmp_path)


def test_a_compiler_may_speak_in_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named = script(tmp_path / "compiler", r"printf 'd\351faut\n' >&2", "exit 1")
    monkeypatch.setenv("CXX", str(named))
    with pytest.raises(native.NativeError, match=r"d.faut"):
        native.enable(tmp_path)


def test_what_was_built_and_does_not_load_may_load_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named = script(tmp_path / "compiler", 'for into; do :; done; [ "$1" = --version ] || echo > "${into}"')
    monkeypatch.setenv("CXX", str(named))
    monkeypatch.setattr(native, "_headers", list)
    monkeypatch.setattr(native, "_libraries", list)
    said = r"(?s)nothing that loads from .*kept. Give another folder, enable\(folder\), name another compiler"
    with pytest.raises(native.NativeError, match=said):
        native.enable(tmp_path / "kept")


def test_missing_headers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_compiler", lambda named: ["true"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda *scheme: {"include": str(tmp_path)})
    with pytest.raises(
        native.NativeError, match=r"expected Python's headers .* found none in .*Install them"
    ):
        native.enable(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
