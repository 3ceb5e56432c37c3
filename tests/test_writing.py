"""Files are whole, whoever writes them at once; rows of text stand in columns."""

from __future__ import annotations

import itertools
import math
import os
import threading
from pathlib import Path

import pytest

from torchfilm.data.clevr.caches import draft
from torchfilm.data.clevr.shards import write_whole
from torchfilm.training.checkpoint import replace_file
from torchfilm.writing import in_columns, in_digits, some, whole, with_interval


def by_whole(path: Path, content: bytes) -> None:
    with whole(path) as part:
        part.write_bytes(content)


def by_draft(path: Path, content: bytes) -> None:
    with draft(path) as part:
        part.write_bytes(content)


WRITERS = [by_whole, by_draft, write_whole, replace_file]


@pytest.mark.parametrize("write", WRITERS)
def test_two_that_write_one_file_at_once_leave_what_one_of_them_wrote(write, tmp_path: Path):
    path, contents, found = tmp_path / "file", [b"a" * 100_000, b"b" * 200_000], set()
    write(path, contents[0])

    def often(content: bytes) -> None:
        for _ in range(20):
            write(path, content)

    threads = [threading.Thread(target=often, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.add(path.read_bytes())
    assert found <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_is_followed(write, tmp_path: Path):
    store, link = tmp_path / "store" / "kept", tmp_path / "link"
    store.parent.mkdir()
    store.write_bytes(b"old")
    link.symlink_to(store)
    write(link, b"new")
    assert link.is_symlink()
    assert store.read_bytes() == b"new"
    assert sorted(tmp_path.rglob("*")) == [link, store.parent, store]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a device or a pipe"), (os.mkdir, "a folder")])
def test_what_is_no_file_is_refused_and_stays(write, make, kind: str, tmp_path: Path):
    path = tmp_path / "there"
    make(path)
    with pytest.raises(
        ValueError, match=rf"^there: expected a file, or none yet, got .*there, {kind}\.\nGive an"
    ):
        write(path, b"new")
    assert path.exists()
    assert not path.is_file()
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_name_that_a_disk_allows_can_be_written(tmp_path: Path):
    by_whole(tmp_path / ("n" * 255), b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


ROWS = [("", "x", "note"), ("first", "-1.25", ""), ("b", "", "two words")]


def test_cells_stand_below_one_another_two_spaces_apart_and_no_line_ends_with_a_space():
    assert in_columns(ROWS) == "       x      note\nfirst  -1.25\nb             two words"


def test_numbers_stand_to_the_right():
    assert in_columns(ROWS[::2], right=True) == "   x       note\nb     two words"


@pytest.mark.parametrize(
    ("numbers", "apart", "texts"),
    [
        ((0.0, 0.0), 0.0, ["0.000", "0.000"]),
        ((1.0204, 0.9281), 0.09, ["1.020", "0.928"]),
        ((1.0001, 0.004), 0.004, ["1.0001", "0.0040"]),
        ((0.000173,), 0.0, ["0.000173"]),
        ((6.01e-5, 5.95e-5), 6e-7, ["6.010e-05", "5.950e-05"]),
        ((12345.6, 12345.1), 0.0, ["12346", "12345"]),
        ((1037220.9, 863786.1), 175000.0, ["1.04e+06", "8.64e+05"]),
        ((-0.0001, 0.5), 0.5, ["-1.00e-04", "0.500"]),
        ((-0.0, 0.5), 0.5, ["0.000", "0.500"]),
        ((3e-6, 1e-6, 9e4), 45000.0, ["3.00e-06", "1.00e-06", "90000"]),
        ((1e7, 1.09632435), 1.09632435, ["1.00000000e+07", "1.10e+00"]),
        ((math.inf, 0.5), math.inf, ["inf", "0.500"]),
        ((math.nan,), 0.0, ["nan"]),
        ((1e30,), 0.0, ["1.00e+30"]),
        ((5e-324,), 0.0, ["4.94e-324"]),
    ],
)
def test_numbers_have_the_digits_that_tell(numbers: tuple[float, ...], apart: float, texts: list[str]):
    assert in_digits(*numbers, apart=apart) == texts


def test_no_interval_of_unequal_ends_has_equal_ends():
    for middle, power in itertools.product((0.0, 1e-7, 0.3, 2.5, 870.0, 3e8), range(-5, 1)):
        half = (middle or 1.0) * 10.0**power
        value, low, high = with_interval(middle, middle - half, middle + half).replace("[", "").split()
        assert value + "," != low
        assert low[:-1] != high[:-1]


def test_with_a_sign_all_have_one():
    assert with_interval(0.25, 0.0, 0.5, sign="+") == "+0.250 [+0.000, +0.500]"
    assert with_interval(0.25, -0.00001, 0.5, sign="+") == "+0.250 [-1.00e-05, +0.500]"


def test_of_many_names_five_are_told():
    assert some(list("abcde")) == "a, b, c, d, e"
    assert some([f"site{i}" for i in range(150)]) == "site0, site1, site2, site3, site4 and 145 more"
