"""Model cards."""

import re
from dataclasses import replace

import pytest
import yaml

from vs2_plugin.checkpoint.card import card
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData

FIGURES = {"k": 32, "expansion_factor": 4, "dead": 0.125, "dense": 0.0625, "lr": 0.003, "seed": 7}
SITE = SiteSAE("visual.transformer.resblocks.11", "plain", "none", 8, [0.0] * 8, 0.25, {}, FIGURES, {})
DATA = TrainingData(("cifar100",), 50_000, ("train",))


def made(name="hf:me/sae", backbone="ViT-B-32", pretrained="laion2b_s34b_b79k", data=DATA, sites=(SITE,), **changes):
    text = card(name, backbone, pretrained, data, sites, changes.get("gallery"), changes.get("license"))
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_head_is_what_hubs_read():
    head, _ = made(license="cc-by-4.0")
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "vs2-plugin"
    assert head["base_model"] == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert "sparse-autoencoder" in head["tags"]
    assert made()[0]["license"] == "unknown"


def test_the_body_tells_tower_data_figures_and_use():
    _, body = made()
    assert "# me/sae\n" in body and "`ViT-B-32, laion2b_s34b_b79k`" in body
    assert "Trained on 50,000 images of cifar100 (`train`)" in body
    assert "| `visual.transformer.resblocks.11` | 8 | 32 | 32 | 75.0% | 12.5% | 6.2% | none |" in body
    assert "lr `0.003`, seed `7`" in body
    use = "--model ViT-B-32 vs2:ViT-B-32@hf:me/sae --pretrained laion2b_s34b_b79k --dataset cifar100\n"
    assert f"clip_benchmark eval {use}" in body
    assert "find none here" in body and "transductive" not in body.lower()


@pytest.mark.parametrize("name", ["folder/pics", "wds/mine"])
def test_its_command_asks_for_the_folder_of_data_that_are_not_found_by_name(name):
    _, body = made(data=replace(DATA, datasets=(name,), folders=("/home/me/pics",)))
    assert f"--dataset {name} --dataset_root DIR\n" in body and "/home/me" not in body


def test_what_is_left_of_predictions_is_told_where_it_was_measured():
    about = {"agreement": 0.875, "recovered_on": "90 images, with 10 classes of a|b"}
    known, kept = (replace(SITE, training={**FIGURES, **told}) for told in ({"recovered": 0.912, **about}, about))
    _, body = made(sites=[known, SITE])
    assert "| dense latents | accuracy recovered | predictions kept | labels used |" in body
    assert "| 6.2% | 91.2% | 87.5% | none |" in body and "| 6.2% | ? | ? | none |" in body
    assert "labels were read" in body and r"stays the same: of 90 images, with 10 classes of a\|b." in body
    _, body = made(sites=[kept])
    assert "| 6.2% | 87.5% | none |" in body and "recovered" not in body and "labels were read" not in body
    assert "recovered" not in made()[1] and "predictions kept" not in made()[1]


def test_its_python_is_python():
    _, body = made(backbone="hf-hub:me/clip", pretrained="")
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "vs2:hf-hub:me/clip@hf:me/sae" in code


def test_what_a_checkpoint_does_not_know_is_left_open():
    bare = replace(SITE, training={}, variant="pass", labels="train", fvu=1.5)
    _, body = made(sites=[bare], data=replace(DATA, transductive=True))
    assert "| ? | ? | -50.0% | ? | ? | train |" in body and "Transductive" in body and "for `pass:`" in body
    assert "Useless at `visual.transformer.resblocks.11.pass`: its FVU is 1.5" in body
    head, body = made(backbone="", pretrained="", data=TrainingData(("activations",), 9, ("given",)))
    assert "base_model" not in head and "cannot steer one" in body and "clip_benchmark eval" not in body


@pytest.mark.parametrize("name", ["a|b", "a`b", "<script>", "a\nb", "# x"])
def test_names_cannot_write_the_card(name):
    _, body = made(data=TrainingData((name,), 9, (name,)))
    assert sum(line.startswith("#") for line in body.splitlines()) == 2
    prose, usual = (re.sub(r"\\.", "", text.partition("```sh")[0]) for text in (body, made()[1]))
    assert prose.count("|") == usual.count("|") and "<" not in prose.replace("`<script>`", "")
