"""``vs2 doctor``, and its checks by themselves."""

import json

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import doctor
from vs2_plugin.cli.main import main

from ..conftest import IMAGES
from .test_train_sae import folder, train  # noqa: F401

NAME = "local-dir-tiny-clip_wds-digits"


@pytest.mark.parametrize(
    ("name", "version", "good"),
    [("clip-benchmark", "1.6.1", True), ("clip-benchmark", "1.7.0", False), ("numpy", "2.3.5", True),
     ("numpy", "2.4.0", False), ("torch", "9.9", True)],
)  # fmt: skip
def test_versions_that_do_not_fit_are_problems(monkeypatch, name, version, good):
    monkeypatch.setattr(doctor, "_PACKAGES", (name,))
    monkeypatch.setattr(doctor, "version", lambda name: version)
    [finding] = doctor._packages()
    assert (finding.text, finding.good) == (f"{name} {version}", good)


def test_a_missing_package_is_a_problem_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert list(doctor._packages()) == [
        doctor.Finding("no-such-package is not installed", False, "pip install no-such-package")
    ]


def test_folders_without_a_checkpoint_are_problems_and_hidden_ones_are_not_looked_at(tmp_path):
    store = Store(tmp_path)
    for name in ("empty", ".hidden"):
        (store.checkpoints / name).mkdir(parents=True)
    (store.checkpoints / "file").touch()
    [finding] = doctor._checkpoints(store)
    assert not finding.good and finding.text.startswith("empty: ")
    assert finding.mend == f"vs2 store --store {tmp_path} remove empty"
    assert list(doctor._checkpoints(Store(tmp_path / "nothing"))) == []


def test_doctor_finds_a_damaged_checkpoint(folder, capsys):  # noqa: F811
    assert train() == 0
    path = next(Store.default().checkpoints.glob("*/vs2.json"))
    facts = json.loads(path.read_text())
    facts.pop("digest")
    facts["sites"][0]["fvu"] = 0.5  # an SAE of so few steps is of no use
    path.write_text(json.dumps(facts))
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "the hook is active" in text and f"{NAME}: {IMAGES} images" in text and "torch" in text
    file = next(Store.default().checkpoints.glob("*/*/sae.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["doctor"]) == 1
    assert f"vs2 store remove {NAME}" in capsys.readouterr().out


def test_doctor_notices_the_switch(monkeypatch, capsys):
    monkeypatch.setenv("VS2_PLUGIN_DISABLE", "1")
    assert main(["doctor"]) == 1
    assert "unset VS2_PLUGIN_DISABLE" in capsys.readouterr().out
