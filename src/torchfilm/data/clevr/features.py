"""Read the HDF5 files of image features that the original's preprocessing writes."""

from pathlib import Path
from types import TracebackType

import numpy as np

from torchfilm.extras import needed

from .caches import draft

with needed("files of image features need h5py", "systems"):
    import h5py


class FeatureFile:
    """Pre-extracted image features: one dataset `features`, float32 [N, C, H, W], row = image_index.

    The released recipe gives [N, 1024, 14, 14] (56 GB for train). Rows are read on demand; close it, or use
    `with`.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        rows = self._file.get("features")
        if not isinstance(rows, h5py.Dataset) or rows.ndim != 4:
            got = f"{list(self._file)}" if rows is None else f"features {getattr(rows, 'shape', rows)}"
            self._file.close()
            raise ValueError(f"{path}: expected a dataset 'features' of shape (N, C, H, W), got {got}.")
        self._rows, self.path = rows, path

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self._rows.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Features of the images `rows` (any order, repeats allowed), float32 [len(rows), C, H, W].

        Each image is read once, however often it is asked for: ten questions share one in CLEVR.
        """
        unique, position = np.unique(np.asarray(rows), return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < len(self):
            raise ValueError(
                f"{self.path}: expected image rows 0 to {len(self) - 1}, got {unique[0]} to {unique[-1]}. "
                "Are these the features of another split?"
            )
        return np.asarray(self._rows[unique], np.float32)[position]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_features(path: Path, features: np.ndarray) -> None:
    """Write features [N, C, H, W] as the original's extraction does, whole or not at all."""
    with draft(path) as part, h5py.File(part, "w") as file:
        file.create_dataset("features", data=np.asarray(features, np.float32))


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: expected an HDF5 file, got {error}.") from error
