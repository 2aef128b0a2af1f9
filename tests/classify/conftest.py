"""A folder of photos (some of the demo's digits), the tiny CLIP, and an SAE that the command would train on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vs2_plugin.demo.digits import read_digits

from ..conftest import at

TINY = "local-dir:tiny-clip"
CLASSES = ["eight", "nine", "seven"]
COUNT = 60


def write_photos(folder: Path, count: int = COUNT) -> None:
    """Write so many digits, in folders of classes."""
    names = {7: "seven", 8: "eight", 9: "nine"}
    shown = [one for one in enumerate(zip(*read_digits("train"), strict=True)) if one[1][1] in names]
    for number, (picture, label) in shown[:count]:
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number}.png")


@pytest.fixture(scope="session")
def photographed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder: ``photos/``, ``tiny-clip/``, and a store with an SAE of the photos, which knows where they lie."""
    from vs2_plugin.classify.plan import make_plan
    from vs2_plugin.classify.request import ClassifyRequest
    from vs2_plugin.training.run import train

    folder = tmp_path_factory.mktemp("photographed")
    shutil.copytree(workplace / "tiny-clip", folder / "tiny-clip")
    write_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        at(folder, patch)
        request = ClassifyRequest(photos=("photos",), model=f"vs2:{TINY}", amp=False, num_workers=0)
        training = make_plan(request).training
        assert training is not None
        train(replace(training, samples=2000, quiet=True))
    return folder


@pytest.fixture
def here(photographed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work inside that folder, with its store."""
    at(photographed, monkeypatch)
    return photographed
