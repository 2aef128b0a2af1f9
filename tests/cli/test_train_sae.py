"""vs2-train-sae, in this process, on the demo's digits and tiny CLIP."""

import json
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from vs2_plugin.checkpoint.checkpoint import TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.demo.digits import write_digits
from vs2_plugin.demo.run import _TINY_CLIP

FEW = ["--samples", "2000", "--num_workers", "0", "--quiet", "--no_amp"]
NAME = "local-dir-tiny-clip_wds-digits"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_digits(tmp_path / "digits")
    shutil.copytree(_TINY_CLIP, tmp_path / "tiny-clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "store"))
    return tmp_path


def train(*words: str, few: list[str] = FEW) -> int:
    return train_sae.main(
        ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits", *few, *words]
    )


def drop_labels(folder):
    for shard in (folder / "digits/train").glob("*.tar"):
        with tarfile.open(shard) as source, tarfile.open(shard.with_suffix(".new"), "w") as target:
            for member in source:
                if not member.name.endswith(".cls"):
                    target.addfile(member, source.extractfile(member))
        shard.with_suffix(".new").replace(shard)


def test_writes_a_checkpoint_that_is_found_by_its_data_set(folder, capsys):
    assert train() == 0
    output = capsys.readouterr().out
    checkpoint = Store.default().find(NAME)
    checkpoint.verify()
    assert checkpoint.data == TrainingData(
        datasets=("wds/digits",),
        splits=("train",),
        images=900,
        calibrated_on=("wds/digits",),
        transductive=False,
        amp=False,
        max_images=None,
    )
    site = checkpoint.sites[0]
    assert (site.variant, site.labels) == ("plain", "none")
    assert (site.hookpoint, site.width, site.training["k"], site.training["recipe"]) == (
        "visual.transformer.resblocks.3",
        128,
        16,
        "default",
    )
    assert f"FVU {site.fvu:.4f}" in output and str(checkpoint.folder) in output


def test_the_second_run_extracts_nothing(folder, capsys, monkeypatch):
    assert train() == 0
    first = Store.default().find(NAME).digest
    monkeypatch.setattr("vs2_plugin.data.cache.extract", lambda *args, **kwargs: pytest.fail("extracted again"))
    monkeypatch.setattr("vs2_plugin.data.shards.LocalShards._index", lambda *args: pytest.fail("looked for images"))
    assert train("--overwrite") == 0
    assert Store.default().find(NAME).digest == first  # and the same seed gives the same SAE


HEAVY = {"open_clip", "torchvision", "timm", "clip_benchmark.datasets.builder", "torch._dynamo"}


def imported(folder, *words):
    """Those of HEAVY that a training imports, in a process of its own. Whatever it says goes to the error output."""
    command = ["--model", "local-dir:tiny-clip", "--dataset", "wds/digits", "--dataset_root", "digits", *FEW, *words]
    code = f"from vs2_plugin.cli import train_sae; assert train_sae.main({command!r}) == 0"
    code += f"; import sys; print('imported:', *({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_a_training_on_cached_activations_neither_loads_the_model_nor_imports_what_would(folder):
    """Those imports take longer than everything else before its first step."""
    time.sleep(0.05)  # a model that was put there this moment is not remembered
    assert imported(folder, "--name", "first") >= {"open_clip", "torchvision"}
    assert imported(folder, "--name", "second", "--blocks", "last") == set()
    assert imported(folder, "--name", "third", "--refresh_cache") >= {"open_clip"}
    first, second, third = map(Store.default().find, ("first", "second", "third"))
    assert first.digest == second.digest == third.digest
    assert first.tower == second.tower == third.tower


def test_another_place_in_a_remembered_tower_is_extracted_from_it(folder, capsys):
    time.sleep(0.05)
    assert train("--name", "here") == 0
    assert train("--name", "there", "--blocks", "1") == 0
    assert train("--name", "afresh", "--blocks", "1", "--refresh_cache") == 0
    assert Store.default().find("there").digest == Store.default().find("afresh").digest
    assert train("--blocks", "9") == 2
    assert "--blocks '9': expected last, all, output, or block numbers from 0 to 3" in capsys.readouterr().err


def test_a_training_refuses_to_extract_from_another_model_than_it_remembers(folder, capsys):
    time.sleep(0.05)
    assert train("--name", "first") == 0
    (file,) = Store.default().towers.iterdir()
    facts = json.loads(file.read_text())
    facts["tower"]["parameters"] = "0" * 64
    file.write_text(json.dumps(facts))
    capsys.readouterr()
    assert train("--name", "second") == 2
    said = capsys.readouterr().err
    assert "the weights of local-dir:tiny-clip have changed" in said and "run the same command again" in said
    assert train("--name", "second") == 0
    assert Store.default().find("second").digest == Store.default().find("first").digest


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--dataset_root", "nowhere"], 2)], ids=["done", "failed"])
def test_garbage_is_collected_again_after_the_start(words, code, folder, monkeypatch):
    import gc

    from vs2_plugin.sae import train as module

    original, seen = module.train_saes, []
    monkeypatch.setattr(module, "train_saes", lambda *args, **kw: seen.append(gc.isenabled()) or original(*args, **kw))
    assert train(*words) == code
    assert gc.isenabled() and all(seen) and len(seen) == (code == 0)


def test_the_cache_notices_other_images_and_settings(folder, monkeypatch):
    import vs2_plugin.data.cache as module

    original, calls = module.extract, []
    monkeypatch.setattr(module, "extract", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    assert train("--max_images", "100", few=FEW[:-1]) == 0  # under autocast
    for words in (
        [],
        ["--max_images", "100"],
        ["--cache_dtype", "float32"],
        ["--blocks", "0"],
        ["--refresh_cache"],
    ):
        assert train("--overwrite", *words) == 0
    shutil.copy(folder / "digits/train/0.tar", folder / "digits/train/1.tar")
    assert train("--overwrite") == 0
    assert len(calls) == 7


def test_labels_are_not_needed_and_not_read(folder):
    assert train() == 0
    labeled = Store.default().find(NAME)
    drop_labels(folder)
    (folder / "digits/classnames.txt").unlink()
    shutil.rmtree(folder / "digits/test")
    assert train("--overwrite") == 0
    assert Store.default().find(NAME).sites[0].files == labeled.sites[0].files


def test_data_sets_that_clip_benchmark_builds_are_read_through_it(folder):
    """ImageNet's unverified form is any folder of images: the one torchvision data set that needs no download."""
    import io

    from PIL import Image

    with tarfile.open(folder / "digits/train/0.tar") as tar:
        for index, member in enumerate(m for m in tar if m.name.endswith(".png")):
            target = folder / "images/train" / f"n{index % 3}" / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(tar.extractfile(member).read())).save(target)
    words = ["--dataset", "imagenet1k-unverified", "--dataset_root", "images", "--num_workers", "2"]
    assert train(*words) == 0
    assert Store.default().find("local-dir-tiny-clip_imagenet1k-unverified").data.images == 225
    (folder / "images/train/n1" / "broken.png").write_bytes(b"no image")
    assert train(*words, "--overwrite", "--refresh_cache") == 2


def test_an_sae_per_block_and_at_the_output(folder):
    assert train("--blocks", "output", "1", "last", "--name", "several") == 0
    checkpoint = Store.default().find("several")
    assert [site.hookpoint for site in checkpoint.sites] == [
        "visual.transformer.resblocks.1",
        "visual.transformer.resblocks.3",
        "visual",
    ]
    checkpoint.verify()


def test_pass_joins_the_plain_sae_in_one_checkpoint(folder, capsys, monkeypatch):
    assert train() == 0
    plain = Store.default().find(NAME)
    assert train("--pass_weight", "0.8") == 0
    both = Store.default().find(NAME)
    both.verify()
    assert [(site.variant, site.labels) for site in both.sites] == [("plain", "none"), ("pass", "train")]
    assert both.sites[0] == plain.sites[0] and both.sites[1].files != plain.sites[0].files
    assert both.sites[1].training["pass_weight"] == 0.8
    assert train("--pass_weight", "0.8") == 2 and "already with a PASS SAE" in capsys.readouterr().err
    assert train("--overwrite", "--seed", "1") == 0  # the plain one alone is replaced
    replaced = Store.default().find(NAME)
    assert replaced.sites[1] == both.sites[1] and replaced.sites[0].files != both.sites[0].files


def test_pass_pulls_the_codes_of_a_class_together(folder):
    """Against the plain SAE, at the price of FVU; running class means do it too."""
    import numpy as np
    import torch

    activations = {}
    for name, words in {
        "plain": [],
        "batch": ["--pass_weight", "4"],
        "running": ["--pass_weight", "4", "--pass_means", "running"],
    }.items():
        assert train("--name", name, "--samples", "40000", *words) == 0
        site = Store.default().find(name).sites[0]
        sae, _ = Store.default().find(name).load(site)
        cached = next(
            path for path in Store.default().activations.iterdir() if (path / "labels.npy").exists() == bool(words)
        )
        x = torch.from_numpy(np.load(next(cached.glob("visual*.npy")))).float()
        latents = sae.encode(x)
        codes = torch.zeros(len(x), 512).scatter(1, latents.indices, latents.values)
        activations[name] = (codes, site.fvu)
        if words:
            labels = torch.from_numpy(np.load(cached / "labels.npy"))

    def spread(codes):
        within = sum((codes[labels == c] - codes[labels == c].mean(0)).pow(2).sum() for c in labels.unique())
        return (within / (codes - codes.mean(0)).pow(2).sum()).item()

    for name in ("batch", "running"):
        assert spread(activations[name][0]) < 0.9 * spread(activations["plain"][0])
        assert activations[name][1] > activations["plain"][1]


def test_pass_without_labels_is_refused(folder, capsys):
    drop_labels(folder)
    assert train("--pass_weight", "0.8") == 2
    assert "has no label (0000.cls), and labels were asked for" in capsys.readouterr().err


def test_one_sae_over_several_data_sets(folder, capsys):
    """The union of their training images; each is extracted once, and thresholds can be calibrated on some of them."""
    (folder / "sets").mkdir()
    for name, shards in {"odd": (1, 3), "even": (0, 2)}.items():
        target = folder / "sets" / name / "train"
        target.mkdir(parents=True)
        (target / "nshards.txt").write_text("2")
        for number, shard in enumerate(shards):
            shutil.copy(folder / f"digits/train/{shard}.tar", target / f"{number}.tar")
    both = ["--dataset", "wds/odd", "wds/even", "--dataset_root", "sets/{dataset}"]
    assert train(*both, "--name", "both") == 0
    assert len(list(Store.default().cached())) == 2
    assert train(*both, "--name", "odd-only", "--calibrate_on", "wds/odd") == 0
    assert len(list(Store.default().cached())) == 2
    everything, some = Store.default().find("both"), Store.default().find("odd-only")
    assert everything.data.datasets == ("wds/odd", "wds/even") and everything.data.images == 900
    assert some.data.calibrated_on == ("wds/odd",)
    assert some.sites[0].files == everything.sites[0].files  # the same SAE
    assert some.sites[0].fvu_quantiles != everything.sites[0].fvu_quantiles
    assert train(*both, "--pass_weight", "0.8", "--name", "both") == 0  # their classes are not each other's
    assert train(*both, "--calibrate_on", "wds/none", "--name", "x") == 2
    assert "expected some of --dataset: wds/odd wds/even" in capsys.readouterr().err
    assert train(*both) == 0
    assert "local-dir-tiny-clip_wds-odd+wds-even" in Store.default().names()


def test_the_paper_recipe(folder):
    assert train("--recipe", "paper", "--name", "paper") == 0
    training = Store.default().find("paper").sites[0].training
    assert (training["expansion_factor"], training["k"], training["lr"], training["recipe"]) == (4, 64, 5e-4, "paper")
    assert train("--recipe", "paper", "--k", "8", "--overwrite", "--name", "paper") == 0
    assert Store.default().find("paper").sites[0].training["k"] == 8


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
        (["--dataset", "no-such-set"], ["could not build the split 'train' of 'no-such-set'", "Unsupported dataset"]),
        (["--blocks", "12"], ["--blocks '12'", "0 to 3"]),
        (["--k", "0"], ["k is 0"]),
        (["--k", "600"], ["k is 600", "512 latents"]),
        (["--lr", "-1"], ["lr is -1"]),
        (["--name", "a/b"], ["checkpoint name 'a/b'"]),
        (["--max_images", "5"], ["5 activations are too few"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_with_one_line(words, fragments, folder, capsys):
    assert train(*words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vs2-train-sae: error: ")]
    assert len(error) == 1
    for fragment in fragments:
        assert fragment in error[0]
    assert Store.default().names() == []


def test_an_existing_checkpoint_is_kept(folder, capsys):
    assert train() == 0
    before = Store.default().find(NAME).digest
    assert train("--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Store.default().find(NAME).digest == before
    assert train("--seed", "1", "--overwrite") == 0
    assert Store.default().find(NAME).digest != before


def test_transductive_training_is_marked_everywhere(folder, capsys, monkeypatch):
    import sys

    assert train("--train_split", "test", "--transductive") == 0
    assert Store.default().find(NAME).transductive
    from clip_benchmark import cli

    words = [
        "eval",
        "--model",
        "vs2:local-dir:tiny-clip",
        "--pretrained",
        "",
        "--dataset",
        "wds/digits",
        "--dataset_root",
        "digits",
        "--num_workers",
        "1",
        "--quiet",
        "--no_amp",
        "--output",
        "r.json",
    ]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
    cli.main()
    assert json.loads((folder / "r.json").read_text())["metrics"]["vs2_transductive"] is True


def test_an_interrupted_extraction_leaves_nothing_half_done(folder, monkeypatch, capsys):
    from vs2_plugin.data.images import TrainingImages

    original = TrainingImages.batches

    def interrupted(self, *args):
        yield next(original(self, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingImages, "batches", interrupted)
    assert train() == 130
    assert "run the same command" in capsys.readouterr().err
    assert list(Store.default().activations.iterdir()) == [] and Store.default().names() == []
    monkeypatch.setattr(TrainingImages, "batches", original)
    assert train() == 0


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
