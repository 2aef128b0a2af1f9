"""The stock command, and this package's, with a GPU: its figures are those of the CPU."""

import json
import shutil

import pytest

from vs2_plugin.cli import main

from ..harness.conftest import digits_with_captions
from .conftest import DATA, NAME, TINY, needs_gpu

pytestmark = pytest.mark.gpu

MODELS = (TINY, f"vs2:{TINY}", f"vs2s:{TINY}", f"vs2pp:{TINY}@n=10", f"pass:{TINY}@gate=0.9", f"proto:{TINY}")
#: Of 225 images, those that rounding may decide.
FEW, SOME = 2 / 225, 7 / 225


def results(folder):
    """Model -> metrics."""
    return {file.stem: json.loads(file.read_text())["metrics"] for file in folder.rglob("*.json")}


@pytest.fixture
def evaluate(here, clip_benchmark):
    """A function that runs ``clip_benchmark eval`` and gives model -> metrics."""

    def run(folder, *words):
        shutil.rmtree(here / folder, ignore_errors=True)
        (here / folder).mkdir()
        code, errors = clip_benchmark("eval", "--pretrained", "", *DATA, "--output", f"{folder}/{{model}}.json", *words)
        assert code == 0, errors
        return results(here / folder)

    return run


#: Model -> how far off it may be: a vote of views, and a stream, turn one rounding into several.
OTHERS = {f"dn:{TINY}": FEW, f"inmap:{TINY}@steps=50": FEW, f"inmap:{TINY}@unlabeled=test@sinkhorn=5@steps=50": SOME}
OTHERS |= {f"zlap:{TINY}": FEW, f"tda:vs2:{TINY}": SOME, f"zero:{TINY}@views=8": SOME, f"stata:{TINY}": SOME}
OTHERS |= {f"dn:vs2s:{TINY}@use=auto": SOME, f"centre:{TINY}": FEW, f"latents:{TINY}@suppress=12+99@boost=5": FEW}


@pytest.mark.parametrize(
    ("models", "mixed_off"), [(dict.fromkeys(MODELS, FEW), SOME), (OTHERS, 0.05)], ids=["steered", "others"]
)
def test_accuracies_are_those_of_the_cpu(models, mixed_off, evaluate, without_gpu):
    found = evaluate("gpu", "--model", *models, "--no_amp")
    mixed = evaluate("mixed", "--model", *models)
    without_gpu()
    expected = evaluate("cpu", "--model", *models, "--no_amp")
    assert len(found) == len(mixed) == len(expected) == len(models)
    for model, off in models.items():
        metrics = expected[model]
        assert found[model]["acc1"] == pytest.approx(metrics["acc1"], abs=off), model
        assert mixed[model]["acc1"] == pytest.approx(metrics["acc1"], abs=mixed_off), model
        assert found[model].keys() - {"vs2_results_digest"} == metrics.keys() - {"vs2_results_digest"}


def test_models_in_one_command_get_what_each_gets_alone(evaluate):
    models = (TINY, f"vs2:{TINY}", f"vs2pp:{TINY}@n=10")
    alone = {model: found for model in models for found in evaluate("alone", "--model", model).values()}
    together = evaluate("together", "--model", *models)
    for model in models:
        assert together[model] == alone[model], model


def test_per_image_results(evaluate, monkeypatch, here):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    found = evaluate("recorded", "--model", TINY, f"vs2:{TINY}")
    assert found[f"vs2:{TINY}"]["vs2_peak_memory"] > 0 and found[f"vs2:{TINY}"]["vs2_seconds"] > 0
    gained = found[f"vs2:{TINY}"]["vs2_mended"] - found[f"vs2:{TINY}"]["vs2_broken"]
    assert gained == pytest.approx(225 * (found[f"vs2:{TINY}"]["acc1"] - found[TINY]["acc1"]))
    assert len(list((here / "recorded").glob("*.images.npz"))) == 2


def test_a_sweep_gives_what_single_evaluations_do(evaluate, here):
    models = (TINY, f"vs2:{TINY}@alpha=0.5", f"vs2pp:{TINY}@alpha=0.5", f"knn:{TINY}", f"vs2:{TINY}@blocks=2@alpha=0.5")
    expected = evaluate("single", "--model", *models)
    words = ["sweep", "--model", *models, "--pretrained", "", *DATA, "--output", "swept/{model}.json"]
    assert main.main(words) == 0
    found = results(here / "swept")
    for model in models:
        assert found[model]["acc1"] == pytest.approx(expected[model]["acc1"], abs=1 / 225), model


@needs_gpu  # as does clip_benchmark's own training
@pytest.mark.parametrize("model", [TINY, f"vs2:{TINY}", f"vs2:{TINY}@gate=0.5"])
def test_linear_probe(evaluate, model, tmp_path):
    words = ("--task", "linear_probe", "--fewshot_epochs", "20", "--feature_root", str(tmp_path / "features"))
    (metrics,) = evaluate("probe", "--model", model, *words).values()
    assert metrics["lp_acc1"] > 0.3
    assert model == TINY or (metrics["vs2_method"] == "vs2" and "vs2_coverage" not in metrics)


def test_retrieval(here, clip_benchmark):
    digits_with_captions(here)
    data = ("--dataset", "wds/captions", "--dataset_root", "captions", "--num_workers", "1", "--quiet")
    data += ("--task", "zeroshot_retrieval")
    words = ("eval", "--model", TINY, f"rag:{TINY}@{NAME}", f"vs2:{TINY}@{NAME}", "--pretrained", "", *data)
    code, errors = clip_benchmark(*words, "--output", "retrieval {model}.json")
    assert code == 0, errors
    assert len(list(here.glob("retrieval *.json"))) == 3


def test_pages_of_images_and_latents(here):
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 200, 200)).save(here / "grey.png")
    data = ["--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few"]
    for model in (f"vs2:{TINY}@blocks=2+3", f"vs2pp:{TINY}"):
        assert main.main(["inspect", "grey.png", "--model", model, *data, "--out", "inspect"]) == 0
        assert "grey.png" in (here / "inspect/index.html").read_text()
    assert main.main(["latents", "--model", f"vs2:{TINY}", *data, "--out", "latents"]) == 0
    assert len((here / "latents/latents.csv").read_text().splitlines()) == 513
