"""``vs2 store``."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vs2_plugin.checkpoint import store as stores
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import doctor
from vs2_plugin.cli import store as cli_store
from vs2_plugin.cli.main import main
from vs2_plugin.errors import CheckpointError, CheckpointNotFound
from vs2_plugin.sae.files import save_sae

from ..conftest import IMAGES
from ..training.conftest import WORDS
from .test_train_sae import folder, train  # noqa: F401

NAME = "local-dir-tiny-clip_wds-digits"
GOOD = Path(__file__).parents[1] / "checkpoint/fixtures/version1"


@pytest.mark.parametrize("words", [["--store", "s", "list"], ["list", "--store", "s"]])
def test_the_store_is_named_before_the_action_or_behind_it(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["store", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "store s"


def test_store_list_and_remove(folder, capsys):  # noqa: F811
    assert main(["store", "list"]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert train() == 0
    assert main(["store", "list"]) == 0
    text = capsys.readouterr().out
    assert NAME in text and f"{IMAGES} images" in text and "1 set," in text
    assert main(["store", "remove", "nope"]) == 2
    assert "no SAE checkpoint 'nope'" in capsys.readouterr().err
    assert main(["store", "remove"]) == 2
    assert main(["store", "remove", NAME, "--cache"]) == 0
    assert Store.default().names() == [] and list(Store.default().cached()) == []
    assert main(["store", "remove", "../store"]) == 2


def test_a_checkpoint_is_pushed_pulled_and_evaluated(hub, folder, capsys):  # noqa: F811
    assert train() == 0
    assert main(["store", "push", NAME, "me/digits", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert f"its gallery of {IMAGES} images is not pushed" in said and "use it as vs2:local-dir:tiny-clip@hf:me" in said
    assert main(["store", "pull", "hf:me/digits"]) == 0
    assert "use it as vs2:local-dir:tiny-clip@digits, with local-dir:tiny-clip" in capsys.readouterr().out
    assert Store.default().names() == ["digits", NAME]
    assert Store.default().find("digits").digest == Store.default().find("hf:me/digits").digest
    for words, problem in [
        (["push", NAME, "me"], "'me' is not a repository; expected OWNER/NAME"),
        (["push", NAME, "me/digits#v1"], "a push goes to the main branch; omit #v1"),
        (["push", "nope", "me/digits"], "no SAE checkpoint 'nope'"),
        (["pull", "me/digits"], "checkpoint 'digits' is already in the store; give --name, or --overwrite"),
        (["pull", "me/nothing"], "refuses me/nothing"),
        (["pull", "me/digits", "--name", "../x"], "checkpoint name '../x'"),
    ]:
        assert main(["store", *words]) == 2
        assert problem in capsys.readouterr().err
    assert main(["store", "pull", "me/digits", "--overwrite"]) == 0


@pytest.mark.parametrize("command", [["store", "list"], ["doctor"]])
def test_the_name_of_a_folder_cannot_tell_the_terminal_anything(command, capsys):
    path = Store.default().checkpoints / "a\x1b[2J\u202eb\n  ok  c"
    path.mkdir(parents=True)
    (path / "vs2.json").write_text("{}")
    main(command)
    [line, *_] = [line for line in capsys.readouterr().out.splitlines() if "x1b" in line]
    assert line.isprintable() and r"a\x1b[2J\u202eb\n  ok  c" in line


def without_manifest(place):
    (place / "vs2.json").unlink()


def folder_in_its_place(place):
    without_manifest(place)
    (place / "vs2.json").mkdir()


def leading_nowhere(place):
    without_manifest(place)
    (place / "vs2.json").symlink_to("nowhere")


def leading_to_itself(place):
    without_manifest(place)
    (place / "vs2.json").symlink_to("vs2.json")


def with_(**facts):
    def damage(place):
        path = place / "vs2.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))

    return damage


BAD = {
    "no manifest": without_manifest, "a folder": folder_in_its_place, "leads nowhere": leading_nowhere,
    "leads to itself": leading_to_itself, "no object": lambda place: (place / "vs2.json").write_text("7"),
    "half a letter": with_(backbone="\ud800"), "nested": with_(tower=json.loads("[" * 500 + "]" * 500)),
    "beyond str": lambda place: (place / "vs2.json").write_text("9" * 5000), "its site is a file": lambda place: (
        shutil.rmtree(place / "visual.transformer.resblocks.1"), (place / "visual.transformer.resblocks.1").touch()
    ),
}  # fmt: skip


@pytest.fixture
def store():
    store = Store.default()
    for name in ("a-good-one", "bad", "one-more"):
        shutil.copytree(GOOD, store.checkpoints / name)
    return store


@pytest.mark.parametrize("damage", BAD)
def test_the_others_go_on_beside_a_bad_one(damage, store, capsys):
    BAD[damage](store.checkpoints / "bad")
    assert main(["store", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("FVU 0.1290 to 0.1658") >= 2
    assert "  a-good-one  local-dir:model" in listed and "  one-more  " in listed
    listed.encode()
    findings = {finding.text.partition(":")[0]: finding for finding in doctor._checkpoints(store)}
    assert findings["a-good-one"].good and findings["one-more"].good
    assert findings["bad"].good == (damage == "half a letter")
    assert findings["bad"].good or findings["bad"].mend == "vs2 store remove bad"
    assert store.find("one-more").name == "one-more"
    assert main(["store", "remove", "bad"]) == 0 and "bad" not in store.names()


@pytest.mark.parametrize("what", ["checkpoint", "size"])
def test_what_vanishes_while_the_list_is_made_is_no_error(what, store, monkeypatch, capsys):
    place = store.checkpoints / "bad"
    if what == "checkpoint":
        names = store.names()
        monkeypatch.setattr(Store, "names", lambda self: names)
        shutil.rmtree(place)
    else:

        def size(*paths):
            for path in paths:
                shutil.rmtree(path, True)
            return stores.folder_size(*paths)

        monkeypatch.setattr(cli_store, "folder_size", size)
    assert main(["store", "list"]) == 0
    assert capsys.readouterr().out.count("FVU 0.1290 to 0.1658") == (2 if what == "checkpoint" else 3)


def test_commands_that_are_printed_carry_the_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s" / "checkpoints" / "bad one").mkdir(parents=True)
    main(["doctor", "--store", "s"])
    assert "vs2 store --store s remove 'bad one'" in capsys.readouterr().out
    main(["store", "--store", "s", "list"])
    assert "vs2-train-sae --store s" in capsys.readouterr().out
    main(["store", "--store", "s", "remove"])
    assert "(see vs2 store --store s list)" in capsys.readouterr().err
    main(["store", "--store", "s", "remove", "bad one"])
    assert not (tmp_path / "s" / "checkpoints" / "bad one").exists()


def test_an_sae_of_no_use_is_told_with_what_helps(store, capsys):
    with_(sites=[{**site, "fvu": 1.5} for site in json.loads((GOOD / "vs2.json").read_text())["sites"][1:2]])(
        store.checkpoints / "bad"
    )
    assert main(["store", "list"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "useless" in line]
    assert line.startswith("  bad  ")
    assert line.endswith("useless at visual.transformer.resblocks.1: its FVU is 1.5, while that of the mean activation "
                         "alone is 1")  # fmt: skip
    [found] = [finding for finding in doctor._checkpoints(store) if not finding.good]
    assert found.text.startswith("bad: the SAE at visual.transformer.resblocks.1 is useless: its FVU is 1.5")
    assert found.mend.startswith("train it again with vs2-train-sae --overwrite and more images or --samples, a larger")


def test_an_sae_goes_to_another_library_and_comes_back(folder, capsys):  # noqa: F811
    assert train("--blocks", "1", "--name", "ours") == 0
    assert main(["store", "export", "ours", "theirs", "--format", "saelens"]) == 0
    said = capsys.readouterr().out
    assert "wrote theirs/visual.transformer.resblocks.1\nsae_lens.SAE.load_from_disk reads each" in said
    left_out = "the mean activation, the thresholds of the gate, the gallery, "
    assert f"not exported, as the format cannot hold them: {left_out}" in said
    theirs = "theirs/visual.transformer.resblocks.1"
    words = [*WORDS, "--no_amp", "--num_workers", "0", "--name", "back"]
    assert main(["store", "--store", "elsewhere", "import", theirs, *words]) == 0
    assert "the SAE by SAELens, of local-dir:tiny-clip, of the activations after block 1" in capsys.readouterr().out
    ours, back = Store.default().find("ours"), Store(folder / "elsewhere").find("back")
    assert back.sites[0].hookpoint == ours.sites[0].hookpoint and back.sites[0].training["library"] == "SAELens"
    (sae, mean), (same, again) = (one.sae(one.sites[0]) for one in (ours, back))
    assert torch.equal(mean, again) and torch.equal(sae.W_dec, same.W_dec)
    assert main(["store", "import", theirs, *words, "--overwrite", "--dataset", "no-such-set"]) == 2
    assert main(["store", "import", theirs, *words, "--lr", "1"]) == 2  # an SAE is taken as it is


def test_a_folder_of_another_library_is_told_from_a_checkpoint(tmp_path, make_sae, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sae(make_sae(), tmp_path / "theirs/layers.7")
    save_sae(make_sae(), tmp_path / "theirs/layers.8")
    find = Store(tmp_path / "store").find
    with pytest.raises(
        CheckpointError, match="holds an SAE by sparsify, but no checkpoint; make one from it with: vs2"
    ):
        find("theirs/layers.7")
    with pytest.raises(CheckpointError, match=r"by sparsify and 1 more, .*: vs2 store import theirs/layers\.7 and the"):
        find("theirs")
    (tmp_path / "theirs/vs2.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is part of a checkpoint; name the folder that contains it: theirs"):
        find("theirs/layers.7")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointNotFound, match="no SAE checkpoint 'none'"):
        find("none")
