import h5py
import numpy as np
import pytest

from torchfilm.data.clevr.features import FeatureFile, write_features


def test_features_come_in_the_order_asked_with_repeats(tmp_path) -> None:
    stored = np.random.default_rng(0).normal(size=(7, 5, 2, 3)).astype(np.float32)
    write_features(tmp_path / "features.h5", stored)
    with FeatureFile(tmp_path / "features.h5") as features:
        assert features.shape == (7, 5, 2, 3)
        rows = np.array([4, 0, 4, 6])
        assert np.array_equal(features[rows], stored[rows])
        assert features[np.array([], int)].shape == (0, 5, 2, 3)
        with pytest.raises(ValueError, match="another split"):
            features[np.array([7])]


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "no.h5").write_text("text")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        FeatureFile(tmp_path / "no.h5")
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["features"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\), got features \(2, 3\)"):
        FeatureFile(tmp_path / "flat.h5")
