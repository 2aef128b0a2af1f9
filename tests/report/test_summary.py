"""Results side by side: what is compared with what, and which settings make a curve."""

import numpy as np
import pytest

from vs2_plugin.report.summary import summarise
from vs2_plugin.results.runs import read


def group_of(*paths):
    (section,) = summarise(read(paths)[0])
    (group,) = section.groups
    return group


def test_rows_are_compared_with_zero_shot_of_their_backbone_and_weights(write_run, steered):
    for folder, pretrained, accuracy in (("one", "laion", 0.4), ("two", "openai", 0.5)):
        write_run("B", accuracy, folder=folder, pretrained=pretrained)
        paths = write_run("vs2:B", 0.6, folder=folder, pretrained=pretrained, metrics=steered()).parent.parent
    write_run("vs2:L", 0.7, folder="one", metrics=steered())
    (section,) = summarise(read([paths])[0])
    changes = {(group.backbone, group.pretrained): group.steered[0].change for group in section.groups}
    assert changes["B", "laion"] == pytest.approx(0.2) and changes["B", "openai"] == pytest.approx(0.1)
    assert changes["L", "laion"] is None


def test_a_tag_says_nothing_where_the_weights_come_with_the_name(write_run, steered):
    write_run("local-dir:tiny", 0.4, pretrained="laion400m_e32")
    group = group_of(write_run("vs2:local-dir:tiny", 0.6, pretrained="", metrics=steered()).parent)
    assert group.title == "local-dir:tiny" and group.steered[0].change == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("model", "dataset", "expected"),
    [("local-dir:a/tiny-clip/", "wds/digits", True), ("local-dir:tiny-clip", "wds/animals", False),
     ("local-dir:mine", "wds/digits", False), ("tiny-clip", "wds/digits", False)],
)  # fmt: skip
def test_the_demo_alone_is_a_stand_in(write_run, model, dataset, expected):
    assert group_of(write_run(model, name="x", dataset=dataset)).is_stand_in is expected


def test_data_sets_languages_and_tasks_are_kept_apart(write_run):
    write_run("B", name="1")
    write_run("B", name="2", dataset="cub")
    write_run("B", name="3", dataset="cub", language="de")
    path = write_run("B", name="4", dataset="cub", task="zeroshot_retrieval", metrics={"image_retrieval_recall@5": 0.5})
    sections = summarise(read([path.parent])[0])
    assert [section.title for section in sections] == ["cub", "cub (de)", "wds/animals"]
    assert [len(section.groups) for section in sections] == [1, 1, 1]
    assert [run.task for run in sections[0].others["zeroshot_retrieval"]] == ["zeroshot_retrieval"]


def test_a_pair_is_that_of_a_loop_over_images(write_run, make_images, steered):
    before, after = make_images(0.5, 1), make_images(0.6, 2, sae=True)
    after["prediction"][:50] = (after["prediction"][:50] + 1) % 6
    group = group_of(write_run("B", images=before), write_run("vs2:B", images=after, metrics=steered()))
    (row,) = group.steered
    was = {int(d): p == t for d, p, t in zip(before["digest"], before["prediction"], before["target"], strict=True)}
    now = {int(d): p == t for d, p, t in zip(after["digest"], after["prediction"], after["target"], strict=True)}
    assert row.mended == sum(now[d] and not was[d] for d in now)
    assert row.broken == sum(was[d] and not now[d] for d in now)
    assert row.change == pytest.approx((row.mended - row.broken) / 600)
    assert row.change_interval.low < row.change < row.change_interval.high
    assert row.interval.low < row.top1 < row.interval.high
    assert sum(change.mended for change in row.classes) == row.mended
    assert len(row.bins) == 10


def test_other_images_or_classes_are_not_paired(write_run, make_images, steered):
    zero = write_run("B", images=make_images(0.5))
    fewer = write_run("vs2:B", images=make_images(0.6, count=500, sae=True), metrics=steered())
    renamed = write_run("vs2:B@gamma=2", images=make_images(0.6, classes=list("uvwxyz")), metrics=steered(gamma=2))
    for row in group_of(zero, fewer, renamed).steered:
        assert row.pairing is row.mended is row.change_interval is None
        assert row.classes == row.bins == []
        assert row.interval is not None and row.change is not None


FIGURES = ("change", "change_interval", "mended", "broken", "ece", "ece_before", "classes")


