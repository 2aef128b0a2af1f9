"""What a report says first."""

import numpy as np
import pytest

from vs2_plugin.report.summary import summarise
from vs2_plugin.report.verdict import verdict
from vs2_plugin.results.runs import read


def told(folder):
    ((group,),) = (section.groups for section in summarise(read([folder])[0]))
    return verdict(group)


@pytest.mark.parametrize(
    ("accuracy", "tone", "words"),
    [
        (0.6, "up", "raises top-1 accuracy from 49.50 % to 59.33 %: by 9.83 points (95 % interval +7."),
        (0.4, "down", "lowers top-1 accuracy from 49.50 % to 39.00 %: by 10.50 points (95 % interval -13."),
        (0.503, "", "by 0.17 points (95 % interval +0.0 to +0.5). That may be chance: the interval includes 0."),
        (0.5, "", "at 49.50 % (95 % interval +0.0 to +0.0). No image became right or wrong."),
    ],
)
def test_the_first_sentence_says_by_how_much_and_whether_it_is_chance(
    accuracy, tone, words, write_run, make_images, steered
):
    write_run("B", images=make_images(0.5))
    path = write_run("vs2:B", images=make_images(accuracy, 1), metrics=steered(alpha=1.05))
    found = told(path.parent)
    assert found.tone == tone and words in found.sentences[0] and found.sentences[0].startswith("vs2 (alpha 1.05) ")
    assert ("beyond chance: the interval excludes 0" in found.sentences[0]) == bool(tone)


def test_of_a_sweep_without_the_default_no_point_is_the_verdict(write_run, steered):
    path = write_run("B", 0.5)
    for alpha, accuracy in ((-1, 0.2), (0, 0.5), (2, 0.625)):
        write_run(f"vs2:B@alpha={alpha}", accuracy, metrics=steered(alpha=alpha))
    write_run("amp:B@alpha=2", 0.1, metrics=steered("amp", alpha=2))  # neither another method is among them
    write_run("vs2:B@gate=0.9", 0.1, metrics=steered(gate=0.9))  # nor another option
    found = told(path.parent)
    assert found.sentences[0] == (
        "3 settings of vs2 (@alpha) change top-1 accuracy by -30.00 to +12.50 points; the default setting is not among "
        "them."
    )
    assert found.tone == "" and found.short.startswith("vs2, 3 settings; best without labels vs2 @alpha=2")
    write_run("vs2:B", 0.6, metrics=steered(alpha=1.05))
    assert told(path.parent).sentences[0].startswith("vs2 (alpha 1.05) raises top-1 accuracy from 50.00 % to 60.00 %")


@pytest.mark.parametrize(("mended", "tone"), [(4, ""), (5, ""), (6, "up")])
def test_a_few_images_are_not_beyond_chance(mended, tone, write_run, make_images, steered):
    """Five coins fall alike in a sixteenth of cases."""
    before = make_images(0.5)
    after = {name: array.copy() for name, array in before.items()}
    wrong = np.flatnonzero(before["prediction"] != before["target"])[:mended]
    after["prediction"][wrong] = before["target"][wrong]
    write_run("B", images=before)
    found = told(write_run("vs2:B", images=after, metrics=steered()).parent)
    assert found.tone == tone
    assert ("That may be chance: too few images changed to say more." in found.sentences[0]) == (not tone)
    write_run("vs2s:B", images=after, metrics=steered("vs2s"))
    found = told(write_run("vs2:B", images=before, metrics=steered()).parent)
    assert ("which may be chance, since few images changed" in found.sentences[1]) == (not tone)


def test_zero_shot_of_other_images_is_not_taken_for_the_same(write_run, make_images, steered):
    write_run("B", images=make_images(0.5))
    found = told(write_run("vs2:B", images=make_images(0.6, count=300), metrics=steered()).parent)
    assert found.sentences[0].endswith("or with other class names: the change may come from that.") and not found.tone


def test_the_best_row_without_labels_is_named(write_run, make_images, steered):
    write_run("B", images=make_images(0.5))
    write_run("vs2:B", images=make_images(0.6, 1), metrics=steered())
    write_run("vs2:B@gate=0.9", images=make_images(0.65, 1), metrics=steered())
    write_run("vs2s:B", images=make_images(0.55, 1), metrics=steered("vs2s"))
    path = write_run("proto:B", 0.9, metrics=steered("proto", "oracle"))
    found = told(path.parent)
    assert found.best.label == "vs2 @gate=0.9"
    assert found.sentences[1].startswith("Best without labels: vs2 @gate=0.9 with 63.83 %, +14.33 points (95 % ")
    assert "beyond chance. It is the best of 3 rows on these very test images" in found.sentences[1]
    assert found.short == "vs2 +9.83; best without labels vs2 @gate=0.9 +14.33"


