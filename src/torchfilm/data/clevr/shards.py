"""The parts of a generated dataset that one process makes at a time: scenes, their images, and a shard's
questions.

Everything follows from (seed, split, shard, scene), so it does not matter which process makes what, how
often, or in which order. Files appear whole or not at all.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchfilm.extras import needed
from torchfilm.writing import whole

from .questions import QuestionConfig, QuestionGenerator
from .render import render
from .scenes import SceneConfig, sample_scene

with needed("CLEVR's images need Pillow", "systems"):
    from PIL import Image

SHARD = 250  # scenes; the answers of a shard's questions are balanced among themselves
CHUNK = 25  # scenes that one task renders


@dataclass(frozen=True)
class DatasetConfig:
    """What the bytes of a generated split depend on. Sizes are in pixels; `questions_per_scene` 0 makes
    none."""

    split: str
    num_scenes: int
    seed: int
    width: int
    height: int
    scenes: SceneConfig
    questions_per_scene: int

    @property
    def num_shards(self) -> int:
        """Return how many shards hold the scenes."""
        return -(-self.num_scenes // SHARD)

    def indices(self, shard: int) -> range:
        """Return the image indices of one shard."""
        return range(shard * SHARD, min((shard + 1) * SHARD, self.num_scenes))

    def chunks(self, shard: int) -> list[range]:
        """Return the image indices of one shard in portions of `CHUNK`."""
        indices = self.indices(shard)
        return [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]

    def rng(self, stream: str, number: int) -> np.random.Generator:
        """Return the random source of one scene, or of one shard's questions."""
        text = json.dumps(["torchfilm clevr 1", self.seed, self.split, stream, number])
        return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))


def make_scenes(out: Path, config: DatasetConfig, indices: range) -> list[dict[str, Any]]:
    """Draw the scenes `indices` and write images and masks that are not there yet; return scenes with
    views."""
    records = []
    for index in indices:
        scene, view = sample_scene(config.rng("scene", index), config.scenes)
        name = f"CLEVR_{config.split}_{index:06d}.png"
        scene |= {"split": config.split, "image_index": index, "image_filename": name}
        image, mask = out / "images" / config.split / name, out / "masks" / config.split / name
        if not (is_there(image) and is_there(mask)):
            rendered = render(scene, view, config.width, config.height)
            for path, pixels in ((mask, rendered.mask), (image, rendered.image)):
                if not is_there(path):  # a picture that is written anew is a new one to the caches
                    write_whole(path, _png(pixels))
        records.append(
            {"scene": scene, "view": {"image_index": index, "image_filename": name, **view.to_dict()}}
        )
    return records


def finish_shard(out: Path, config: DatasetConfig, shard: int, records: list[dict[str, Any]]) -> None:
    """Ask a shard's questions and write its part of the JSON files; its existence says that the shard is
    done."""
    scenes = [record["scene"] for record in records]
    questions = []
    if config.questions_per_scene:
        generator = QuestionGenerator(QuestionConfig(questions_per_scene=config.questions_per_scene))
        questions = generator.generate(scenes, config.rng("questions", shard))
    for question in questions:
        del question["question_index"]  # counts through the whole split: `merge` appends it
    views = [record["view"] for record in records]
    lines = [
        {what: len(items) for what, items in (("scenes", scenes), ("views", views), ("questions", questions))}
    ]
    text = "\n".join(
        json.dumps(line, separators=(",", ":")) for line in [*lines, *scenes, *views, *questions]
    )
    write_whole(shard_file(out, config.split, shard), f"{text}\n".encode())


def shard_file(out: Path, split: str, shard: int) -> Path:
    """Return where a finished shard waits for the others."""
    return out / ".shards" / split / f"{shard:06d}.json"


def merge(out: Path, config: DatasetConfig, what: str, info: dict[str, str]) -> int:
    """Write the released file of `what` (scenes, views or questions) from all shards; return how many it
    holds.

    Items are copied as text, line by line; only questions get something more, their `question_index`.
    """
    count = 0

    def text() -> Iterator[bytes]:
        nonlocal count
        yield f'{{"info":{json.dumps(info)},"{what}":['.encode()
        for shard in range(config.num_shards):
            for line in _lines(shard_file(out, config.split, shard), what):
                yield b",\n" if count else b"\n"
                yield line[:-1] + b',"question_index":%d}' % count if what == "questions" else line
                count += 1
        yield b"\n]}\n"

    write_whole(out / what / f"CLEVR_{config.split}_{what}.json", text())
    return count


def _lines(path: Path, what: str) -> Iterator[bytes]:
    """Return the lines of one kind in a shard's file: the first line says how many there are of each."""
    with path.open("rb") as stream:
        for kind, number in json.loads(stream.readline()).items():
            for _ in range(number):
                line = stream.readline().rstrip(b"\n")
                if kind == what:
                    yield line


def write_whole(path: Path, content: bytes | Iterator[bytes]) -> None:
    """Write a file so that nobody ever sees, or is left with, half of it.

    It is not flushed to the disk, as those of `training` are: what a power cut takes can be generated again.
    """
    with whole(path) as draft, draft.open("wb") as stream:
        for part in [content] if isinstance(content, bytes) else content:
            stream.write(part)


def is_there(path: Path) -> bool:
    """Return whether there is such a file, with something in it: a power cut may leave an empty one."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