def test_a_run_that_recorded_the_plain_model_needs_none_beside_it(write_run, make_images, steered):
    zero = write_run("B", images=make_images(0.5, 1))
    runs = [
        write_run(
            f"vs2:B@gamma={seed}", images=make_images(0.6, seed, sae=True, before=0.5), metrics=steered(gamma=seed)
        )
        for seed in (2, 3)
    ]
    first = write_run("other:B", images=make_images(0.7, 4), metrics=steered("other"))  # compares with what others know
    told = [group_of(zero, first, *runs), group_of(first, *runs)]
    for with_zero, alone in zip(*(group.rows for group in told), strict=True):
        assert with_zero.label == alone.label
        for name in FIGURES:
            assert getattr(with_zero, name) == getattr(alone, name), name
        assert with_zero.top1 == alone.top1 and with_zero.interval == alone.interval
    row = told[1].steered[0]
    assert row.mended > 0 and row.ece != row.ece_before and told[1].zero.ece == row.ece_before


def test_what_a_run_recorded_goes_before_a_plain_model_of_other_images(write_run, make_images, steered):
    zero = write_run("B", images=make_images(0.1, count=500))
    images = make_images(0.6, 1, sae=True, before=0.5)
    group = group_of(zero, write_run("vs2:B", images=images, metrics=steered()))
    (row,) = group.steered
    right, was = (images[name] == images["target"] for name in ("prediction", "plain_prediction"))
    assert group.zero.run.path == zero and row.pairing.prediction.tolist() == images["plain_prediction"].tolist()
    assert (row.mended, row.broken) == (sum(right & ~was), sum(was & ~right))
    assert row.change == pytest.approx(right.mean() - was.mean())


def test_without_per_image_results_the_metrics_tell(write_run, steered):
    facts = steered(mended=30, broken=20, ece=0.25, ece_before=0.5)
    (row,) = group_of(write_run("B"), write_run("vs2:B", metrics=facts)).steered
    assert (row.mended, row.broken, row.ece, row.ece_before, row.pairing) == (30, 20, 0.25, 0.5, None)
    damaged = steered(mended=float("nan"), broken=True, ece=[1], ece_before="0.1")
    (row,) = group_of(write_run("vs2:B", name="damaged", metrics=damaged)).steered
    assert row.mended is row.broken is row.ece is row.ece_before is None


def test_results_of_other_prompts_are_not_compared_with_each_other(write_run, make_images, steered):
    """As of a single prompt and of an ensemble: a steered run is compared with zero-shot of its own prompts."""
    write_run("B", images=make_images(0.4, 1), name="single")
    write_run("B", images=make_images(0.5, 2), name="ensemble")
    write_run("vs2:B", images=make_images(0.6, 3, sae=True, before=0.4), metrics=steered(), name="vs2-single")
    write_run("vs2:B", images=make_images(0.65, 4, sae=True, before=0.5), metrics=steered(), name="vs2-ensemble")
    write_run("vs2:B", images=make_images(0.7, 5, sae=True, before=0.3), metrics=steered(), name="vs2-alone")
    path = write_run("vs2:B@gamma=9", 0.9, metrics=steered(gamma=9), name="unknown")
    (section,) = summarise(read([path.parent])[0])
    found = {group.title: (group.zero, group.steered) for group in section.groups}
    assert set(found) == {
        *(f"B, laion, zero-shot {accuracy:.2f} %" for accuracy in ACCURACIES),
        "B, laion",
    }
    names = [[row.run.path.stem for row in rows] for _, rows in found.values()]
    assert names == [["vs2-ensemble"], ["vs2-single"], ["vs2-alone"], ["unknown"]]
    for (zero, (row,)), name in zip(found.values(), ("ensemble", "single", "vs2-alone"), strict=False):
        assert zero.run.path.stem == name
        assert row.change == pytest.approx(row.top1 - zero.top1) and row.mended > 0
    assert found["B, laion"][0] is None and found["B, laion"][1][0].change is None


#: Of the three zero-shot results above, in percent.
ACCURACIES = (49.5, 39.0, 28.83)


def test_without_predictions_other_prompts_are_told_by_accuracies_and_folders(write_run, make_images, steered):
    for folder, before, after in (("one", 0.47, 0.6), ("two", 0.46, 0.7)):
        write_run("B", before, folder=folder)
        path = write_run("vs2:B", after, folder=folder, metrics=steered())
    sections = summarise(read([path.parent.parent])[0])
    changes = [row.change for group in sections[0].groups for row in group.steered]
    assert sorted(changes) == pytest.approx([0.13, 0.24])
    write_run("B", 0.2, folder="two", name="again")  # now nothing tells whose the second folder's is
    groups = summarise(read([path.parent.parent])[0])[0].groups
    changes = [row.change for group in groups for row in group.steered]
    assert None in changes and [change for change in changes if change is not None] == pytest.approx([0.13])


