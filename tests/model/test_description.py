"""A model says how it is steered."""

from pathlib import Path

import vs2_plugin

from .conftest import TINY

NAME = "local-dir-tiny-clip_wds-digits"


def test_a_model_says_how_it_steers(in_demo):
    waiting, *_ = vs2_plugin.load(f"vs2:{TINY}")
    assert repr(waiting).endswith("not steered yet: it does not know its data set")
    model, *_ = vs2_plugin.load(f"vs2:{TINY}", dataset="wds/digits", store=Path("store"))
    first, *lines = repr(model).splitlines()
    assert first.startswith(f"SteeredCLIP 'vs2:{TINY}': Visual Sparse Steering")
    assert [line.strip() for line in lines] == [
        "steered: block 3",
        f"checkpoint: {NAME} of {TINY}, 16 of 512 latents active, trained on 900 images of wds/digits",
        "options: gamma = 1.5, lam = 2.1, which is alpha = 1.05",
        "classes: none, but classify() needs them",
    ]


def test_it_says_what_was_chosen_and_why(in_demo):
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}@alpha=auto")
    assert "options: alpha = auto; chosen: nothing yet" in repr(model)
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}@alpha=auto", classes=["one", "two"], prompts="{}", amp=False)
    told = repr(model)
    assert "over 900 unlabeled images, a class carries" in told
    assert told.endswith("classes: 2: one, two, by the prompt '{c}'")


def test_many_classes_and_prompts_are_counted(in_demo):
    classes = [f"class {number}" for number in range(7)]
    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}@alpha=0.5", classes=classes, prompts=["{}", "a {}"], amp=False)
    assert repr(model).splitlines()[-2:] == [
        "  options: alpha = 0.5",
        "  classes: 7: class 0, class 1, class 2, class 3, class 4, ..., by 2 prompts",
    ]
