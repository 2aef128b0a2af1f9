"""What is inspected."""

import shutil

import pytest

from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import CheckpointNotFound, DataError

from ..conftest import IMAGES


def test_a_subject_knows_its_classes_words_and_images(subject):
    opened = subject("vs2", concepts=["cat", "dog", "cat"])
    title = dict(opened.title)
    assert opened.classes == CLASSES and opened.words == ["cat", "dog"]
    assert opened.class_texts.shape[0] == 10 and opened.word_texts.shape[0] == 2
    assert title["classes"] == "10, by the prompt 'a photo of the digit {c}'" and title["labels used"] == "none"
    assert title["concepts"] == "2, by the prompt 'a photo of a {c}.'"
    assert title["checkpoint"] == "local-dir-tiny-clip_wds-digits, trained on wds/digits"
    [place] = opened.model.places
    statistics = opened.statistics(place)
    assert statistics.images == IMAGES and opened.statistics(place) is statistics  # read once
    assert "concepts" not in dict(subject("vs2", "@bare").title) and subject("vs2", "@bare").statistics(place) is None


def test_no_test_split_is_needed(subject, folder, tmp_path):
    shutil.copytree(folder / "digits", tmp_path / "digits", ignore=shutil.ignore_patterns("test"))
    assert subject("vs2", dataset_root=str(tmp_path / "digits")).classes == CLASSES


@pytest.mark.parametrize(
    ("settings", "error", "fragment"),
    [
        ({"dataset_root": "nowhere"}, DataError, "its class"),
        ({"dataset": "wds/other"}, CheckpointNotFound, "vs2-train-sae --model"),
        ({"classes": ["one", "one"]}, DataError, "classes: 'one', 'one'; expected two words or more"),
        ({"concepts": []}, DataError, "concepts: none; expected"),
    ],
)
def test_what_cannot_be_opened_is_said(subject, settings, error, fragment):
    with pytest.raises(error, match=fragment):
        subject("vs2", **settings)
