"""From the request to the checkpoint, on the demo's digits and tiny CLIP."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vs2_plugin
from vs2_plugin.checkpoint.records import TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.data.given import GivenActivations
from vs2_plugin.demo.digits import read_digits
from vs2_plugin.demo.run import _clip_benchmark
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.sae.foreign import write_saelens
from vs2_plugin.training import run
from vs2_plugin.training.request import TrainRequest

from ..conftest import IMAGES
from .conftest import FEW, WORDS

NAME = "local-dir-tiny-clip_wds-digits"


def test_writes_a_checkpoint_that_is_found_by_its_data_set(folder, capsys, train):
    assert train() == 0
    output = capsys.readouterr().out
    checkpoint = Store.default().find(NAME)
    checkpoint.verify()
    assert checkpoint.data == TrainingData(
        datasets=("wds/digits",),
        splits=("train",),
        images=IMAGES,
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


def test_an_sae_per_block_and_at_the_output(folder, train):
    assert train("--blocks", "output", "1", "last", "--name", "several") == 0
    checkpoint = Store.default().find("several")
    assert [site.hookpoint for site in checkpoint.sites] == [
        "visual.transformer.resblocks.1",
        "visual.transformer.resblocks.3",
        "visual",
    ]
    checkpoint.verify()


def test_pass_joins_the_plain_sae_in_one_checkpoint(folder, capsys, monkeypatch, train):
    assert train() == 0
    plain = Store.default().find(NAME)
    assert train("--pass_weight", "0.8") == 0
    both = Store.default().find(NAME)
    both.verify()
    assert [(site.variant, site.labels) for site in both.sites] == [("plain", "none"), ("pass", "train")]
    assert both.sites[0] == plain.sites[0] and both.sites[1].files != plain.sites[0].files
    assert both.sites[1].training["pass_weight"] == 0.8
    assert train("--pass_weight", "0.8") == 2 and "already exists with a PASS SAE" in capsys.readouterr().err
    assert train("--overwrite", "--seed", "1") == 0  # the plain one alone is replaced
    replaced = Store.default().find(NAME)
    assert replaced.sites[1] == both.sites[1] and replaced.sites[0].files != both.sites[0].files


def test_pass_pulls_the_codes_of_a_class_together(folder, train):
    """Against the plain SAE, at the price of FVU; running class means do it too."""
    import numpy as np
    import torch

    activations = {}
    for name, words in {
        "plain": [],
        "batch": ["--pass_weight", "4"],
        "running": ["--pass_weight", "4", "--pass_means", "running"],
    }.items():
        assert train("--name", name, "--samples", "20000", *words) == 0
        site = Store.default().find(name).sites[0]
        sae, _ = Store.default().find(name).sae(site)
        cached = next(
            path for path in Store.default().cached() if (path / "labels.npy").exists() == bool(words)
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


def test_one_sae_over_several_data_sets(folder, capsys, train):
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
    assert everything.data.datasets == ("wds/odd", "wds/even") and everything.data.images == IMAGES
    assert some.data.calibrated_on == ("wds/odd",)
    assert some.sites[0].files == everything.sites[0].files  # the same SAE
    assert some.sites[0].fvu_quantiles != everything.sites[0].fvu_quantiles
    assert train(*both, "--pass_weight", "0.8", "--name", "both") == 0  # their classes are not each other's
    assert train(*both, "--calibrate_on", "wds/none", "--name", "x") == 2
    assert "expected some of --dataset: wds/odd wds/even" in capsys.readouterr().err
    assert train(*both) == 0
    assert "local-dir-tiny-clip_wds-odd+wds-even" in Store.default().names()


def test_the_paper_recipe(folder, train):
    assert train("--recipe", "paper", "--name", "paper") == 0
    training = Store.default().find("paper").sites[0].training
    assert (training["expansion_factor"], training["k"], training["lr"], training["recipe"]) == (4, 64, 5e-4, "paper")
    assert train("--recipe", "paper", "--k", "8", "--overwrite", "--name", "paper") == 0
    assert Store.default().find("paper").sites[0].training["k"] == 8


def test_an_existing_checkpoint_is_kept(folder, capsys, train):
    assert train() == 0
    before = Store.default().find(NAME).digest
    assert train("--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Store.default().find(NAME).digest == before
    assert train("--seed", "1", "--overwrite") == 0
    assert Store.default().find(NAME).digest != before


def test_two_folders_of_one_name_keep_a_checkpoint_each(folder, capsys):
    def train(place, *words):
        again = ["--model", f"local-dir:{place}/clip", "--pretrained", "", *WORDS[2:], *FEW[:-2], "--no_amp", *words]
        return train_sae.main(again), capsys.readouterr()

    for place in ("d1", "d2"):
        shutil.copytree("tiny-clip", f"{place}/clip")
    file = folder / "d2" / "clip" / "open_clip_model.safetensors"
    weights = load_file(file)
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, file)
    assert train("d1")[0] == 0
    code, told = train("d2")
    there = "already exists, for local-dir:d1/clip and not for local-dir:d2/clip; keep both with: "
    assert code == 2 and there in told.err
    for how in ({"dataset": "wds/digits"}, {}):
        name = "" if how else "@local-dir-clip_wds-digits"
        with pytest.raises(CheckpointError) as error:
            vs2_plugin.load(f"vs2:local-dir:d2/clip{name}", **how)
        assert "'local-dir-clip_wds-digits' (local-dir:d1/clip) is for another tower" in str(error.value)
        assert "evaluate it as vs2:local-dir:d2/clip@local-dir-clip_wds-digits-2, or" in str(error.value)
    # A variant that is added would stand beside one of the other tower.
    code, told = train("d2", "--pass_weight", "0.8")
    assert code == 2 and "(local-dir:d1/clip) is for another tower" in told.err and "add --name" in told.err
    command = train("d2")[1].err.partition("keep both with: ")[2].partition("; replace it")[0]
    assert train_sae.main(shlex.split(command)[1:]) == 0
    assert vs2_plugin.load("vs2:local-dir:d2/clip@local-dir-clip_wds-digits-2")
    code, told = train("d2", "--overwrite", "--store", "a store")
    assert "\nevaluate with: VS2_STORE='a store' clip_benchmark eval" in told.out
    code, told = train("d2", "--overwrite", "--store", "store")  # that of the environment, too
    assert "\nevaluate with: clip_benchmark eval --model local-dir:d2/clip vs2:local-dir:d2/clip" in told.out
    assert code == 0 and "which was for local-dir:d1/clip, is replaced by one for local-dir:d2/clip" in told.out


def test_transductive_training_is_marked_everywhere(folder, capsys, monkeypatch, train):

    assert train("--train_split", "test", "--transductive") == 0
    assert Store.default().find(NAME).transductive
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
    _clip_benchmark(words)
    assert json.loads((folder / "r.json").read_text())["metrics"]["vs2_transductive"] is True


# ---- from Python


SETTINGS = {"model": "local-dir:tiny-clip", "dataset_root": "digits", "samples": 2000, "num_workers": 0, "amp": False}


def test_random_numbers_of_the_caller_go_on_as_they_were(folder):
    def drawn(seed, source, **settings):
        torch.manual_seed(seed)
        vs2_plugin.train(source, k=4, name="x", overwrite=True, quiet=True, **settings)
        return torch.rand(3)

    rows, of_images = np.random.default_rng(0).normal(size=(60, 8)), {**SETTINGS, "pretrained": ""}
    for source, settings in ((rows, {"samples": 100}), ("wds/digits", of_images)):
        found = drawn(7, source, **settings)
        torch.manual_seed(7)
        assert torch.equal(found, torch.rand(3))


class Noisy(torch.utils.data.Dataset):
    """Draws another image each time."""

    def __len__(self):
        return 30

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError
        return torch.randn(3, 32, 32)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_drawn_are_drawn_by_the_seed(folder, workers):
    def mean(state, seed):
        torch.manual_seed(state)
        settings = {**SETTINGS, "num_workers": workers, "pretrained": "", "samples": 50, "k": 4, "quiet": True}
        return vs2_plugin.train(Noisy(), name="x", overwrite=True, seed=seed, **settings).sites[-1].mean

    assert mean(1, 5) == mean(2, 5) != mean(2, 6)


def test_from_python_it_is_the_checkpoint_of_the_command(folder, train, capsys):
    """The same digest: of the same files, tower, data and gallery."""
    assert train("--name", "typed", "--k", "8") == 0
    capsys.readouterr()
    checkpoint = vs2_plugin.train("wds/digits", name="called", k=8, quiet=True, **SETTINGS)
    assert checkpoint == Store.default().find("called")
    assert checkpoint.digest == Store.default().find("typed").digest
    assert capsys.readouterr().out == ""


def test_the_command_in_a_checkpoint_asks_for_the_same(folder):
    request = TrainRequest(dataset="wds/digits", name="first", k=8, quiet=True, **SETTINGS)
    [checkpoint] = run.train(request)
    words = shlex.split(checkpoint.created["command"])
    assert words == request.words()
    assert TrainRequest(**vars(train_sae.parser().parse_args(words[1:]))) == request
    assert checkpoint.created["folder"] == os.path.realpath(checkpoint.folder)


def test_several_values_are_a_list_of_checkpoints(folder):
    lines = []
    request = TrainRequest(dataset="wds/digits", name="n", k=(4, 8), seed=(0, 1), **SETTINGS)
    checkpoints = run.train(request, report=lines.append)
    assert [checkpoint.name for checkpoint in checkpoints] == ["n-k4-seed0", "n-k4-seed1", "n-k8-seed0", "n-k8-seed1"]
    assert [line for line in lines if line.startswith("SAE at block 3 of n-k8-seed1: 512 latents, 8 active; FVU 0.")]
    assert [line for line in lines if line.startswith("wrote ")] == [f"wrote {one.folder}" for one in checkpoints]
    assert lines[-1].startswith("evaluate with: clip_benchmark eval --model local-dir:tiny-clip vs2:local-dir:tiny-")
    alone = vs2_plugin.train("wds/digits", name="alone", k=8, seed=1, quiet=True, **SETTINGS)
    assert alone.sites[0].files == checkpoints[-1].sites[0].files  # as it would come out alone
    assert len(vs2_plugin.train("wds/digits", name="two", k=(4, 8), quiet=True, **SETTINGS)) == 2


@pytest.mark.parametrize(
    ("place", "evaluated"),
    [("photos/{}.png", False), ("photos/train/{1}/{0}.png", False), ("photos/{1}/{0}.png", True)],
)
def test_an_evaluation_is_only_suggested_where_there_are_labels_for_it(place, evaluated, folder):
    for number, (picture, label) in enumerate(zip(*read_digits("train"), strict=True)):
        if number < 30:
            file = Path(place.format(number, label % 2))
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    lines = []
    run.train(TrainRequest(dataset="photos/", **{**SETTINGS, "samples": 200}), report=lines.append)
    assert any(line.startswith("evaluate with: ") for line in lines) is evaluated


@pytest.mark.parametrize("fast", [True, False])
def test_extraction_takes_the_precision_that_is_fast_here_and_says_which(fast, folder, monkeypatch):
    monkeypatch.setattr(run, "emulates_bfloat16", lambda: not fast)
    lines = []
    request = TrainRequest(dataset="wds/digits", max_images=40, **{**SETTINGS, "amp": None, "samples": 200})
    [checkpoint] = run.train(request, report=lines.append)
    assert checkpoint.data.amp is fast
    words = "under autocast (bfloat16)" if fast else "in float32 (this processor would emulate autocast)"
    assert f"block 3, on cpu {words}" in lines[0]
    assert lines[-1].endswith(" --no_amp") is not fast  # evaluated as it was trained


# ---- what goes wrong outside of the package


SMALL = {**SETTINGS, "max_images": 100, "samples": 400, "quiet": True}


def test_copied_shards_give_the_same_digest(folder):
    """It tells of contents and settings, and not of paths and times."""
    shutil.copytree(folder / "digits", folder / "elsewhere" / "copied")
    for number, shard in enumerate((folder / "elsewhere/copied/train").iterdir()):
        os.utime(shard, (number, number))
    here = vs2_plugin.train("wds/digits", name="here", gallery_labels=True, **SMALL)
    settings = {**SMALL, "dataset_root": "elsewhere/copied"}
    there = vs2_plugin.train("wds/digits", name="there", gallery_labels=True, **settings)
    assert len(list(Store.default().cached())) == 2
    assert there.digest == here.digest and there.gallery == here.gallery
    other = vs2_plugin.train("wds/digits", name="other", gallery_labels=True, **{**SMALL, "max_images": 99})
    assert other.digest != here.digest


@pytest.mark.parametrize("copies", [True, False], ids=["whole", "without the gallery"])
def test_a_trained_checkpoint_that_cannot_be_written_is_kept_elsewhere(copies, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    whole = vs2_plugin.train("wds/digits", name="whole", **SMALL)
    stock = run.save_checkpoint

    def full(place, **contents):
        if place.parent == Store.default().checkpoints or (contents["gallery"] is not None and not copies):
            raise OSError(28, "No space left on device", str(place))
        return stock(place, **contents)

    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(DataError) as error:
        vs2_plugin.train("wds/digits", name="mine", **SMALL)
    message = str(error.value)
    assert message.startswith("the checkpoint 'mine' is trained but could not be written to")
    assert "No space left on device" in message and ("without its gallery" in message) is not copies
    source, target = map(Path, shlex.split(message.partition(", mv ")[2]))
    assert tmp_path in source.parents and target == Store.default().folder("mine")
    shutil.move(source, target)
    found = Store.default().find("mine")
    found.verify()
    assert found.sites[0].files == whole.sites[0].files
    assert (found.digest == whole.digest) is copies


def test_where_nothing_can_be_written_the_same_command_goes_on(folder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(DataError, match="nor among the temporary files; make room and"):
        patch.setattr(run, "save_checkpoint", lambda place, **contents: fails(place))
        vs2_plugin.train("wds/digits", name="mine", save_every=0, **SMALL)
    assert [path.name for path in Store.default().unfinished()] != []
    lines = []
    request = TrainRequest(dataset="wds/digits", name="mine", save_every=0, **{**SMALL, "quiet": False})
    monkeypatch.setattr("vs2_plugin.sae.train._Run.step", lambda *args: pytest.fail("trained again"))
    run.train(request, report=lines.append)
    assert any("cached, in" in line for line in lines)
    assert list(Store.default().unfinished()) == []


def fails(place):
    raise OSError(28, "No space left on device", str(place))


def test_too_little_room_for_the_checkpoints_is_told_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(run, "_room", lambda *args: 10**18)
    monkeypatch.setattr("vs2_plugin.training.extract.open_images", lambda *args, **more: pytest.fail("read"))
    with pytest.raises(DataError, match=r"the checkpoints need 1000000000\.0 GB but .* free"):
        vs2_plugin.train("wds/digits", **SMALL)


def test_a_store_that_is_a_file_ends_the_command_at_once(folder, capsys, train, monkeypatch):
    monkeypatch.setattr(run, "load_backbone", lambda *args: pytest.fail("loaded"))
    (folder / "file").write_text("")
    assert train("--store", "file") == 2
    assert "the store file is a file; expected a folder: name another one with --store" in capsys.readouterr().err


def test_a_second_training_of_one_name_is_refused_at_once(folder, capsys, train, monkeypatch):
    code = f"""
