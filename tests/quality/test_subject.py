"""What is looked at, and what is refused."""

import numpy as np
import pytest

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.quality.subject import open_elsewhere, open_subject, require_comparable

from .test_measure import trained  # noqa: F401


def test_what_does_not_fit_is_refused(trained, tmp_path):  # noqa: F811
    store = Store(trained)
    np.save(tmp_path / "narrow.npy", np.ones((30, 4), np.float32))
    np.save(tmp_path / "y.npy", np.ones(7, np.int64))
    with pytest.raises(DataError, match="have width 4; expected 16"):
        open_subject("s0", store, activations=tmp_path / "narrow.npy")
    with pytest.raises(DataError, match="expected 400 whole numbers"):
        open_subject("s0", store, activations=trained / "X.npy", labels=tmp_path / "y.npy")
    with pytest.raises(DataError, match="cannot be read"):
        open_subject("s0", store, activations=trained / "X.npy", labels=tmp_path / "none.npy")
    (tmp_path / "y.npy").write_bytes((trained / "X.npy").read_bytes()[:10] + b"{'descr': (")
    with pytest.raises(DataError, match="cannot be read: it is not an npy file, or damaged; expected a file NAME.npy"):
        open_subject("s0", store, activations=trained / "X.npy", labels=tmp_path / "y.npy")
    with pytest.raises(CheckpointError, match="no SAE at block 3 .*; it is of activations without a model, which have"):
        open_subject("s0", store, block=3)
    with pytest.raises(CheckpointError, match="no pass SAE, only plain; it is of activations without a model"):
        open_subject("s0", store, variant="pass")
    subject = open_subject("s0", store)
    with pytest.raises(CheckpointError, match="'s1' is of activations without a model, and keeps none; give them as a"):
        open_elsewhere("s1", store, subject)
    assert np.array_equal(open_elsewhere(str(trained / "other.npy"), store, subject), np.load(trained / "other.npy"))


def test_saes_of_other_widths_are_not_compared(trained):  # noqa: F811
    store = Store(trained)
    vs2_plugin.train(np.random.default_rng(0).normal(size=(40, 8)), samples=100, quiet=True, store=trained, name="w8",
                     overwrite=True)  # fmt: skip
    subjects = [open_subject(name, store) for name in ("s0", "w8")]
    with pytest.raises(CheckpointError, match="cannot be compared: widths 16 and 8"):
        require_comparable(subjects)
    require_comparable([open_subject(name, store) for name in ("s0", "s1")])
