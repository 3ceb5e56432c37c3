"""Read the released folders CLEVR_v1.0, CLEVR_CoGenT_v1.0 and CLEVR-Humans unchanged, and ours alike.

    images/SPLIT/PREFIX_SPLIT_000000.png
    scenes/PREFIX_SPLIT_scenes.json
    questions/PREFIX_SPLIT_questions.json

CLEVR-Humans holds `CLEVR-Humans-SPLIT.json` only; its questions are about the images of a CLEVR_v1.0 folder.
"""

import hashlib
import itertools
import os
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchfilm.extras import needed
from torchfilm.reading import intact

from .caches import damaged, drop_older, read_rows, write_rows
from .encoding import FORMAT, LONGEST, EncodedQuestions, encode_questions
from .json_stream import Progress, stream_array
from .vocabulary import Vocabulary, answer_text

with needed("CLEVR's images need Pillow", "systems"):
    from PIL import Image

_NAME = re.compile(r"(?P<prefix>.+)_(?P<split>[A-Za-z0-9]+)_(?P<what>questions|scenes)\.json")
_HUMANS = re.compile(r"CLEVR-Humans-(?P<split>[A-Za-z0-9]+)\.json")
_IMAGE = re.compile(r".+_(?P<split>[A-Za-z0-9]+)_(?P<index>\d+)\.png")


