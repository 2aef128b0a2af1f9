"""All latents of an SAE, on a real checkpoint."""

import csv
import io

import numpy as np
import pytest
import torch

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.demo.digits import CLASSES
from vs2_plugin.errors import CheckpointError, HarnessError
from vs2_plugin.inspection.notes import NO_WORDS
from vs2_plugin.inspection.survey import survey_latents

from ..conftest import IMAGES
from .conftest import BLOCK


def test_the_table_of_latents(subject):
    survey = survey_latents(subject("vs2"), limit=12)
    rows = list(csv.DictReader(io.StringIO(survey.csv())))
    checkpoint = Store.default().find("local-dir-tiny-clip_wds-digits")
    sae, _ = checkpoint.sae(checkpoint.select()[0])
    code = sae.encode(torch.from_numpy(np.array(checkpoint.open_gallery().activations[BLOCK])).float())
    counts = np.bincount(code.indices[code.values > 0].numpy(), minlength=len(rows))
    assert [int(row["latent"]) for row in rows] == list(range(sae.config.num_latents))
    assert [int(row["images"]) for row in rows] == counts.tolist()
    dead = [row for row in rows if row["kind"] == "dead"]
    assert dict(survey.title)["dead"].startswith(f"{len(dead)} ") and all(row["purity"] == "" for row in dead)
    dense = torch.zeros(IMAGES, len(rows)).scatter_(1, code.indices, code.values).numpy()
    alive = [row for row in rows if row["kind"] != "dead"]
    for row, column in zip(alive, dense.T[counts > 0], strict=True):
        own = survey.statistics.classes[int(row["latent"])]
        votes = np.bincount(own[own >= 0])
        assert int(row["top_images"]) == votes.sum() == min(10, int(row["images"]))
        figures = [float(row[name]) for name in ("frequency", "mean_activation", "max_activation", "purity")]
        expected = [(column > 0).mean(), column[column > 0].mean(), column.max(), votes.max() / votes.sum()]
        assert figures == pytest.approx(expected, rel=1e-3) and row["class"] == CLASSES[votes.argmax()]
        by_chance = survey.statistics.purity_by_chance(int(row["latent"]))
        assert (float(row["chance_purity"]), float(row["p_purity"])) == pytest.approx(by_chance, rel=1e-3)
        assert len(row["words"].split("; ")) == 3
    often, even = counts / IMAGES, sae.config.k / len(rows)
    for kind, number in (("rare", (often[often > 0] < even / 10).sum()), ("dense", (often > 0.1).sum())):
        assert [row["kind"] for row in rows].count(kind) == number
        assert dict(survey.title)[kind].startswith(f"{number} ({number / len(rows):.1%})")
    assert f"{sae.config.k} are active in an image; k/n = {even:.3%}" in dict(survey.title)["latents"]
    assert f"{even / 10:.3%} of the images" in dict(survey.title)["rare"]
    pure = [float(row["purity"]) for row in alive if row["top_images"] == "10"]
    assert dict(survey.title)["purity"].startswith(f"{np.mean(pure):.1%} on average over {len(pure)} latents")


def test_groups_are_what_they_are_said_to_be(subject):
    survey = survey_latents(subject("vs2"), limit=12)
    first, second = sorted(card.latent for card in survey.groups[0].cards[:2])
    assert dict(survey.title)["to leave some out"] == f"latents:local-dir:tiny-clip@suppress={first}+{second}"
    assert [group.title.split()[0] for group in survey.groups] == ["Random", "Most", "Strongest", "Purest"]
    assert [len(group.cards) for group in survey.groups] == [3, 3, 3, 3]
    assert survey.groups[0].how.startswith(f"3 latents drawn evenly from the {(survey.kinds != 'dead').sum()} ")
    counts = [survey.statistics.counts[card.latent] for card in survey.groups[1].cards]
    assert counts == sorted(survey.statistics.counts, reverse=True)[:3]
    for card in survey.groups[3].cards:
        assert "purity 100% (10 of 10 are " in card.about and len(card.words) == 3
    assert len(survey_latents(subject("vs2"), limit=2).groups) == 2  # none is empty


def test_another_site_has_no_words(subject):
    survey = survey_latents(subject("vs2", "@blocks=2"), limit=4)
    assert dict(survey.title)["site"] == "block 2" and survey.problems == (NO_WORDS,)
    assert not any(survey.words) and next(csv.DictReader(io.StringIO(survey.csv())))["words"] == ""


@pytest.mark.parametrize(
    ("method", "options", "error", "fragment"),
    [
        ("rag", "", HarnessError, "does not steer along an SAE"),
        ("vs2", "@blocks=all", HarnessError, "steers at 2 sites.*@blocks=3"),
        ("vs2", "@bare", CheckpointError, "has no gallery of training images; train the checkpoint again"),
    ],
)
def test_what_cannot_be_surveyed_is_refused(subject, method, options, error, fragment):
    with pytest.raises(error, match=fragment):
        survey_latents(subject(method, options))