def test_a_few_other_predictions_are_not_other_prompts(write_run, make_images, steered):
    """So much changes with the batch size and under autocast. A run is compared with what it recorded itself."""
    zero, images = make_images(0.5, 1), make_images(0.6, 2, sae=True, before=0.5)
    images["plain_prediction"][:6] = (images["plain_prediction"][:6] + 1) % 6
    group = group_of(write_run("B", images=zero), write_run("vs2:B", images=images, metrics=steered()))
    (row,) = group.steered
    assert group.zero.run.path.stem == "B" and row.zero.path.stem == "vs2:B"
    right = images["plain_prediction"] == images["target"]
    assert row.change == pytest.approx(row.top1 - right.mean())


def test_results_without_images_are_compared_with_zero_shot_of_their_folder(write_run, make_images, steered):
    """Plain results of other images stand beside each other, as those of two splits do."""
    for folder, count, accuracy in (("one", 600, 0.5), ("two", 200, 0.7)):
        write_run("B", images=make_images(accuracy, count=count), folder=folder)
        write_run("vs2:B", 0.9, folder=folder, metrics=steered())
    other = write_run("vs2s:B", 0.9, folder="three", metrics=steered("vs2s"))
    group = group_of(other.parent.parent)
    before = {row.run.path.parent.name: row.zero and row.zero.path.parent.name for row in group.steered}
    assert before == {"one": "one", "two": "two", "three": None}


def test_results_of_two_splits_are_not_compared_with_each_other(write_run, steered):
    write_run("B", 0.4, folder="train", metrics={"vs2_split": "train"})
    write_run("vs2:B@alpha=1", 0.5, folder="train", metrics=steered(split="train", alpha=1))
    write_run("B", 0.7, folder="test")
    path = write_run("vs2:B@alpha=1", 0.75, folder="test", metrics=steered(alpha=1))
    (section,) = summarise(read([path.parents[1]])[0])
    titles = [group.title for group in section.groups]
    assert titles == [f"B, laion, zero-shot {which}" for which in ("70.00 %", "40.00 %, split train")]
    rows = [row for group in section.groups for row in group.steered]
    assert [round(row.change, 4) for row in rows] == [0.05, 0.1] and rows[1].about == "split train"
    write_run("vs2:B@alpha=2", 0.8, folder="alone", metrics=steered(alpha=2))
    path = write_run("B", 0.4, folder="alone", metrics={"vs2_split": "train"})
    (row,) = group_of(path.parent).steered
    assert row.change is None  # only the train split's plain result is there
    write_run("B", 0.7, folder="other")  # without a split: of the test images
    path = write_run("vs2:B@alpha=2", 0.8, folder="other", metrics=steered(split="train", alpha=2))
    (row,) = group_of(path.parent).steered
    assert row.change is None
    write_run("B", 0.704, folder="third", metrics={"vs2_split": "train"})
    (row,) = group_of(path.parent, path.parents[1] / "third").steered
    assert row.change == pytest.approx(0.096)  # the only one of that split


def test_seeds_of_other_images_are_no_mean(write_run, make_images, steered):
    write_run("B", images=make_images(0.5))
    for seed in (0, 1):
        path = write_run(f"vs2:B@mine-seed{seed}", images=make_images(0.6, seed), metrics=steered(
            checkpoint=f"mine-seed{seed}", seed=seed))  # fmt: skip
    assert [len(row.members) for row in group_of(path.parent).steered] == [2]
    write_run("vs2:B@mine-seed2", images=make_images(0.6, count=300), metrics=steered(
        checkpoint="mine-seed2", seed=2))  # fmt: skip
    assert [len(row.members) for row in group_of(path.parent).steered] == [1, 1, 1]


