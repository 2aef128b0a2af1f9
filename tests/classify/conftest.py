"""A folder of photos (some of the demo's digits), the tiny CLIP, and an SAE that the command would train on them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

TINY = "local-dir:tiny-clip"
CLASSES = ["eight", "nine", "seven"]
COUNT = 60


def write_photos(folder: Path, count: int = COUNT) -> None:
    """Write so many digits, in folders of classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype("uint8")
    chosen = [number for number in range(len(pixels)) if digits.target[number] in (7, 8, 9)][:count]
    for number in chosen:
        place = folder / {7: "seven", 8: "eight", 9: "nine"}[digits.target[number]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(place / f"{number}.png")


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
        patch.chdir(folder)
        patch.setenv("VS2_STORE", "store")
        request = ClassifyRequest(photos=("photos",), model=f"vs2:{TINY}", amp=False, num_workers=0)
        training = make_plan(request).training
        assert training is not None
        train(replace(training, samples=2000, quiet=True))
    return folder


@pytest.fixture
def here(photographed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work inside that folder, with its store."""
    monkeypatch.chdir(photographed)
    monkeypatch.setenv("VS2_STORE", "store")
    return photographed
