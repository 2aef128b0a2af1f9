"""Rows, and the mean over the seeds of an SAE."""

import numpy as np
import pytest

from vs2_plugin.report.summary import summarise
from vs2_plugin.results.runs import read


def group_of(folder):
    ((group,),) = (section.groups for section in summarise(read([folder])[0]))
    return group


@pytest.fixture
def three_seeds(write_run, make_images, steered):
    """A folder with zero-shot, one method with three seeds, and the images of these."""
    write_run("B", images=make_images(0.5, 9))
    found = []
    for seed, accuracy in enumerate((0.58, 0.62, 0.66)):
        found.append(make_images(accuracy, seed, sae=True))
        facts = steered(checkpoint=f"mine-seed{seed}", k=8, latents=64, alpha=1.05, mended=1)
        path = write_run(f"vs2:B@mine-seed{seed}", images=found[-1], metrics=facts)
    return path.parent, found


def test_seeds_are_one_row_with_mean_and_spread(three_seeds):
    folder, images = three_seeds
    group = group_of(folder)
    zero, row = group.rows
    assert [one.run.model for one in row.seeds] == [f"vs2:B@mine-seed{n}" for n in range(3)]
    accuracies = [(one["prediction"] == one["target"]).mean() for one in images]
    assert row.top1 == pytest.approx(np.mean(accuracies)) and row.spread == pytest.approx(np.std(accuracies, ddof=1))
    assert row.change == pytest.approx(row.top1 - zero.top1)
    assert (row.mended - row.broken) / 600 == pytest.approx(row.change)
    assert row.label == "vs2" and group.common == "checkpoint mine, k 8, 64 latents, seeds 0, 1, 2"
    assert [one.title for one in row.members] == [f"vs2 (alpha 1.05, seed {n})" for n in range(3)]
    assert row.number("acc5") == pytest.approx(0.9) and row.number("vs2_gate") is None
    assert row.run is row.members[0].run and len(group.results) == 4


def test_the_interval_of_a_mean_is_over_images_whatever_the_order_of_each_run(three_seeds):
    folder, images = three_seeds
    row = group_of(folder).rows[1]
    by_image = [dict(zip(one["digest"].tolist(), one["prediction"] == one["target"], strict=True)) for one in images]
    means = np.array([np.mean([run[digest] for run in by_image]) for digest in by_image[0]])
    half = 1.96 * means.std() / 600**0.5
    assert row.interval.low == pytest.approx(row.top1 - half, abs=0.004)
    assert row.interval.high == pytest.approx(row.top1 + half, abs=0.004)
    assert row.change_interval.low < row.change < row.change_interval.high


def test_without_images_a_mean_has_no_interval_and_a_seed_twice_is_no_mean(write_run, steered):
    write_run("B", 0.5)
    for seed in (0, 1):
        write_run(f"vs2:B@a-seed{seed}", 0.6 + seed / 10, metrics=steered(checkpoint=f"a-seed{seed}"))
        path = write_run("amp:B@a-seed0", 0.6, name=f"again-{seed}", metrics=steered("amp", checkpoint="a-seed0"))
    _, row, *others = group_of(path.parent).rows
    assert row.top1 == pytest.approx(0.65) and row.interval is row.change_interval is row.mended is None
    assert [len(one.members) for one in others] == [1, 1]
    assert [one.title for one in others] == [f"amp (checkpoint a-seed0, results/again-{n}.json)" for n in (0, 1)]


def test_rows_stand_by_labels_and_then_by_change(write_run, steered):
    write_run("B", 0.5)
    for name, accuracy, labels in (("a", 0.4, "none"), ("b", 0.9, "oracle"), ("c", 0.7, "none"), ("d", 0.6, "train")):
        path = write_run(f"{name}:B", accuracy, metrics=steered(name, labels))
    group = group_of(path.parent)
    assert [row.label for row in group.table] == ["zero-shot", "c", "a", "d", "b"]
    assert {kind: len(rows) for kind, rows in group.kinds.items()} == {"": 1, "unlabeled": 2, "train": 1, "oracle": 1}


def test_a_checkpoint_without_a_seed_is_no_seed_of_another(write_run, steered):
    for name in ("a", "a-seed1"):
        path = write_run(f"vs2:B@{name}", metrics=steered(checkpoint=name))
    assert [len(row.members) for row in group_of(path.parent).rows] == [1, 1]