def test_calibration_is_read_from_the_metrics_where_images_were_not_kept(write_run, steered):
    bins = {"ece_bins": [[150, 0.31, 0.4], [450, 0.95, 0.7]], "ece_before_bins": [[600, 0.5, 0.52]]}
    facts = steered(ece=0.2, ece_before=0.02, seconds=12.5, peak_memory=3e9, **bins)
    (row,) = group_of(write_run("vs2:B", metrics=facts)).steered
    assert (row.run.seconds, row.run.peak_memory) == (12.5, 3e9)
    assert row.calibration.share[[4, 14]].tolist() == [0.25, 0.75] and row.calibration.share.sum() == 1
    assert row.calibration.accuracy[[4, 14]].tolist() == [0.4, 0.7] and np.isnan(row.calibration.accuracy[0])
    assert row.calibration_before.confidence[7] == 0.5 and (row.ece, row.ece_before) == (0.2, 0.02)
    for damaged in ([], [[1, 2]], "x", [[0, 0.5, 0.5]], [["a", 0.5, 0.5]]):
        (row,) = group_of(write_run("vs2:B", metrics=steered(ece=0.2, ece_bins=damaged))).steered
        assert row.calibration is None and row.ece == 0.2


def test_confidences_that_are_all_one_have_no_calibration(write_run, make_images, steered):
    images = make_images(0.6, 1, before=0.5) | {"confidence": np.ones(600, np.float32)}
    facts = steered("knn", ece=0.4, ece_bins=[[600, 1.0, 0.6]])
    (row,) = group_of(write_run("knn:B", images=images, metrics=facts)).steered
    assert row.calibration is None and row.ece is None and row.ece_before is not None
    (row,) = group_of(write_run("knn:B@n=3", metrics=facts)).steered
    assert row.calibration is None and row.ece is None


def test_zero_shot_with_per_image_results_is_preferred(write_run, make_images):
    path = write_run("B", images=make_images(0.5), name="2")
    write_run("B", read([path])[0][0].number("acc1") + 0.004, name="1")  # as under autocast
    group = group_of(path.parent)
    assert group.zero.run.path == path
    assert [row.title for row in group.rows] == ["zero-shot (results/2.json)", "zero-shot (results/1.json)"]


def test_order_and_labels(results):
    group = group_of(results)
    assert [row.label for row in group.rows][:4] == ["zero-shot", "vs2", "vs2 @gate=0.9", "vs2 @gate=0.99"]
    assert [row.run.labels for row in group.rows][-2:] == ["train", "oracle"]
    assert [row.label for row in group.methods] == ["vs2", "selective @n=10", "pass", "other"]


def test_curves_join_results_that_differ_in_one_setting(results):
    curves = group_of(results).curves()
    assert {*curves} == {"alpha", "gate", "n"}
    (gate,) = curves["gate"]
    assert gate.label == "vs2" and [value for value, _ in gate.points] == [0.9, 0.99, None]
    (alpha,) = curves["alpha"]
    assert [value for value, _ in alpha.points] == [0.5, 1.0, 1.05, 2.0]
    assert [value for value, _ in curves["n"][0].points] == [10, 50]


def test_curves_of_methods_without_lambda_and_of_saes_with_another_k(write_run, steered):
    for gamma in (0, -1, 1.5):
        path = write_run(f"amp:B@gamma={gamma}", metrics=steered("amp", gamma=gamma))
    for k in (32, 64):
        write_run(f"vs2:B@sae-{k}", metrics=steered(checkpoint=f"sae-{k}", k=k))
    curves = group_of(path.parent).curves()
    assert {*curves} == {"gamma", "k"}
    assert [value for value, _ in curves["gamma"][0].points] == [-1, 0, 1.5]
    assert [value for value, _ in curves["k"][0].points] == [32, 64]


def test_a_curve_joins_results_of_the_same_seeds(write_run, steered):
    write_run("B", 0.5)
    for alpha, seeds in ((1, (0, 1, 2)), (2, (0, 1, 2)), (3, (2,)), (4, (2,))):
        for seed in seeds:
            facts = steered(alpha=alpha, seed=seed, checkpoint=f"a-seed{seed}")
            path = write_run(f"vs2:B@a-seed{seed}@alpha={alpha}", 0.5 + seed / 10, metrics=facts)
    curves = {curve.label: [*zip(*curve.points)] for curve in group_of(path.parent).curves()["alpha"]}
    assert {*curves} == {"vs2, seeds 0, 1, 2", "vs2, seed 2"}
    assert curves["vs2, seeds 0, 1, 2"][0] == (1, 2) and curves["vs2, seed 2"][0] == (3, 4)
    assert [row.top1 for row in curves["vs2, seeds 0, 1, 2"][1]] == [pytest.approx(0.6)] * 2


