"""Models of transformers in all commands: trained on, evaluated, swept, shown."""

import json
import re
import shutil

import pytest
from PIL import Image

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import main, train_sae

from ..clip import library
from .conftest import at, few_digits, metrics

DATA = ("--dataset", "wds/few", "--dataset_root", "few", "--num_workers", "0", "--no_amp")
SHORT = ("--samples", "1000", "--quiet")


@pytest.fixture(scope="module")
def made(workplace, tmp_path_factory):
    """A folder with a hundred digits of each split, the tiny CLIP, the same as a model of transformers, and SAEs on two
    of its blocks."""
    folder = shutil.copytree(workplace, tmp_path_factory.mktemp("library") / "place")
    few_digits(folder, "few", 0, count=100)
    library.write_tiny(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        at(folder, patch)
        assert train_sae.main(["--model", "hf:./tiny", *DATA, *SHORT, "--blocks", "1", "last"]) == 0
    return folder


@pytest.fixture
def place(made, monkeypatch):
    """Work in that folder, with its store."""
    at(made, monkeypatch)
    return made


def results(place, model, pretrained=""):
    return metrics(place / f"few_{pretrained}_{model}_en_zeroshot_classification.json")


def test_a_clip_is_evaluated_by_the_stock_command(place, clip_benchmark):
    checkpoint = Store.default().find("hf-tiny_wds-few")
    assert checkpoint.created["transformers"] and "model_revision" not in checkpoint.created
    assert (checkpoint.backbone, checkpoint.sites[-1].hookpoint) == ("hf:./tiny", "visual.transformer.resblocks.3")
    models = ["hf:./tiny", "vs2:hf:./tiny", "vs2:hf:./tiny@hf-tiny_wds-few@alpha=0", "vs2pp:hf:./tiny@blocks=1"]
    models += ["local-dir:tiny-clip"]
    code, error = clip_benchmark("eval", "--model", *models, "--pretrained", "openai", *DATA, "--quiet")
    assert code == 0, error
    plain, steered, unsteered, *_ = (results(place, model.replace("/", "-")) for model in models[:4])
    assert {name: unsteered[name] for name in plain} == plain == results(place, models[4], "openai")
    assert steered["acc1"] != plain["acc1"] and steered["vs2_checkpoint"] == "hf-tiny_wds-few"
    file = place / "few__vs2:hf:.-tiny_en_zeroshot_classification.json"
    assert {"model": "vs2:hf:./tiny", "pretrained": ""}.items() <= json.loads(file.read_text()).items()
    code, error = clip_benchmark("eval", "--model", "hf:./tiny", "--model_type", "vs2", *DATA, "--output", "typed.json")
    assert code == 0 and metrics(place / "typed.json") == steered, error


def test_a_sweep_gives_the_same_numbers_in_files_of_the_same_names(place, clip_benchmark):
    models, words = ("vs2:hf:./tiny", "vs2:hf:./tiny@blocks=1"), (*DATA, "--quiet", "--output")
    (place / "evaluated").mkdir()
    assert main.main(["sweep", "--model", *models, *words, "swept/{pretrained}{model}.json"]) == 0
    assert clip_benchmark("eval", "--model", *models, *words, "evaluated/{pretrained}{model}.json")[0] == 0
    for file in (place / "evaluated").iterdir():
        assert metrics(place / "swept" / file.name) == metrics(file)


def test_it_is_loaded_in_python_and_told_in_the_card_and_by_the_doctor(place, tmp_path, capsys):
    words = {"dataset": "wds/few", "classes": ["one", "two"], "amp": False}
    model, _, tokenizer = vs2_plugin.load("vs2:hf:./tiny", **words)
    found = model.classify(Image.new("L", (8, 8)))
    assert found.probabilities.shape == (1, 2) and tokenizer("one").shape == (1, 16)
    card = (model.checkpoint.save(tmp_path / "copy").folder / "README.md").read_text()
    assert "`hf:./tiny` was a folder on the machine" in card and "base_model" not in card
    main.main(["doctor"])
    assert "hf-tiny_wds-few: 75 images" in capsys.readouterr().out


def test_a_siglip_is_steered_at_its_output(place, clip_benchmark):
    library.write_siglip(place / "siglip")
    assert train_sae.main(["--model", "hf:siglip", *DATA, *SHORT]) == 0
    models = ("hf:siglip", "vs2:hf:siglip@alpha=0", "rec:hf:siglip")
    assert clip_benchmark("eval", "--model", *models, *DATA, "--quiet", "--output", "{model}.json")[0] == 0
    plain, unsteered, steered = (metrics(place / f"{model}.json") for model in models)
    assert {name: unsteered[name] for name in plain} == plain and steered["vs2_site"] == "visual"


WRONG = [
    (("hf:./nowhere",), "'hf:./nowhere': no folder nowhere; expected one that save_pretrained wrote"),
    (("ViT-B-32", "vs2:hf:./nowhere"), "'hf:./nowhere': no folder nowhere"),
    (
        ("hf:./tiny@alpha=1",),
        "it contains an '@', but no steering method comes before it; expected .*, for example vs2:hf:./tiny",
    ),
    (("vs2:hf:./tiny@none",), "no SAE checkpoint 'none' in the store"),
    (("vs2:hf:",), "is not the name of a model; expected"),
]


@pytest.mark.parametrize(("models", "message"), WRONG)
def test_mistakes_are_told_before_anything_is_loaded(models, message, place, clip_benchmark):
    code, error = clip_benchmark("eval", "--model", *models, "--pretrained", "", *DATA)
    last = error.splitlines()[-1]
    assert code == 2 and last.startswith("vs2: error: ") and re.search(message, last), last


def test_a_model_without_a_checkpoint_is_told_the_command(place, clip_benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "empty"))
    code, error = clip_benchmark("eval", "--model", "vs2:hf:./tiny", *DATA)
    assert code == 2 and "no SAE checkpoint for hf:./tiny on wds/few in the store" in error
    assert "train it with: vs2-train-sae --model hf:./tiny --dataset wds/few --dataset_root few --no_amp" in error


def test_the_commit_of_a_repository_is_kept_with_the_checkpoint(hub, place, capsys):
    commit = hub.commit("org/tiny", {path.name: path.read_bytes() for path in (place / "tiny").iterdir()})
    assert train_sae.main(["--model", "hf:org/tiny", *DATA, "--samples", "1000"]) == 0
    assert Store.default().find("hf-org-tiny_wds-few").created["model_revision"] == commit
    said = "evaluate with: clip_benchmark eval --model hf:org/tiny vs2:hf:org/tiny --dataset wds/few --dataset_root few"
    assert said in capsys.readouterr().out
