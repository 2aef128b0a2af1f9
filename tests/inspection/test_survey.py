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
    for row in rows:
        if row["kind"] != "dead":
            assert float(row["frequency"]) == pytest.approx(int(row["images"]) / IMAGES, rel=1e-4)
            assert int(row["top_images"]) == min(10, int(row["images"]))
            assert 0 < float(row["p_purity"]) <= 1 and row["class"] in CLASSES
            assert len(row["words"].split("; ")) == 3


def test_groups_are_what_they_are_said_to_be(subject):
    survey = survey_latents(subject("vs2"), limit=12)
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
