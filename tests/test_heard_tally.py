"""What `heard` counts: how the numbers of many batches are kept."""

import numpy as np

from torchfilm.heard_tally import _append


def test_a_thousand_batches_of_one_row_are_six_arrays_each_at_least_twice_as_long_as_the_next():
    arrays: list[np.ndarray] = []
    for row in range(1000):
        _append(arrays, np.array([row]))
    assert [len(one) for one in arrays] == [512, 256, 128, 64, 32, 8]
    assert np.concatenate(arrays).tolist() == list(range(1000))