@dataclass(frozen=True)
class ClevrFolder:
    """One dataset folder. `images_from`: the folder with the images, where they lie elsewhere (CLEVR-Humans).

    What is derived from the files (encoded questions, images at the network's size) is kept under `cache`, by
    default `root/.cache`; it may be deleted at any time.
    """

    root: Path
    images_from: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("root", "images_from", "cache"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))
        if not self.root.is_dir():
            raise ValueError(
                f"expected a CLEVR folder with images/, scenes/ and questions/, got {self.root}, which is "
                f"{'a file' if self.root.exists() else 'not there'}. "
                "Generate one with `torchfilm data clevr`, or unpack CLEVR_v1.0.zip."
            )

    def splits(self) -> list[str]:
        """The names of the splits that have questions, scenes or images: train, val, test, trainA, valB..."""
        found = {match["split"] for folder in ("questions", "scenes") for match in self._json_files(folder)}
        found |= {m["split"] for path in self.root.glob("*.json") if (m := _HUMANS.fullmatch(path.name))}
        images = self._image_root / "images"
        if self.images_from is None and images.is_dir():
            found |= {path.name for path in images.iterdir() if path.is_dir()}
        return sorted(found)

    def _json_files(self, folder: str) -> list[re.Match[str]]:
        return [
            m for path in sorted((self.root / folder).glob("*.json")) if (m := _NAME.fullmatch(path.name))
        ]

    def _missing(self, split: str, what: str) -> ValueError:
        there = ", ".join(self.splits()) or "none"
        return ValueError(
            f"{self.root}: expected {what} of the split {split!r}, got none. Splits there: {there}."
        )

    def _json(self, split: str, what: str) -> Path:
        for match in self._json_files(what):
            if match["split"] == split and match["what"] == what:
                return self.root / what / match.string
        if what == "questions" and (self.root / f"CLEVR-Humans-{split}.json").is_file():
            return self.root / f"CLEVR-Humans-{split}.json"
        raise self._missing(split, what)

    def scenes(self, split: str) -> Iterator[dict[str, Any]]:
        """The scenes in file order, read one by one; the key `relations` is given as `relationships` too."""
        for scene in stream_array(self._json(split, "scenes"), "scenes"):
            if "relationships" not in scene and "relations" in scene:
                scene["relationships"] = scene["relations"]
            yield scene

    def scene(self, split: str, index: int) -> dict[str, Any]:
        """The scene of image `index`."""
        for position, scene in enumerate(self.scenes(split)):
            if scene.get("image_index", position) == index:
                return scene
        raise ValueError(
            f"{self.root}: expected a scene with image_index {index} in the split {split!r}, got none."
        )

    def questions(self, split: str, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
        """The questions in the order of the file, read one by one; `progress` hears of the bytes read.

        Nodes keyed `type` (public generator) get `function`; answers become text; a missing `image_index`
        is read from `image_filename`. Test splits have neither `answer` nor `program`.
        """
        path = self._json(split, "questions")
        for number, question in enumerate(stream_array(path, "questions", progress)):
            try:
                yield _as_released(question)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"{path}: question {number} needs 'question' and 'image_index' or 'image_filename', "
                    f"got {str(question)[:120]} ({error})."
                ) from error

    def encoded(
        self,
        split: str,
        vocabulary: Vocabulary,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> EncodedQuestions:
        """The split's questions as arrays, from the cache where the file and the vocabulary are unchanged.

        Parsing takes some 12 microseconds a question and little memory; the cache loads at once. `progress`
        hears of the bytes parsed.
        """
        path = self._json(split, "questions")
        kept = self._cache_file(cache, path, f"questions-{split}-{vocabulary.digest}", "npz")
        if kept.is_file():
            return EncodedQuestions.load(kept)
        with _understood(path):
            encoded = encode_questions(self.questions(split, progress), vocabulary)
        encoded.save(kept)
        drop_older(kept)
        return encoded

    def vocabulary(
        self, split: str, cache: Path | None = None, progress: Progress | None = None
    ) -> Vocabulary:
        """The vocabulary of the split's questions, from the cache where the file is unchanged.

        `progress` hears of the bytes read.
        """
        path = self._json(split, "questions")
        kept = self._cache_file(cache, path, f"vocabulary-{split}", "json")
        if kept.is_file():
            try:
                return Vocabulary.load(kept)
            except ValueError as error:
                raise damaged(kept, "the vocabulary", error) from error
        with _understood(path):
            vocabulary = Vocabulary.build(self.questions(split, progress))
        vocabulary.save(kept)
        drop_older(kept)
        return vocabulary

    @property
    def _image_root(self) -> Path:
        return self.images_from or self.root

    def image_files(self, split: str) -> list[Path]:
        """The files of the split's images; file i is image_index i. None may be missing in between."""
        folder = self._image_root / "images" / split
        numbered = {
            int(m["index"]): path for path in folder.glob("*.png") if (m := _IMAGE.fullmatch(path.name))
        }
        if not numbered:
            raise ValueError(
                f"expected images *_{split}_000000.png in {folder}, got none. Splits there: "
                f"{', '.join(self.splits()) or 'none'}."
                + (" CLEVR-Humans needs images_from=the CLEVR_v1.0 folder." if self._is_humans() else "")
            )
        absent = sorted(set(range(max(numbered) + 1)) - set(numbered))
        if absent:
            raise ValueError(
                f"{folder}: expected images 0 to {max(numbered)}, got {len(numbered)} of them; "
                f"the first missing is number {absent[0]}. Finish the copy or the generation."
            )
        return [numbered[i] for i in range(len(numbered))]

    def _is_humans(self) -> bool:
        return any(_HUMANS.fullmatch(path.name) for path in self.root.glob("*.json"))

    def image(self, split: str, index: int) -> np.ndarray:
        """One image at its own size, uint8 [H, W, 3]; transparency is dropped."""
        folder = self._image_root / "images" / split
        path = next(iter(sorted(folder.glob(f"*_{split}_{index:06d}.png"))), None)
        if path is None:
            raise ValueError(f"{folder}: expected an image with number {index:06d}, got none.")
        return read_image(path)

    def images(
        self,
        split: str,
        height: int,
        width: int,
        cache: Path | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """All images of the split, uint8 [N, height, width, 3], row i = image_index i; a read-only map.

        Images of another size are resized bicubically, as the paper's preprocessing does. The first call
        decodes the files with `workers` threads (all cores by default) into one .npy file in the cache, and
        tells `progress` of the files done.
        """
        files = self.image_files(split)
        about = [
            (path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]
        ]
        stamp = f"{files[0].parent}-{about}"
        kept = self._cache_folder(cache) / f"images-{split}-{height}x{width}-{_short(stamp)}.npy"
        if not kept.is_file():
            shape = (len(files), height, width, 3)
            write_rows(kept, np.uint8, shape, lambda rows: _decode_all(files, rows, workers, progress))
            drop_older(kept)
        return read_rows(kept)

    def _cache_folder(self, cache: Path | None) -> Path:
        folder = Path(cache or self.cache or self.root / ".cache")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"expected to write caches to {folder}, got {error.strerror}. "
                "Name another folder with cache=."
            ) from error
        return folder

    def _cache_file(self, cache: Path | None, source: Path, name: str, suffix: str) -> Path:
        status = source.stat()
        stamp = f"{FORMAT}-{source.resolve()}-{status.st_size}-{status.st_mtime_ns}"
        return self._cache_folder(cache) / f"{name}-{_short(stamp)}.{suffix}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _understood(path: Path) -> AbstractContextManager[None]:
    """Name the file where a question's words or program are not what CLEVR's are."""
    return intact(path, "questions and programs as CLEVR's", "Copy or generate it again.")


def _as_released(question: dict[str, Any]) -> dict[str, Any]:
    question["question"] = str(question["question"])
    if question.get("answer") is not None:
        question["answer"] = answer_text(question["answer"])
    if question.get("image_index") is None:
        match = _IMAGE.fullmatch(question["image_filename"])
        if match is None:
            raise KeyError("image_index")
        question["image_index"] = int(match["index"])
    for name, least, most in (("image_index", 0, 2**31), ("question_family_index", -1, 2**15)):
        number = question.get(name)
        if number is not None and not (type(number) is int and least <= number < most):
            raise ValueError(f"expected {name} from {least} to {most - 1}, got {number!r}")
    if len(question["question"]) >= LONGEST:
        raise ValueError(f"expected a question of fewer than {LONGEST} characters")
    for node in question.get("program") or []:
        if "function" not in node and "type" in node:
            node["function"] = node.pop("type")
        if "value_inputs" not in node and "side_inputs" in node:
            node["value_inputs"] = node.pop("side_inputs")
        node.pop("_output", None)
    return question


def read_image(path: Path, height: int | None = None, width: int | None = None) -> np.ndarray:
    """An image file as uint8 [H, W, 3], resized bicubically if a size is given that it does not have."""
    try:
        with Image.open(path) as file:
            image = eight_bits(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image, got {error}. Copy or generate it again.") from error
    if height is not None and width is not None and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture with 8 bits a number, also of a grey one of 16, which Pillow would clip to white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture


def _decode_all(files: list[Path], rows: np.ndarray, workers: int | None, progress: Progress | None) -> None:
    """Decode all files into `rows`, [files, height, width, 3]."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, len(files), 256):
            group = files[start : start + 256]
            decoded = pool.map(read_image, group, *map(itertools.repeat, rows.shape[1:3]))
            for row, image in enumerate(decoded, start):
                rows[row] = image
            if progress is not None:
                progress(start + len(group), len(files))