def test_rows_that_gain_as_much_as_the_best_are_counted(write_run, steered):
    write_run("B", 0.5)
    path = write_run("vs2:B", 0.6, metrics=steered())
    write_run("vs2:B@gate=0.9", 0.6, metrics=steered())
    assert "It is the best of the 2 rows without labels (with 1 other)." in told(path.parent).sentences
    for gate in (0.95, 0.99):
        write_run(f"vs2:B@gate={gate}", 0.7, metrics=steered())
    second = told(path.parent).sentences[1]
    assert "It is the best of 4 rows (with 1 other) on these very test images" in second
    assert "with no interval, for lack of per-image results" in second


def test_vs2_leads_whatever_others_see(write_run, make_images, steered):
    write_run("B", images=make_images(0.5))
    write_run("zero:B", images=make_images(0.4, 1), metrics=steered("zero", protocol="image"))
    path = write_run("vs2:B@gate=0.9", images=make_images(0.6, 1), metrics=steered(protocol="unlabeled"))
    assert told(path.parent).sentences[0].startswith("vs2 @gate=0.9 raises top-1 accuracy")


def test_where_no_row_gains_that_is_said(write_run, steered):
    write_run("B", 0.5)
    for gate in (0.9, 0.99):
        path = write_run(f"vs2:B@gate={gate}", 0.5 - gate / 10, metrics=steered(gate=gate))
    found = told(path.parent)
    assert found.best is None and "None of the 2 rows without labels gains anything" in found.sentences[1]
    assert "not known: there are no per-image results" in found.sentences[0]


def test_labels_and_a_missing_zero_shot_result_are_said(write_run, steered):
    path = write_run("pass:B", 0.6, metrics=steered("pass", "train"))
    assert told(path.parent).sentences[1] == "What steering changed is not known: there is no zero-shot result of B."
    write_run("B", 0.5)
    (sentence,) = told(path.parent).sentences
    assert sentence.startswith("pass, which used labels (train), raises top-1 accuracy from 50.00 % to 60.00 %")
    path.unlink()
    assert told(path.parent) is None


def test_a_changed_file_is_never_the_best(write_run, steered):
    write_run("B", 0.5)
    write_run("vs2:B", 0.6, metrics=steered(alpha=1.05))
    path = write_run("vs2:B@alpha=3", 0.9, metrics={**steered(alpha=3), "vs2_results_digest": "0" * 16})
    assert not any("alpha=3" in sentence for sentence in told(path.parent).sentences)


def test_a_zero_shot_result_of_another_split_is_no_comparison(write_run, steered):
    write_run("B", 0.5)
    path = write_run("vs2:B", 0.6, metrics=steered(split="train"))
    assert told(path.parent).sentences[1].endswith("there is no zero-shot result of B of the same split.")


def test_seeds_are_said_with_their_spread(write_run, steered):
    write_run("B", 0.5)
    for seed in (0, 1):
        path = write_run(f"vs2:B@a-seed{seed}", 0.6 + seed / 50, metrics=steered(checkpoint=f"a-seed{seed}"))
    first, second = told(path.parent).sentences
    assert "by 11.00 points, on average over 2 seeds of the SAE (standard deviation 1.4)." in first
    assert second == "It used no labels."


def test_what_sees_other_test_images_is_told_apart(write_run, steered):
    write_run("B", 0.5)
    write_run("vs2:B", 0.55, metrics=steered(protocol="unlabeled"))
    write_run("stata:B", 0.7, metrics=steered("stata", protocol="transductive"))
    path = write_run("tda:B", 0.52, metrics=steered("tda", protocol="stream"))
    found = told(path.parent)
    assert found.best.label == "vs2" and found.short == "vs2 +5.00"
    assert found.sentences[2:] == (
        "Of those that see earlier test images, which is a different setting: tda, +2.00 points.",
        "Of those that see all test images at once, which is a different setting: stata, +20.00 points.",
    )
