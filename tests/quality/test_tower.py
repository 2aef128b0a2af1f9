"""Which images have labels that are numbers of the classes at hand."""

import numpy as np
import pytest

from vs2_plugin.quality.subject import Images
from vs2_plugin.quality.tower import _is_labelled


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 2], True), ([0, 3, 1], False), ([0, -1, 1], False)])
def test_labels_are_taken_if_they_are_numbers_of_the_classes(labels, expected):
    rows, numbers = np.zeros((3, 4)), np.arange(3)
    assert _is_labelled(Images("", rows, rows, "", numbers, numbers[:0], np.array(labels)), 3) is expected


def test_images_without_labels_are_not_labelled():
    rows, numbers = np.zeros((3, 4)), np.arange(3)
    assert not _is_labelled(Images("", rows, rows, "", numbers, numbers[:0]), 3) and not _is_labelled(None, 3)
