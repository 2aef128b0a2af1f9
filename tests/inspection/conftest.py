"""A checkpoint with a gallery, trained for a moment on the demo's digits by its tiny CLIP."""

import pytest

from vs2_plugin.cli import train_sae
from vs2_plugin.demo.digits import read_digits
from vs2_plugin.inspection.findings import inspect_images
from vs2_plugin.inspection.pictures import read_image
from vs2_plugin.inspection.subject import open_subject

from ..conftest import at

DATA = ["--dataset", "wds/digits", "--dataset_root", "digits"]
QUIET = ["--num_workers", "0", "--quiet", "--no_amp"]
BLOCK = "visual.transformer.resblocks.3"


@pytest.fixture(scope="session")
def trained(once, prepare):
    """The folder: digits, tower, and a store with an SAE for blocks 2 and 3 and one by PASS."""

    def fill(folder):
        prepare(folder)
        with pytest.MonkeyPatch.context() as patch:
            at(folder, patch)
            common = ["--model", "local-dir:tiny-clip", *DATA, "--samples", "10000", *QUIET]
            assert train_sae.main([*common, "--blocks", "2", "last"]) == 0
            assert train_sae.main([*common, "--pass_weight", "0.8"]) == 0
            assert train_sae.main([*common, "--name", "bare", "--no_gallery"]) == 0

    return once("inspected", fill)


@pytest.fixture
def folder(trained, monkeypatch):
    """Work inside that folder, with its store."""
    at(trained, monkeypatch)
    return trained


@pytest.fixture(scope="session")
def digit(trained):
    """A function that writes a test image into the folder, by its number, and returns its name."""
    pictures = [*read_digits("train")[0], *read_digits("test")[0]]

    def write(number, name=None):
        name = name or f"{number}.png"
        pictures[number].save(trained / name)
        return name

    return write


@pytest.fixture
def subject(folder):
    """A function that opens a steered model on that data: ``subject("vs2", "@blocks=2", ...)``."""

    def open_on_digits(method="vs2", options="", **settings):
        given = {"dataset": "wds/digits", "dataset_root": "digits", **settings}
        return open_subject(f"{method}:local-dir:tiny-clip{options}", "", **given)

    return open_on_digits


@pytest.fixture
def looked(subject, digit):
    """A function that inspects a test image and returns the finding."""

    def look(number, *model, **settings):
        return inspect_images(subject(*model), [read_image(digit(number))], **settings).findings[0]

    return look
