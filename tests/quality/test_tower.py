"""Which images have labels that are numbers of the classes at hand."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.errors import CheckpointError
from vs2_plugin.inspection.subject import open_subject as open_one
from vs2_plugin.quality import tower
from vs2_plugin.quality.subject import Images, open_elsewhere, open_subject
from vs2_plugin.quality.tower import _is_labelled, open_zero_shot

from ..inspection.conftest import folder, trained  # noqa: F401


def images(labels, *datasets):
    rows, numbers = np.zeros((3, 4)), np.arange(3)
    return Images("", rows, rows, "", numbers, numbers[:0], None if labels is None else np.array(labels), datasets)


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 2], True), ([0, 3, 1], False), ([0, -1, 1], False)])
def test_labels_are_taken_if_they_are_numbers_of_the_classes(labels, expected):
    for dataset in ("wds/a", None):
        assert _is_labelled(images(labels), 3, dataset) is expected
        assert _is_labelled(images(labels, "wds/a"), 3, dataset) is expected


def test_labels_of_another_data_set_or_of_several_number_other_classes():
    assert not _is_labelled(images([0, 1, 2], "wds/b"), 3, "wds/a")
    for dataset in ("wds/a", None):
        assert not _is_labelled(images([0, 1, 2], "wds/a", "wds/b"), 1000, dataset)


def test_images_without_labels_are_not_labelled():
    assert not _is_labelled(images(None), 3, None) and not _is_labelled(None, 3, None)


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_saes_each_has_its_own_labels(first, folder):  # noqa: F811
    """Labels of another data set are no numbers of these classes, whichever SAE is named first."""
    store = Store.default()
    own = open_subject("local-dir-tiny-clip_wds-digits", store)
    other = replace(own, images=replace(own.images, datasets=("folder/photos",)))
    subjects = [own, other] if first == 0 else [other, own]
    found = open_zero_shot(subjects, "wds/digits", "digits", None)
    assert [one.labelled for one in found] == [first == 0, first == 1]


def test_activations_of_another_tower_are_not_taken(folder):  # noqa: F811
    name, store = "local-dir-tiny-clip_wds-digits", Store.default()
    own = open_subject(name, store)
    other = replace(own, checkpoint=replace(own.checkpoint, tower=replace(own.checkpoint.tower, parameters="0" * 64)))
    assert len(open_elsewhere(name, store, own)) == len(own.images.activations)
    with pytest.raises(CheckpointError, match="is for another tower than"):
        open_elsewhere(name, store, other)


def test_classes_are_of_the_tower_of_the_checkpoint_at_hand(folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    """It is not looked up again by its name, which another one in the store may have; nor is the data set that it was
    trained on, if the classes are given."""
    shutil.copytree("store/checkpoints/local-dir-tiny-clip_wds-digits", tmp_path / "bare")  # a name that is taken
    subject = open_subject(str(tmp_path / "bare"), Store.default())
    seen = []
    monkeypatch.setattr(tower, "open_subject", lambda *args, **named: seen.append(open_one(*args, **named)) or seen[-1])
    data = replace(subject.checkpoint.data, datasets=("folder/photos",), folders=("/nowhere/photos",))
    elsewhere = replace(subject, checkpoint=replace(subject.checkpoint, data=data))
    [of_digits] = open_zero_shot([subject], "wds/digits", "digits", None)
    [of_words] = open_zero_shot([elsewhere], None, "root", ["one", "two"])
    labelled = replace(subject, images=replace(subject.images, labels=np.arange(len(subject.images.activations)) % 2))
    open_zero_shot([labelled], None, "root", ["one", "two"])
    assert caplog.text.count("in this order: 0 is 'one', 1 is 'two'") == 1
    assert of_digits.about == "10 classes of wds/digits" and of_words.about == "2 classes given"
    assert [one.model.checkpoint.folder for one in seen] == [tmp_path / "bare"] * 3
