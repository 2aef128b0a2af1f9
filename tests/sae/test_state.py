import numpy as np
import pytest
import torch

from vs2_plugin.sae import state as module
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.state import SavedState
from vs2_plugin.sae.train import Job, _Run, train_saes

X = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float16)
LABELS = np.arange(2000) % 7
#: Two passes: one of three SAEs, one of the other seed.
JOBS = [
    Job("plain", X, TrainConfig(k=4, samples=20_000)),
    Job("abs", X, TrainConfig(k=4, samples=20_000, activation="abs")),
    Job("pass", X, TrainConfig(k=4, samples=20_000, pass_weight=0.5, pass_means="running"), LABELS),
    Job("other", X, TrainConfig(k=4, samples=20_000, seed=3)),
]


class Killed(BaseException):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """A function that has the next training end in an exception after so many steps."""
    stock = _Run.step

    def arrange(steps):
        left = [steps]

        def step(self, *args):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return stock(self, *args)

        monkeypatch.setattr(_Run, "step", step)

    yield arrange
    monkeypatch.setattr(_Run, "step", stock)


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, killed_after):
    whole = train_saes(JOBS, quiet=True)
    for steps in (1, 40, 70, 100, 60):
        killed_after(steps)
        with pytest.raises(Killed):
            train_saes(JOBS, quiet=True, states=tmp_path, save_every=0)
    killed_after(10**9)
    found = train_saes(JOBS, quiet=True, states=tmp_path, save_every=0)
    for one, other in zip(whole, found, strict=True):
        for name, value in one.sae.state_dict().items():
            assert torch.equal(other.sae.state_dict()[name], value), name
        assert one.figures.fvu == other.figures.fvu and one.figures.fvu_quantiles == other.figures.fvu_quantiles
        assert other.figures.dead == one.figures.dead and other.figures.seconds > 0


def test_it_goes_on_where_it_was(tmp_path, killed_after, caplog):
    caplog.set_level("INFO", "vs2_plugin")
    killed_after(60)
    with pytest.raises(Killed):
        train_saes(JOBS[:1], quiet=True, states=tmp_path, save_every=0)
    killed_after(20)
    train_saes(JOBS[:1], quiet=True, states=tmp_path, save_every=0)
    assert "the training continues after 60 of 80 steps" in caplog.text
    killed_after(0)  # all steps have been done
    train_saes(JOBS[:1], quiet=True, states=tmp_path, save_every=0)


def test_a_state_is_written_when_it_is_time_and_where_it_pays(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    saved = SavedState(tmp_path / "new" / "x", 60)
    assert saved.read() == {} and not saved.is_due(last=False) and not saved.is_due(last=True)
    now[0] = 60
    assert saved.is_due(last=False)
    saved.write({"a": torch.ones(2)})
    assert not saved.is_due(last=False) and saved.is_due(last=True)
    other = SavedState(tmp_path / "new" / "x", 60, writes=False)
    assert other.read()["a"].tolist() == [1, 1]
    now[0] = 1000
    assert not other.is_due(last=True)


def test_a_damaged_state_counts_as_not_there(tmp_path):
    path = tmp_path / "x"
    SavedState(path, 0).write({"a": torch.arange(5.0), "b": torch.tensor(3)})
    whole = path.read_bytes()
    assert SavedState(path, 0).read()["b"] == 3
    for place in range(0, len(whole), 3):
        raw = bytearray(whole)
        raw[place] ^= 4
        path.write_bytes(raw)
        assert SavedState(path, 0).read() == {}
    for cut in (0, 7, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert SavedState(path, 0).read() == {}


def test_a_state_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trained = train_saes(JOBS[:1], quiet=True, states=tmp_path / "file" / "x", save_every=0)
    assert len(trained) == 1 and "the state of the training could not be saved" in caplog.text