import sys
from pathlib import Path
from vs2_plugin.files import alone
with alone(Path({str(Store.default().folder("mine"))!r})):
    print("in", flush=True)
    sys.stdin.readline()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    stock = run.alone
    monkeypatch.setattr(run, "alone", lambda path: stock(path, seconds=0))
    monkeypatch.setattr(run, "load_backbone", lambda *args: pytest.fail("loaded"))
    try:
        assert train("--name", "mine") == 2
    finally:
        other.communicate("end\n")
    assert "another process is writing" in capsys.readouterr().err


def test_what_another_training_wrote_meanwhile_is_not_replaced(folder, monkeypatch):
    vs2_plugin.train("wds/digits", name="first", **SMALL)
    stock = run.alone

    @contextmanager
    def waited(path):
        shutil.copytree(Store.default().folder("first"), path)
        with stock(path):
            yield True

    monkeypatch.setattr(run, "alone", waited)
    with pytest.raises(DataError, match="checkpoint 'mine' in .* already exists"):
        vs2_plugin.train("wds/digits", name="mine", **SMALL)


def test_an_sae_of_another_library_becomes_a_checkpoint(folder, capsys, train):
    assert train("--blocks", "1") == 0
    own = Store.default().find(NAME)
    sae, mean = own.sae(own.sites[0])
    write_saelens(sae, folder / "theirs", model="tiny-clip", block=1)
    capsys.readouterr()
    assert train_sae.main([*WORDS, "--no_amp", "--num_workers", "0", "--sae", "theirs", "--name", "taken"]) == 0
    said = capsys.readouterr().out
    assert "the SAE by SAELens, of tiny-clip, of the activations after block 1 in theirs is assumed to be for" in said
    assert "taken as it is" in said
    checkpoint = Store.default().find("taken")
    (site,) = checkpoint.sites
    assert site.hookpoint == "visual.transformer.resblocks.1" and site.training["library"] == "SAELens"
    taken, same = checkpoint.sae(site)
    assert torch.equal(same, mean) and torch.equal(taken.W_dec, sae.W_dec)
    assert 0 < site.fvu < own.sites[0].fvu  # most of these images trained it
    assert checkpoint.gallery is not None
    assert "trained by SAELens elsewhere and measured on" in repr(checkpoint)
    checkpoint.save(folder / "saved")
    told = (folder / "saved" / "README.md").read_text()
    assert "trained by `SAELens`" in told and "Trained by SAELens elsewhere and measured on" in told
    write_saelens(sae, folder / "anywhere", model="tiny-clip", block=None)
    other = ["--sae", "anywhere", "--name", "at-the-end", "--blocks", "output"]
    assert train_sae.main([*WORDS, "--no_amp", "--num_workers", "0", *other]) == 2
    said = capsys.readouterr()
    assert "of width 128, but those at this site have 64" in said.err and "on the split" not in said.out
    assert train_sae.main([*WORDS, "--sae", "theirs", "--k", "3"]) == 2
    assert "omit --k" in capsys.readouterr().err


@pytest.mark.parametrize(("k", "told"), [(2, False), (3, True)])
def test_an_sae_that_explains_less_than_components_is_told(k, told, tmp_path):
    """Three directions and noise: three components explain all of it, and so do not two."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 16)) + 0.1 * rng.normal(size=(60, 16))
    lines = []
    request = TrainRequest.of(activations="X.npy", k=(k,), samples=3000, store=str(tmp_path))
    run.train(request, report=lines.append, given=GivenActivations.of(x.astype(np.float32)))
    warning = "warning: the SAE at activations has learned too little: it ex"
    warned = [line for line in lines if line.startswith(warning)]
    assert len(warned) == told and all("more images" in line for line in warned)
