"""Image files, and training images read again."""

import base64
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.demo.digits import read_digits
from vs2_plugin.errors import DataError
from vs2_plugin.inspection.findings import inspect_images
from vs2_plugin.inspection.pictures import read_image, thumbnail
from vs2_plugin.inspection.survey import survey_latents

from ..conftest import IMAGES
from .conftest import BLOCK


def decoded(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))


def test_a_thumbnail_is_small_and_small_images_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 3), np.uint8)
    same = thumbnail(Image.fromarray(pixels))
    assert (same.width, same.height) == (6, 8) and np.array_equal(np.asarray(decoded(same)), pixels)
    large = thumbnail(Image.new("L", (1000, 500)))
    assert (large.width, large.height) == decoded(large).size == (160, 80) and large.uri.startswith("data:image/jpeg")


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("nope.png", "no file 'nope.png'"),
        ("digits", "'digits' is not a readable image"),
        ("tiny-clip/open_clip_config.json", "damaged or in another format"),
        ("cut.png", "is not a readable image"),
    ],
)
def test_what_is_no_image_is_refused(folder, digit, name, fragment):
    (folder / "cut.png").write_bytes((folder / digit(904)).read_bytes()[:60])
    with pytest.raises(DataError, match=fragment):
        read_image(name)


def test_top_images_are_the_training_images_of_those_rows(subject):
    """The pictures are the very pixels of the rows with the largest activations."""
    survey = survey_latents(subject("vs2"), limit=4)
    checkpoint = Store.default().find("local-dir-tiny-clip_wds-digits")
    sae, _ = checkpoint.sae(checkpoint.select()[0])
    code = sae.encode(torch.from_numpy(np.array(checkpoint.open_gallery().activations[BLOCK])).float())
    # The order of write_digits: every fourth image to a shard.
    order = [number for shard in range(4) for number in range(IMAGES)[shard::4]]
    training = read_digits("train")[0]
    for card in (card for group in survey.groups for card in group.cards):
        strength = ((code.indices == card.latent) * code.values).amax(1)
        rows = strength.argsort(descending=True, stable=True)[: min(10, int((strength > 0).sum()))].tolist()
        assert len(card.pictures) == len(rows)
        for picture, row in zip(card.pictures, rows, strict=True):
            assert np.array_equal(np.asarray(decoded(picture).convert("L")), np.asarray(training[order[row]]))


def test_where_the_training_images_cannot_be_read_it_is_said(subject, digit, tmp_path):
    changed = tmp_path / "digits"
    shutil.copytree("digits", changed)
    shutil.copy(changed / "train/0.tar", changed / "train/1.tar")  # as many images, but not the same
    survey = survey_latents(subject("vs2", dataset_root=str(changed)), limit=8)
    [problem] = survey.problems
    assert "Some training images of wds/digits are not shown" in problem and "gallery was made from" in problem
    shutil.rmtree(changed / "train")
    inspection = inspect_images(subject("vs2", dataset_root=str(changed)), [read_image(digit(904))])
    [problem] = inspection.problems
    assert "Training images of wds/digits are not shown: no readable file" in problem
    cards = inspection.findings[0].places[0].cards
    assert not any(card.pictures for card in cards) and all("active in" in card.about for card in cards)


def test_training_images_are_not_looked_for_in_a_folder_of_other_images(subject, digit, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(digit(904), tmp_path / "photos" / name)
    dataset = f"{tmp_path}/photos/"
    survey = survey_latents(subject("vs2", "@local-dir-tiny-clip_wds-digits", dataset=dataset), limit=2)
    [problem] = survey.problems
    assert problem.startswith("Training images of wds/digits are not shown: the checkpoint does not say in which")
    assert "--dataset wds/digits --dataset_root FOLDER" in problem
