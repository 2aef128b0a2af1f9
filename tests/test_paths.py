import numpy as np
import pytest

from vs2_plugin.paths import Paths


def test_paths_take_some_tens_of_bytes():
    names = [f"class/{number:06d}.jpg" for number in range(1000)]
    paths = Paths("".join(names).encode(), np.cumsum(list(map(len, names))))
    assert list(paths) == names and paths[-1] == names[-1] and paths[3:5] == names[3:5] and names[7] in paths
    with pytest.raises(IndexError):
        paths[1000]
