"""vs2-train-sae, in this process, on the demo's digits and tiny CLIP."""

from pathlib import Path

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae

from ..training.conftest import FEW, WORDS, folder  # noqa: F401


def train(*words: str) -> int:
    return train_sae.main([*WORDS, *FEW, *words])


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--model", "vs2:ViT-B-32@gamma=2"], ["plain backbone", "--model ViT-B-32"]),
        (["--model", "ViT-B-33"], ["no model 'ViT-B-33'", "ViT-B-32"]),
        (["--model", "local-dir:nowhere"], ["nowhere/open_clip_config.json"]),
        (["--dataset", "eurosat"], ["no training split", "--transductive"]),
        (["--dataset", "imagenetv2"], ["test split only", "--transductive"]),
        (["--train_split", "test"], ["is the one that is evaluated", "--transductive"]),
        (["--dataset_root", "nowhere"], ["nowhere/train/nshards.txt"]),
        (["--dataset", "no-such-set"], ["clip_benchmark knows no data set 'no-such-set'; a folder of images is"]),
        (["--dataset", "cifar10O"], ["no data set 'cifar10O'; did you mean 'cifar10' or 'cifar100'", "wds/NAME"]),
        (["--blocks", "12"], ["--blocks '12'", "0 to 3"]),
        (["--k", "0"], ["k is 0"]),
        (["--k", "600"], ["k is 600", "512 latents"]),
        (["--lr", "-1"], ["lr is -1"]),
        (["--name", "a/b"], ["checkpoint name 'a/b'"]),
        (["--max_images", "5"], ["5 activations are too few"]),
        (["--no_galery"], ["unrecognized arguments: --no_galery; did you mean --no_gallery?"]),
        (["--expantion_factor", "8"], ["unrecognized arguments: --expantion_factor; did you mean --expansion_factor?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("folder")
def test_mistakes_end_with_one_line(words, fragments, capsys):
    assert train(*words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vs2-train-sae: error: ")]
    assert len(error) == 1
    for fragment in fragments:
        assert fragment in error[0]
    assert Store.default().names() == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--k", "600"], "k is 600"),
        (["--dataset", "photos/"], "19 images are too few to train an SAE; expected at least 20"),
        (["--dataset", "photos/", "more/", "--max_images", "9"], "18 images are too few"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_sae_that_cannot_be_is_refused_before_images_are_encoded(words, told, capsys):
    for place, count in (("photos", 19), ("more", 30)):
        Path(place).mkdir()
        for number in range(count):
            Path(place, f"{number}.png").touch()
    assert train_sae.main([*WORDS, *(word for word in FEW if word != "--quiet"), *words]) == 2
    said = capsys.readouterr()
    assert "activations of" not in said.out and told in said.err


def test_help_is_written_as_it_is_meant(capsys):
    with pytest.raises(SystemExit):
        train_sae.main(["--help"])
    text = capsys.readouterr().out
    assert "--retrieval_encoder \\\n      vit_small_patch14_dinov2" in text
    assert "one pass over the activations" in " ".join(text.split())


def test_help_lists_the_flags_of_clip_benchmark(capsys):
    with pytest.raises(SystemExit) as stop:
        train_sae.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--model",
        "--pretrained",
        "--dataset",
        "--dataset_root",
        "--batch_size",
        "--num_workers",
        "--model_cache_dir",
        "--no_amp",
        "--seed",
        "--recipe",
        "--k",
    ):
        assert f"{flag} " in text
    assert "examples:" in text
