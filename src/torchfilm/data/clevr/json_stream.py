"""Read one long array out of a JSON file, item by item, in bounded memory.

The released training questions are one JSON object of about a gigabyte; parsed whole, they need ten times
as much memory.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

Progress = Callable[[int, int], None]
"""Called with what is done and of how much."""

_CHUNK = 1 << 18
_DECODER = json.JSONDecoder()


class _Cursor:
    """A window over a text file, from which JSON values are taken one by one."""

    def __init__(self, stream: TextIO, path: Path, progress: Progress | None) -> None:
        self.stream, self.path, self.progress = stream, path, progress
        self.size = path.stat().st_size
        self.text, self.at, self.ended = "", 0, False
        self.taken = 0

    def fail(self, expected: str) -> ValueError:
        got = "the end of the file" if self.at >= len(self.text) else repr(self.text[self.at : self.at + 40])
        return ValueError(
            f"{self.path}: expected {expected}, got {got} after {self.taken} complete items; "
            "the file is truncated or not JSON. Copy or generate it again."
        )

    def refill(self) -> bool:
        """Drop what was read and append the next chunk; False at the end of the file."""
        try:
            chunk = "" if self.ended else self.stream.read(max(_CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: expected text in UTF-8, got {error}. Copy or generate it again."
            ) from error
        self.ended = not chunk
        self.text, self.at = self.text[self.at :] + chunk, 0
        if self.progress is not None:
            self.progress(self.stream.buffer.tell(), self.size)
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no white space, or '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.refill():
                return ""

    def skip(self, character: str) -> None:
        if self.peek() != character:
            raise self.fail(f"{character!r}")
        self.at += 1

    def value(self) -> Any:
        """The next complete JSON value. A number that touches the window's end may go on: read further."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                end = None
            except RecursionError:
                raise self.fail("values that are nested less deeply") from None
            except ValueError:
                raise self.fail("numbers of fewer digits") from None
            if end is not None and (end < len(self.text) or self.ended):
                self.at = end
                return value
            if not self.refill() and end is None:
                raise self.fail("a complete JSON value")


def stream_array(path: Path, key: str, progress: Progress | None = None) -> Iterator[Any]:
    """Yield the items of the array under `key` of the object that fills the file `path`.

    Memory: a window of at most a few megabytes plus one item. Time: that of the C parser. `progress` hears of
    the bytes read.
    Raises ValueError if the file ends early, is not JSON, or has no array under `key`.
    """
    with path.open(encoding="utf-8") as stream:
        cursor = _Cursor(stream, path, progress)
        cursor.skip("{")
        keys: list[str] = []
        while cursor.peek() == '"':
            keys.append(cursor.value())
            cursor.skip(":")
            if keys[-1] != key:
                cursor.value()
            elif cursor.peek() != "[":
                raise cursor.fail(f"an array under the key {key!r}")
            else:
                yield from _items(cursor)
                return
            if cursor.peek() == ",":
                cursor.at += 1
        cursor.skip("}")
        raise ValueError(
            f"{path}: expected the key {key!r}, got the keys {keys}. Is this another kind of file?"
        )


def _items(cursor: _Cursor) -> Iterator[Any]:
    cursor.skip("[")
    if cursor.peek() == "]":
        return
    while True:
        item = cursor.value()
        cursor.taken += 1
        yield item
        if cursor.peek() == "]":
            return
        cursor.skip(",")
