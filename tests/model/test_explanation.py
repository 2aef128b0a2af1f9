"""What an explanation says; its numbers are held against the model in tests/inspection/test_findings.py."""

import numpy as np
import pytest
import torch
from PIL import Image

import vs2_plugin
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.model.explanation import ClassChange, Explanation, Line, PlaceChange

from .conftest import TINY

NAME = "local-dir-tiny-clip_wds-digits"
TABLE = """\
The class stays cat: 60.0% before, 90.0% after steering.
class   before    after  change of the logit
cat     60.0 %   90.0 %                +1.25
dog     40.0 %   10.0 %                -0.50
block 1: FVU 0.2
  contributions to the lead of cat over dog
  (1 of 2 active latents)
             activation  contribution  nearest words
  latent 7         0.50        +1.000  cat 0.25, dog -0.10
  remainder                    +0.000
  change                       +1.750
block 2: FVU 0.9
  Left alone."""


def test_an_explanation_reads_as_a_table():
    classes = [ClassChange("cat", 0.6, 0.9, 1.25), ClassChange("dog", 0.4, 0.1, -0.5)]
    near = (("cat", 0.25), ("dog", -0.1))
    lines = (Line("latent 7", [1.0], 7, 0.5, near), Line("remainder", [-1e-5]), Line("change", [1.75]))
    places = [
        PlaceChange("block 1", "FVU 0.2", "", "1 of 2 active latents", lines),
        PlaceChange("block 2", "FVU 0.9", "Left alone."),
    ]
    assert repr(Explanation(classes, "cat over dog", places)) == TABLE


def test_one_class_leads_over_none(in_demo, image):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}", amp=False)
    model.set_classifier(torch.ones(64, 1) / 8)
    with pytest.raises(HarnessError, match="expected two classes or more"):
        model.explain(image)


def test_a_figure_beside_its_bound_has_the_digits_that_tell_them_apart(in_demo, image):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}@gate=0.5", classes=CLASSES, amp=False)
    fvu = model.classify(image).fvu.item()
    model.places[0].gate.tau = fvu - 2e-5
    (place,) = model.explain(image).places
    assert place.decision == f"FVU {fvu:.7f} is above the gate's threshold {fvu - 2e-5:.7f} (q = 0.5): left alone"


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8))


def test_a_model_explains_an_image_however_it_comes(in_demo, image, tmp_path):
    model, transform, _ = vs2_plugin.load(f"vs2:{TINY}@{NAME}", classes=CLASSES, amp=False)
    image.save(tmp_path / "a.png")
    found = model.explain(image, top=2, latents=3)
    for other in (tmp_path / "a.png", str(tmp_path / "a.png"), transform(image), transform(image)[None].numpy()):
        assert model.explain(other, top=2, latents=3) == found
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert model.explain(image, top=2, latents=3) == found
    [predicted] = model.classify(image).names
    assert found.classes[0].name == predicted and found.lead.startswith(predicted)
    [place] = found.places
    assert [line.name for line in place.lines][:3] == [f"latent {line.latent}" for line in place.lines[:3]]
    assert all(line.words and line.activation > 0 for line in place.lines[:3])
    assert sum(line.values[0] for line in place.lines[:-1]) == pytest.approx(place.lines[-1].values[0], abs=0.01)


def test_the_lead_is_over_the_class_before_or_else_over_the_second_best(in_demo):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}@alpha=4", classes=CLASSES, amp=False)
    seen = set()
    for picture in read_digits("test")[0][:8]:
        predicted = model.classify(picture)
        [[(first, _), (second, _)]] = predicted.top(2)
        before = CLASSES[predicted.plain_labels[0]]
        assert model.explain(picture, latents=1).lead == f"{first} over {second if before == first else before}"
        seen.add(before == first)
    assert seen == {True, False}


def test_what_cannot_be_explained_is_told(in_demo, image):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}", classes=CLASSES, amp=False)
    with pytest.raises(DataError, match="2 images; expected one"):
        model.explain([image, image])
    with pytest.raises(DataError, match="int is not an image; expected a PIL image, a path"):
        model.explain(7)
    with pytest.raises(HarnessError, match="knows no classes; load it with classes="):
        vs2_plugin.load(f"vs2:{TINY}@{NAME}")[0].explain(image)
    oracle, *_ = vs2_plugin.load(f"rag:{TINY}@{NAME}@labels=oracle", classes=CLASSES, amp=False)
    with pytest.raises(HarnessError, match="needs the true class of the image"):
        vs2_plugin.load(f"proto:{TINY}@{NAME}", classes=CLASSES, amp=False)[0].explain(image)
    assert isinstance(oracle.explain(image), Explanation)  # it reads labels of neighbours, and none of the image
