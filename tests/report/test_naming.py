"""What rows are called."""

from pathlib import Path

import pytest

from vs2_plugin.report.naming import base_of, facts_of, label_of, same_but_for_the_seed, seed_of, written
from vs2_plugin.results.runs import Run


def run(model, **facts):
    metrics = {f"vs2_{name}": value for name, value in {"method": model.partition(":")[0], **facts}.items()}
    return Run(Path("a.json"), "d", model, "", "zeroshot_classification", "en", metrics)


@pytest.mark.parametrize(
    ("name", "base", "seed"),
    [
        ("digits-seed3", "digits", 3), ("clip-k8-seed12-pass0.5", "clip-k8-pass0.5", 12), ("mine", "mine", None),
        ("a-seedling", "a-seedling", None), ("a-seed1-b", "a-seed1-b", None), (7, "", None), (None, "", None),
    ],
)  # fmt: skip
def test_the_seed_stands_in_the_name_of_a_checkpoint(name, base, seed):
    one = run("vs2:B", checkpoint=name)
    assert (base_of(one), seed_of(one)) == (base, seed)
    assert seed_of(run("vs2:B", checkpoint=name, seed=5)) == 5


def test_seeds_are_joined_that_differ_in_nothing_else():
    first = same_but_for_the_seed(run("vs2:B@a-seed0@gate=0.9", checkpoint="a-seed0", k=8))
    assert first == same_but_for_the_seed(run("vs2:B@a-seed1@gate=0.9", checkpoint="a-seed1", k=8))
    for other in (
        run("vs2:B@a-seed1", checkpoint="a-seed1", k=8), run("vs2:B@a-seed1@gate=0.9", checkpoint="a-seed1", k=9),
        run("vs2:B@b-seed1@gate=0.9", checkpoint="b-seed1", k=8), run("pass:B@a-seed1@gate=0.9", checkpoint="a-seed1"),
    ):  # fmt: skip
        assert first != same_but_for_the_seed(other)


def test_labels_are_method_checkpoint_and_options():
    one = run("vs2:B@sae@gate=0.9@alpha=2", checkpoint="sae")
    assert label_of(one) == "vs2 @gate=0.9 @alpha=2" and label_of(one, "sae") == "vs2 @sae @gate=0.9 @alpha=2"
    assert label_of(one, "sae", {"gate", "checkpoint"}) == "vs2 @alpha=2"


def test_facts_say_size_seeds_and_the_strength_that_no_option_says():
    sae = {"k": 8, "latents": 512, "expansion": 4.0}
    seeds = [run("vs2:B@alpha=auto", checkpoint=f"c-0123abcd-seed{n}", alpha=n + 1, **sae) for n in (0, 1)]
    assert written(facts_of(seeds)) == "alpha 1 to 2, k 8, expansion 4, seeds 0, 1"
    assert written(facts_of([run("vs2:B@alpha=2", checkpoint="mine", alpha=2.0, k=8)])) == "checkpoint mine, k 8"
    assert written(facts_of([run("pass:B", k=8, latents=64, pass_weight=0.5)])) == "k 8, 64 latents, PASS weight 0.5"
    assert written(facts_of([run("rag:B", checkpoint="c-0123abcd-seed2")])) == ""  # has no SAE
