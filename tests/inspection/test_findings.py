"""What steering did to images, on a real checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image

import vs2_plugin
from vs2_plugin.demo.digits import CLASSES, TEMPLATES
from vs2_plugin.errors import HarnessError
from vs2_plugin.inspection.findings import inspect_images
from vs2_plugin.inspection.notes import NO_GALLERY, NO_WORDS
from vs2_plugin.inspection.pictures import ImageFile, read_image
from vs2_plugin.model.explanation import ClassChange, Explanation
from vs2_plugin.plugins import registry

TINY = "local-dir:tiny-clip"


def to_the_lead(place):
    """Line -> contribution to the lead."""
    return {line.name: line.values[0] for line in place.lines}


def test_classes_and_contributions_are_those_of_the_steered_model(folder, digit, looked):
    finding = looked(904, top=3)
    model, transform, tokenizer = vs2_plugin.load(f"vs2:{TINY}", "", dataset="wds/digits")
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    classifier = zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES, "cpu", amp=False)
    image = transform(Image.open("904.png"))[None]
    gate = model.places[0].gate
    with torch.no_grad():
        after = 100 * torch.nn.functional.normalize(model.encode_image(image), dim=-1) @ classifier
        fvu = gate.facts["mean_fvu"]
        with model.unsteered():
            before = 100 * torch.nn.functional.normalize(model.model.encode_image(image), dim=-1) @ classifier
    assert {change.name for change in finding.classes} == {
        CLASSES[index] for logits in (before, after) for index in logits[0].topk(3).indices
    }
    for change in finding.classes:
        index = CLASSES.index(change.name)
        expected = (before[0].softmax(0)[index], after[0].softmax(0)[index], (after - before)[0, index])
        assert (change.before, change.after, change.change) == pytest.approx([float(value) for value in expected], 1e-3)
    [place] = finding.places
    assert f"FVU {fvu:.3f}" in place.decision and "no gate" in place.decision
    assert place.lines[-1].values[1:] == pytest.approx([change.change for change in finding.classes], abs=0.01)
    parts = to_the_lead(place)
    change = parts.pop("change")
    assert sum(parts.values()) == pytest.approx(change, abs=0.01) and abs(parts["remainder"]) < 0.01
    first, second = (CLASSES.index(name) for name in finding.lead.split(" over "))
    assert change == pytest.approx(float((after - before)[0, first] - (after - before)[0, second]), abs=0.01)


@pytest.mark.parametrize(
    ("method", "options", "rest"),
    [
        ("pass", "", "back to the norm of x"),
        ("amp", "@gamma=1.5", "what the SAE does not explain, left out"),
        ("rec", "@blocks=all", "what the SAE does not explain, left out"),
        ("vs2", "@blocks=2+3", "back to the norm of x"),
        ("vs2pp", "", "back to the norm of x"),
    ],
)
def test_sums_close_for_every_method_with_a_sparse_code(looked, method, options, rest):
    finding = looked(910, method, options, latents=3, top=10)
    assert len(finding.places) == (2 if "blocks" in options else 1)
    total = 0
    for place in finding.places:
        parts = to_the_lead(place)
        change = parts.pop("change")
        total += change
        assert rest in parts and sum(parts.values()) == pytest.approx(change, abs=0.02)
        latents = [line for line in place.lines if line.latent is not None]
        assert [line.latent for line in latents] == [card.latent for card in place.cards] and len(latents) == 3
        if method == "rec":
            assert not any(line.values[0] for line in latents) and "none is amplified" in place.shown
    first, second = finding.lead.split(" over ")
    changes = {change.name: change.change for change in finding.classes}
    assert total == pytest.approx(changes[first] - changes[second], abs=0.02)


def test_the_model_without_the_latents_shown_is_named_and_is_that(looked):
    finding = looked(904, "vs2", "@blocks=2+3", latents=2)
    for block, place in zip((2, 3), finding.places):
        latents = sorted(line.latent for line in place.lines if line.latent is not None)
        assert place.without == f"latents:{TINY}@blocks={block}@suppress={latents[0]}+{latents[1]}"
        [left_out] = looked(904, "latents", place.without.removeprefix(f"latents:{TINY}")).places
        parts = {line.latent: line for line in left_out.lines if line.latent is not None}
        assert sorted(parts) == latents and left_out.shown.startswith("2 of 2 active latents") and not left_out.without
        sums = to_the_lead(left_out)
        assert sum(sums.values()) == pytest.approx(2 * sums["change"], abs=0.02) and abs(sums["rest"]) < 1e-3
    assert not looked(904, "pass").places[0].without  # along another SAE


def test_where_the_gate_is_closed_nothing_is_attributed(subject, digit):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    images = [ImageFile("noise", Image.fromarray(pixels)), read_image(digit(904))]
    noise, seen = inspect_images(subject("vs2", "@gate=0.9"), images).findings
    assert noise.name == "noise" and "is above the gate's threshold" in noise.places[0].decision
    assert noise.places[0].decision.endswith("(q = 0.9): left alone")
    assert "left unchanged here, bit for bit" in noise.places[0].note and noise.places[0].lines == ()
    assert "is within the gate's threshold" in seen.places[0].decision and seen.places[0].lines


def test_neighbours_are_shown_with_their_pictures(looked):
    neighbours = looked(904, "vs2pp", "@n=7@labels=oracle").neighbours
    assert "The 7 nearest training images" in neighbours.about and "with its training label" in neighbours.about
    assert len(neighbours.images) == 7 and all(image.picture for image in neighbours.images)


def test_neighbours_are_the_nearest_images_of_the_gallery_with_their_labels(subject, digit):
    seen = {}
    for kind, rule in (("oracle", "majority"), ("pseudo", "majority"), ("oracle", "query")):
        opened = subject("vs2pp", f"@n=7@labels={kind}@rule={rule}")
        image = read_image(digit(905))
        gallery = opened.model.checkpoint.open_gallery()
        embeddings = torch.nn.functional.normalize(torch.from_numpy(np.array(gallery.embeddings["clip"])).float())
        with torch.no_grad(), opened.model.unsteered():
            plain = opened.model.model.encode_image(opened.transform(image.image)[None])
        cosines, rows = (torch.nn.functional.normalize(plain) @ embeddings.T)[0].topk(7)
        labels = gallery.labels[rows] if kind == "oracle" else (embeddings[rows] @ opened.class_texts.T).argmax(1)
        seen[kind] = found = [CLASSES[label] for label in labels]
        neighbours = inspect_images(opened, [image]).findings[0].neighbours
        shown = neighbours.images
        assert [one.label for one in shown] == found
        assert [one.similarity for one in shown] == pytest.approx(cosines.tolist(), abs=1e-3)
        own = CLASSES[(plain @ opened.class_texts.T).argmax()]
        target = own if rule == "query" else max(found, key=found.count)
        assert [one.side for one in shown] == ["S+" if label == target else "S-" for label in found]
        assert f"Steered towards the {found.count(target)} of {target!r} (S+)" in neighbours.about
    assert seen["oracle"] != seen["pseudo"]


@pytest.mark.parametrize("method", ["rag", "knn", "clipsteer"])
def test_methods_without_a_sparse_code_show_their_neighbours_only(looked, method):
    finding = looked(904, method)
    assert "does not steer by a sparse code of its own" in finding.places[0].note
    assert "with its zero-shot class" in finding.neighbours.about


def test_what_is_missing_is_said(subject, digit):
    images = [read_image(digit(904))]
    inspection = inspect_images(subject("vs2", "@bare"), images)
    assert inspection.problems == [NO_GALLERY] and inspection.findings[0].places[0].cards[0].pictures == []
    inspection = inspect_images(subject("vs2", "@blocks=2"), images)
    assert inspection.problems == [NO_WORDS] and inspection.findings[0].places[0].cards[0].words == []


def test_an_oracle_that_needs_the_true_class_is_refused(subject):
    with pytest.raises(HarnessError, match="needs the true class"):
        inspect_images(subject("proto"), [])


def test_a_move_of_any_plugin_is_explained(subject, digit, monkeypatch):
    """A function with a parameter ``batch`` that returns a Move, and nothing of this package's own."""

    def build(context, strength):
        def steer(x, batch):
            return vs2_plugin.Move(batch.code(context.sae, x), strength, keep_norm=False)

        return steer

    method = vs2_plugin.Method("mine", build, [vs2_plugin.Option("strength", float, 2.0)])
    monkeypatch.setitem(registry().methods, "mine", method)
    monkeypatch.setitem(registry().owners, "mine", "a test")
    [finding] = inspect_images(subject("mine"), [read_image(digit(904))]).findings
    [place] = finding.places
    parts = to_the_lead(place)
    change = parts.pop("change")
    assert sum(parts.values()) == pytest.approx(change, abs=0.01) and abs(change) > 0.1
    assert abs(parts["rest"]) < 1e-3 and any(name.startswith("latent ") for name in parts)


def test_the_class_before_and_after_is_told_in_a_sentence():
    def told(*classes):
        return Explanation([ClassChange(*one, 0.0) for one in classes], "", []).told

    assert told(("cat", 0.25, 0.75), ("dog", 0.5, 0.125)) == (
        "Steering changed the class from dog (50.0% before, 12.5% after) to cat (25.0% before, 75.0% after)."
    )
    assert told(("cat", 0.5, 0.75), ("dog", 0.25, 0.125)) == "The class stays cat: 50.0% before, 75.0% after steering."
