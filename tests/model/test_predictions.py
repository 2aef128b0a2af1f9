"""What a model makes of images, beside what the real clip_benchmark makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vs2_plugin
from vs2_plugin.data.images import open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import DataError, HarnessError, ModelStringError, SettingError
from vs2_plugin.harness.recorder import Recorder
from vs2_plugin.model.classifier import Classifier, prompts_of
from vs2_plugin.model.predictions import Predictions

from .conftest import TINY, few_digits

NAME = "local-dir-tiny-clip_wds-digits"
PROMPTS = ["a photo of the number {}", "{c}."]


@pytest.fixture
def load(in_demo):
    def load(model, **changes):
        settings = {"dataset": "wds/digits", "classes": CLASSES, "prompts": PROMPTS, "amp": False, **changes}
        return vs2_plugin.load(model, **settings)[:2]

    return load


def test_a_model_that_was_cast_is_not_asked(load):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = load(f"vs2:{TINY}@{NAME}")[0].to(dtype)
        for ask in (model.classify, model.explain):
            with pytest.raises(HarnessError, match=rf"weights of {dtype}; expected float32.*call model\.float\(\)"):
                ask(torch.zeros(1, 3, 32, 32))
        assert len(model.float().classify(torch.zeros(1, 3, 32, 32))) == 1


def test_images_that_are_not_finite_are_refused_by_number(load):
    model = load(f"vs2:{TINY}@{NAME}")[0]
    images = torch.zeros(5, 3, 32, 32)
    for wrong in (torch.nan, torch.inf):
        images[3, 0, 1, 2] = wrong
        for given in (images, list(images), images.numpy()):
            with pytest.raises(DataError, match="image number 3 holds NaN or infinity"):
                model.classify(given, batch_size=2)
        with pytest.raises(DataError, match="image number 0 holds NaN or infinity"):
            model.explain(images[3])


def test_an_image_without_logits_has_no_class(load):
    model = load(f"vs2:{TINY}@{NAME}")[0]
    images = torch.randn(5, 3, 32, 32)
    images[3] *= 1e30
    with pytest.raises(DataError, match="image number 3 has logits that are NaN"):
        model.classify(images, batch_size=2)
    with pytest.raises(DataError, match="image number 0 has logits that are NaN"):
        model.explain(images[3])


def test_where_a_later_image_fails_it_is_named_and_nothing_is_recorded_any_more(load):
    model = load(f"vs2:{TINY}@{NAME}")[0]
    with pytest.raises(DataError, match="number 2"):
        model.classify([Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32)), 7], batch_size=2)
    assert not any(gate.recording for gate in model.places.gates)


def test_numbers_below_one_are_refused(load):
    model = load(f"vs2:{TINY}@{NAME}")[0]
    found = model.classify(torch.zeros(1, 3, 32, 32))
    for wrong in (0, -1, 1.5, "a", None):
        with pytest.raises(SettingError, match="expected a number of classes, at least 1"):
            found.top(wrong)
        with pytest.raises(SettingError, match="expected a whole number, at least 1"):
            model.classify(torch.zeros(1, 3, 32, 32), batch_size=wrong)
    for told in ({"top": 0}, {"latents": 0}, {"latents": -2}, {"top": 1.5}, {"latents": "a"}):
        with pytest.raises(SettingError, match="expected whole numbers, at least 1"):
            model.explain(torch.zeros(3, 32, 32), **told)


@pytest.mark.parametrize(
    ("model", "amp"),
    [
        (f"vs2s:{TINY}@{NAME}@gate=0.5", False),
        (f"vs2:{TINY}@{NAME}@blocks=1+2", False),
        (f"rag:{TINY}@{NAME}", False),
        (f"vs2pp:{TINY}@{NAME}", True),
    ],
)
def test_they_are_those_of_clip_benchmark_bit_for_bit(model, amp, load, in_demo, clip_benchmark, monkeypatch):
    few_digits(in_demo, "few", 1, count=40)
    (in_demo / "few/zeroshot_classification_templates.txt").write_text("\n".join(prompts_of(PROMPTS)))
    seen = []
    finish = Recorder.finish
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    monkeypatch.setattr(
        Recorder, "finish", lambda self, *given: (seen.append((given, list(self._plain))), finish(self, *given))[1]
    )
    data = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few", "--output", "one.json")
    data += ("--num_workers", "1", "--quiet", "--batch_size", "16", *([] if amp else ["--no_amp"]))
    code, error = clip_benchmark("eval", "--model", model, *data)
    assert code == 0, error
    (((logits, _, facts), plain),) = seen

    mine, transform = load(model, amp=amp)
    source = open_images(DataSet.of("wds/few", "few"), "test", transform)
    images = torch.cat([batch.images for batch in source.batches(64, 0)])
    found = mine.classify(images, batch_size=16)
    assert len(found) == 40 and torch.equal(found.logits, logits)
    assert torch.equal(found.plain_labels, torch.cat([best for best, _ in plain]))
    assert torch.equal(found.plain.amax(1), torch.cat([chance for _, chance in plain]))
    for name in facts:
        assert torch.equal(getattr(found, name), facts[name])
    assert ("fvu" in facts) == (not found.fvu.isnan().any()) == (not model.startswith("rag"))
    assert found.changed.any() and (model.find("gate") < 0) == bool(found.steered.all())


def test_pictures_files_tensors_and_arrays_give_the_same(load, tmp_path):
    model, transform = load(f"vs2:{TINY}")
    pictures = [Image.new("RGB", (40, 30), (shade, 20, 250 - shade)) for shade in (10, 120, 250)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    tensor = torch.stack([transform(picture) for picture in pictures])
    expected = model.classify(pictures)
    pixels = [np.array(picture) for picture in pictures]
    backwards = tensor.numpy()[:, :, ::-1].copy()[:, :, ::-1]
    for array in (backwards, tensor.numpy().astype(">f4"), tensor.numpy().astype("longdouble")):
        assert torch.equal(model.classify(array).logits, model.classify(list(array)).logits)
        assert torch.equal(model.classify(array).logits, expected.logits)
    ways = (paths, [str(path) for path in paths], tensor, tensor.numpy(), tensor.double().numpy(), list(tensor))
    for images in (*ways, pixels, np.stack(pixels), tmp_path, f"{tmp_path}/"):
        assert torch.equal(model.classify(images).logits, expected.logits)
    for image in (pictures[1], paths[1], tensor[1], tensor[1].numpy(), pixels[1]):
        torch.testing.assert_close(model.classify(image).logits, expected.logits[1:2])
    for images in (paths, tmp_path):
        assert model.classify(images).images == tuple(map(str, paths))
    assert expected.images == ("0", "1", "2")


def test_16_bits_of_grey_give_the_same_from_a_file_and_from_memory(load, tmp_path):
    model, _ = load(f"vs2:{TINY}")
    Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)).save(tmp_path / "x.png")
    expected = model.classify(tmp_path / "x.png").logits
    assert torch.equal(model.classify(Image.open(tmp_path / "x.png")).logits, expected)


def test_they_are_told_as_a_table_and_in_words(load):
    model, _ = load(f"vs2:{TINY}", prompts="{}")
    found = model.classify(torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert found.probabilities.shape == found.plain.shape == (12, 10) and found.classes == tuple(CLASSES)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(12))
    rows, top = found.rows(), found.top(3)
    assert [row["class"] for row in rows] == found.names == [best[0][0] for best in top]
    assert [row["probability"] for row in rows] == found.probabilities.amax(1).tolist()
    assert [row["changed"] for row in rows] == found.changed.tolist()
    assert len(top[0]) == 3 and len(found.top(100)[0]) == 10
    lines = repr(found).splitlines()
    assert lines[0].startswith("12 images, 10 classes; steering changed ") and lines[-1] == "  and 2 more: see rows()"
    assert f"0: {rows[0]['class']} {100 * rows[0]['probability']:.1f} %" in lines[1] and "FVU" in lines[1]


def test_a_row_and_a_line_hold_an_images_probabilities_with_steering_and_without():
    chances, plain = torch.tensor([[0.75, 0.25], [0.4, 0.6]]), torch.tensor([[0.125, 0.875], [0.3, 0.7]])
    found = Predictions(("cat", "dog"), chances.log() + 5, plain.log() - 3, torch.tensor([0.25, torch.nan]),
                        torch.tensor([True, False]), ("a.jpg", "b.jpg"))  # fmt: skip
    first, second = found.rows()
    assert first == {
        "image": "a.jpg", "class": "cat", "probability": pytest.approx(0.75), "plain_class": "dog",
        "plain_probability": pytest.approx(0.875), "changed": True, "fvu": 0.25, "steered": True,
    }  # fmt: skip
    assert second["class"] == second["plain_class"] == "dog" and not second["changed"] and not second["steered"]
    assert (second["probability"], second["plain_probability"]) == pytest.approx((0.6, 0.7))
    assert repr(found).splitlines() == [
        "2 images, 2 classes; steering changed 1",
        "  a.jpg: cat 75.0 %, without steering dog 87.5 %; FVU 0.250",
        "  b.jpg: dog 60.0 %, without 70.0 %, not steered",
    ]


def test_a_classifier_of_ones_own(load):
    """Without names, classes have numbers. What a model was told last counts."""
    model, _ = load(f"vs2:{TINY}")
    images = torch.randn(4, 3, 32, 32)
    named = model.classify(images)
    model.set_classifier(replace(Classifier.unnamed(model.classifier.weights.flip(1)), amp=False))
    torch.testing.assert_close(model.classify(images).logits.flip(1), named.logits)
    assert model.classify(images).names == [str(9 - label) for label in named.labels.tolist()]
    model.bind(model.places.task)
    with pytest.raises(HarnessError, match="knows no classes"):
        model.classify(images)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "no images"),
        (3, "int is not an image"),
        ([3], "image number 0 is of type int"),
        (["none.jpg"], "there is no file 'none.jpg'"),
        (np.zeros((2, 30, 30, 3)), r"shape \(2, 30, 30, 3\) and type float64; expected floats \[images, 3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "type torch.uint8"),
        (np.zeros((1, 3, 32, 32), object), r"type object; expected floats \[images, 3, 32, 32\]"),
        ([(Image.new("RGB", (9, 9)), 3)], "image number 0 is of type tuple; expected PIL images"),
        ([Image.new("RGB", (9, 9)), [Image.new("RGB", (9, 9))]], "image number 1 is of type list; expected PIL images"),
        ([np.zeros((3, 32, 32), object)], r"image number 0 is of shape \[3, 32, 32\] and type object; expected PIL"),
        (Image.new("RGB", (0, 0)), "image number 0 has no pixels"),
        (np.zeros((2, 0, 5, 3), np.uint8), "image number 0 has no pixels"),
    ],
)
def test_what_is_no_image_is_said(images, problem, load):
    model, _ = load(f"vs2:{TINY}")
    with pytest.raises(DataError, match=problem):
        model.classify(images)
    with pytest.raises(SettingError, match="batch_size is 0"):
        model.classify(torch.zeros(1, 3, 32, 32), batch_size=0)


def test_amp_is_either_or(load):
    with pytest.raises(SettingError, match="amp is 'x'; expected True or False"):
        load(f"vs2:{TINY}", amp="x")


def test_classes_do_not_say_which_checkpoint(load):
    with pytest.raises(ModelStringError, match="does not know its data set yet"):
        load(f"vs2:{TINY}", dataset=None)
    assert load(f"vs2:{TINY}@{NAME}", dataset=None)[0].classifier.names == tuple(CLASSES)