def test_a_curve_is_of_one_state_of_a_checkpoint(write_run, steered):
    for alpha, digest in ((0, "ab" * 8), (1, "cd" * 8), (2, "ab" * 8), (3, "cd" * 8)):
        facts = steered(alpha=alpha, checkpoint="mine", checkpoint_digest=digest)
        path = write_run(f"vs2:B@alpha={alpha}", 0.5 + alpha / 100, metrics=facts)
    curves = {curve.label: [value for value, _ in curve.points] for curve in group_of(path.parent).curves()["alpha"]}
    assert curves == {"vs2, checkpoint's digest abababab": [0, 2], "vs2, checkpoint's digest cdcdcdcd": [1, 3]}


def test_two_folders_with_one_setting_are_two_curves_and_otherwise_one(write_run, steered):
    for folder, strengths in (("x", (1, 2)), ("y", (2, 3)), ("z", (4,))):
        for alpha in strengths:
            path = write_run(f"vs2:B@alpha={alpha}", metrics=steered(alpha=alpha), folder=folder)
    root = path.parents[1]
    found = {curve.label: [value for value, _ in curve.points] for curve in group_of(root).curves()["alpha"]}
    assert found == {f"vs2, {root.name}/x": [1, 2], f"vs2, {root.name}/y": [2, 3]}
    (curve,) = group_of(root / "x", root / "z").curves()["alpha"]
    assert (curve.label, [value for value, _ in curve.points]) == ("vs2", [1, 2, 4])


def test_a_strength_that_was_chosen_automatically_is_no_point_of_a_curve(write_run, steered):
    write_run("B")
    for alpha in np.arange(1, 20) / 4:
        write_run(f"vs2:B@alpha={alpha}", metrics=steered(alpha=float(alpha)))
    path = write_run("vs2:B@alpha=auto", metrics=steered(alpha=8.0) | {"vs2_auto": "alpha"})
    group = group_of(path.parent)
    (curve,) = group.curves()["alpha"]
    assert max(value for value, _ in curve.points) == 4.75
    assert [row.label for row in group.main] == ["zero-shot", "vs2 @alpha=0.25", "vs2 @alpha=auto"]


def test_results_that_differ_in_two_settings_make_no_curve(write_run, steered):
    write_run("vs2:B@gate=0.9", metrics=steered(gate=0.9))
    path = write_run("vs2:B@other@gate=0.99", metrics=steered(gate=0.99, checkpoint="other"))
    assert group_of(path.parent).curves() == {}


def test_pseudo_labels_are_another_setting_although_they_read_no_label(write_run, steered):
    for options in ("@mix=0.3", "@mix=0.7", "@labels=pseudo@mix=0.3", "@labels=pseudo@mix=0.7"):
        path = write_run(f"rag:B{options}", metrics=steered("rag", mix=float(options[-3:])))
    found = {curve.label: [value for value, _ in curve.points] for curve in group_of(path.parent).curves()["mix"]}
    assert found == {"rag": [0.3, 0.7], "rag @labels=pseudo": [0.3, 0.7]}


def test_the_grid_holds_every_pair_of_gamma_and_lambda(results):
    ((label, cells),) = group_of(results).grids()
    assert label == "vs2"
    assert {*cells} == {(1.5, 2.1), *((gamma, lam) for gamma in (1.5, 2.0) for lam in (1.0, 2.0))}


def test_many_rows_leave_the_accuracy_figure_to_those_that_no_curve_shows(write_run, steered):
    write_run("B")
    for alpha in np.arange(1, 20) / 4:
        path = write_run(f"vs2:B@alpha={alpha}", metrics=steered(alpha=float(alpha)))
    write_run("other:B", metrics=steered("other"))
    group = group_of(path.parent)
    assert [row.label for row in group.main] == ["zero-shot", "vs2 @alpha=0.25", "other"]


def test_rows_stand_by_what_they_saw(write_run, steered):
    write_run("B", 0.5)
    write_run("a:B", 0.9, metrics=steered("a", protocol="transductive"))
    write_run("b:B", 0.6, metrics=steered("b", protocol="unlabeled"))
    write_run("c:B", 0.7, metrics=steered("c", "train", protocol="transductive"))
    path = write_run("d:B", 0.4, metrics=steered("d", protocol="image"))
    kinds = group_of(path.parent).kinds
    assert {kind: [row.label for row in rows] for kind, rows in kinds.items()} == {
        "": ["zero-shot"], "image": ["d"], "unlabeled": ["b"], "transductive": ["a"], "train": ["c"]
    }  # fmt: skip
    assert [*kinds] == ["", "image", "unlabeled", "transductive", "train"]
