"""Checkpoints that travel: into another folder, to a hub, and from there."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.errors import CheckpointError, DataError, HubError
from vs2_plugin.harness.loader import load

FIXTURES = Path(__file__).parent / "fixtures"
OLD = json.loads((FIXTURES / "version1.json").read_text())
FIRST = "visual.transformer.resblocks.0"


@pytest.fixture
def checkpoint():
    """One with a gallery, where checkpoints had it before."""
    return Checkpoint.load(FIXTURES / "version1")


@pytest.fixture
def pushed(checkpoint, hub):
    """The hub, to which it was pushed as me/sae, with its gallery."""
    checkpoint.push_to_hub("me/sae", gallery=True)
    hub.asked.clear()
    return hub


def inside(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_it_is_copied_with_a_card(checkpoint, tmp_path):
    copy = checkpoint.save(tmp_path / "a/copy")
    copy.verify()
    assert copy.digest == checkpoint.digest == OLD["digest"] and copy.created == checkpoint.created
    assert {file.partition("/")[0] for file in inside(copy.folder)} == {
        "README.md", "vs2.json", *(site.folder for site in checkpoint.sites)
    }  # fmt: skip
    assert copy.gallery_folder == copy.folder / FIRST / "gallery"
    assert "vs2:local-dir:model@copy" in (copy.folder / "README.md").read_text()


def test_without_the_gallery_it_is_another_checkpoint(checkpoint, tmp_path):
    bare = checkpoint.save(tmp_path / "bare", gallery=False)
    bare.verify()
    assert bare.gallery is None and bare.digest != checkpoint.digest and not bare.gallery_folder.exists()


def test_what_is_noted_travels_and_leaves_the_digest(checkpoint, tmp_path, hub, monkeypatch):
    copy = checkpoint.save(tmp_path / "copy")
    first, *others = copy.sites
    assert copy.note(first, {"recovered": 0.5, "recovered_on": "2 images"}) and copy.note(first, {"recovered": 0.75})
    copy.push_to_hub("me/sae", gallery=True)
    found = Checkpoint.from_hub("me/sae")
    assert found.sites[0].training == {**first.training, "recovered": 0.75, "recovered_on": "2 images"}
    assert found.sites[1:] == others and found.digest == copy.digest
    text = (found.folder / "README.md").read_text()
    assert "| accuracy recovered |" in text and "of 2 images." in text
    assert not found.note(found.sites[0], {"recovered": 0.25})  # the hub's cache is not ours
    assert copy.note(first, {"recovered": None}) and "recovered" not in Checkpoint.load(copy.folder).sites[0].training
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", lambda **given: open(tmp_path / "none" / "x"))  # nothing can be written
        assert not copy.note(first, {"recovered": 0.5}) and Checkpoint.load(copy.folder).digest == copy.digest
    checkpoint.save(copy.folder, gallery=False, overwrite=True)
    assert not copy.note(first, {"recovered": 0.5})  # it is another one now


def test_a_folder_that_is_there_stays(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="mine already exists; name a new folder"):
            checkpoint.save(tmp_path / "mine", overwrite=overwrite)
    checkpoint.save(tmp_path / "copy", gallery=False)
    with pytest.raises(DataError, match="copy already exists"):
        checkpoint.save(tmp_path / "copy")
    assert checkpoint.save(tmp_path / "copy", overwrite=True).digest == checkpoint.digest


def test_what_is_pushed_comes_back_and_steers_as_it_did(pushed, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    images = (torch.arange(3 * 3 * 32 * 32) % 251).float().view(3, 3, 32, 32) / 125 - 1
    for model in (model for model in OLD["embeddings"] if model.startswith(("vs2:", "vs2s:"))):
        steered, _, _ = load(model.format("local-dir:model@hf:me/sae"), "")
        if model.startswith("vs2s"):
            steered.set_classifier(torch.nn.functional.normalize(torch.arange(160).view(16, 10).sin(), dim=0))
        with torch.no_grad():
            found = steered.encode_image(images)
        torch.testing.assert_close(found, torch.tensor(OLD["embeddings"][model]), atol=1e-4, rtol=0)
        assert steered.checkpoint.digest == OLD["digest"]
        assert steered.vs2_facts()["vs2_checkpoint"] == "hf:me/sae"


def test_what_is_in_the_cache_is_read_without_a_question(pushed, monkeypatch):
    first = Checkpoint.from_hub("me/sae")
    assert pushed.asked and first.name == "hf:me/sae" and Path(constants.HF_HUB_CACHE) in first.folder.parents
    pushed.asked.clear()
    assert Checkpoint.from_hub("me/sae") == first and not pushed.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.from_hub("me/sae") == first
    with pytest.raises(HubError, match="me/other is not in the hub's cache, and cannot be fetched: HF_HUB_OFFLINE"):
        Checkpoint.from_hub("me/other")


def test_a_revision_is_a_tag_a_commit_or_the_newest(checkpoint, pushed):
    sha, _ = pushed.files("me/sae")
    pushed.tags["v1.0"] = sha
    before = Checkpoint.from_hub("me/sae")
    checkpoint.push_to_hub("me/sae")  # without its gallery
    assert Checkpoint.from_hub("me/sae") == before  # as long as nobody asks
    newest = Checkpoint.from_hub("me/sae", refresh=True)
    assert newest.gallery is None and Checkpoint.from_hub("me/sae") == newest
    for revision in ("v1.0", sha):
        found = Checkpoint.from_hub("me/sae", revision)
        assert found.digest == before.digest and found.name == f"hf:me/sae#{revision}"
    _, files = pushed.files("me/sae")
    assert not any("gallery" in name for name in files)  # a push removes what there was
    with pytest.raises(HubError, match="refuses me/sae at v9 .*Revision Not Found"):
        Checkpoint.from_hub("me/sae", "v9")


def test_nothing_but_a_checkpoint_is_fetched(pushed):
    _, files = pushed.files("me/sae")
    pushed.commit("me/sae", {**files, "evil.py": b"raise SystemExit", "weights.pt": b"x", "a/gallery/0/x.pkl": b"x"})
    found = Checkpoint.from_hub("me/sae")
    assert {Path(name).suffix for name in inside(found.folder)} == {".json", ".md", ".npy", ".safetensors"}


@pytest.mark.parametrize("name", ["vs2.json", f"{FIRST}/sae.safetensors", f"{FIRST}/cfg.json"])
def test_what_was_changed_on_the_hub_is_refused(pushed, name):
    _, files = pushed.files("me/sae")
    json_changed = files[name].replace(b'"images": 100', b'"images": 101').replace(b'"k": 4', b'"k": 5')
    changed = json_changed if name.endswith("json") else files[name][:-1] + b"\1"
    assert changed != files[name]
    pushed.commit("me/sae", {**files, name: changed})
    with pytest.raises(CheckpointError, match="damaged.*; fetch it again with vs2 store pull hf:me/sae"):
        Checkpoint.from_hub("me/sae").verify()
    with pytest.raises(CheckpointError, match=r"damaged[^;]*; it is the same on the hub: tell whoever pushed it$"):
        Checkpoint.from_hub("me/sae", refresh=True)


def test_a_cache_that_was_damaged_is_fetched_again(pushed):
    found = Checkpoint.from_hub("me/sae")
    file = (found.folder / FIRST / "sae.safetensors").resolve()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="is damaged: .* fetch it again with vs2 store pull hf:me/sae"):
        found.verify()
    Checkpoint.from_hub("me/sae", refresh=True).verify()
    file.unlink()
    (found.folder / FIRST / "sae.safetensors").unlink(missing_ok=True)
    Checkpoint.from_hub("me/sae").verify()  # an interrupted download


def test_what_lacks_something_is_not_told_to_be_trained_again(checkpoint, hub):
    checkpoint.push_to_hub("me/bare")
    checkpoint.push_to_hub("me/sae", gallery=True)
    bare, whole = Checkpoint.from_hub("me/bare"), Checkpoint.from_hub("me/sae")
    own = "train your own with vs2-train-sae"
    for lacking, problem in [
        (bare.require_gallery, f"whoever pushed it can add theirs with vs2 store push --gallery, or {own}"),
        (lambda: whole.require_gallery(encoder="dino"), f"{own} --retrieval_encoder dino"),
        (lambda: whole.select("7", "plain"), f"{own} --blocks 0 1 7"),
        (lambda: whole.select(None, "other"), f"{own} with its --model"),
    ]:
        with pytest.raises(CheckpointError) as told:
            lacking()
        assert problem in str(told.value) and "again" not in str(told.value)


def test_what_is_no_checkpoint_is_told(hub):
    hub.commit("me/model", {"config.json": b"{}", "README.md": b"hello"})
    with pytest.raises(
        CheckpointError, match="hf:me/model holds no vs2.json; expected a checkpoint that vs2 store push wrote"
    ):
        Checkpoint.from_hub("me/model")
    with pytest.raises(HubError, match="refuses me/nothing .*; check the name; for a private repository.* HF_TOKEN"):
        Checkpoint.from_hub("me/nothing")
    with pytest.raises(HubError, match="'a..b/c' is not the name of a repository"):
        Checkpoint.from_hub("a..b/c")


def test_a_push_needs_to_be_allowed(checkpoint, hub):
    hub.closed = True
    with pytest.raises(HubError, match="refuses me/sae .*401.*log in with `hf auth login` or set HF_TOKEN"):
        checkpoint.push_to_hub("me/sae")


def test_what_is_pushed_says_nothing_of_this_machine(checkpoint, hub):
    where = checkpoint.push_to_hub("me/sae", license="mit")
    sha, files = hub.files("me/sae")
    assert where.endswith(f"/me/sae/commit/{sha}")
    assert "command" in checkpoint.created and "command" not in json.loads(files["vs2.json"])["created"]
    assert b"license: mit" in files["README.md"] and b"vs2:local-dir:model@hf:me/sae" in files["README.md"]


def test_a_card_of_ones_own_is_pushed_as_it_is(checkpoint, tmp_path, hub):
    own = checkpoint.save(tmp_path / "own")
    (own.folder / "README.md").write_text("# Mine\n")
    own.push_to_hub("me/sae")
    assert hub.files("me/sae")[1]["README.md"] == b"# Mine\n"


def test_a_card_that_nobody_changed_is_made_anew_with_its_licence(checkpoint, tmp_path, hub):
    checkpoint.push_to_hub("me/first", license="mit")
    copy = Checkpoint.from_hub("me/first").save(tmp_path / "copy")
    text = (copy.folder / "README.md").read_text()
    assert "# copy\n" in text and "license: mit" in text
    copy.push_to_hub("me/sae")
    text = hub.files("me/sae")[1]["README.md"].decode()
    assert "# me/sae\n" in text and "license: mit" in text and "@copy" not in text
    (copy.folder / "README.md").write_text(text.replace("# me/sae", "# Ours"))
    copy.push_to_hub("me/other")
    assert b"# Ours\n" in hub.files("me/other")[1]["README.md"]


def test_a_card_of_ones_own_gives_way_where_a_licence_is_named(checkpoint, tmp_path, hub):
    own = checkpoint.save(tmp_path / "own")
    (own.folder / "README.md").write_text("my own words")
    own.push_to_hub("me/sae", license="mit")
    assert "license: mit" in (Checkpoint.from_hub("me/sae").folder / "README.md").read_text()


@pytest.mark.parametrize("way", ["pushed", "saved"])
def test_the_folders_of_the_training_images_stay_at_home(way, checkpoint, tmp_path, hub):
    own = checkpoint.save(tmp_path / "own")
    values = json.loads((own.folder / "vs2.json").read_text())
    values["data"]["folders"] = ["/home/me/photos"] * len(own.data.datasets)
    values["created"] |= {"command": "vs2-train-sae --store /home/me/store", "folder": "/home/me/store/checkpoints/own"}
    del values["digest"]
    (own.folder / "vs2.json").write_text(json.dumps(values))
    own = Checkpoint.load(own.folder)
    copy = own.save(tmp_path / "copy")
    assert copy.digest == own.digest and copy.data.folders == own.data.folders and copy.created == own.created
    if way == "pushed":
        own.push_to_hub("me/sae", gallery=True)
        away = Checkpoint.from_hub("me/sae")
    else:
        away = own.save(tmp_path / "away", portable=True)
    assert own.data.folders and away.data.folders == ()
    assert not any(b"/home/me" in (away.folder / name).read_bytes() for name in inside(away.folder))
    away.verify()


@pytest.mark.parametrize("share", [
    lambda checkpoint, folder: checkpoint.save(folder), lambda checkpoint, folder: checkpoint.push_to_hub("me/sae"),
])  # fmt: skip
def test_a_damaged_one_is_not_shared(share, checkpoint, tmp_path, hub):
    own = checkpoint.save(tmp_path / "own")
    file = own.folder / FIRST / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="is damaged"):
        share(own, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_of_another_tower_it_is_refused(pushed, monkeypatch, tmp_path):
    monkeypatch.chdir(FIXTURES)
    with pytest.raises(CheckpointError, match="'hf:me/sae' steers only local-dir:model: "):
        load("vs2:ViT-S-32-alt@hf:me/sae", "")


def test_sparsify_loads_what_was_pushed(sparsify, pushed, checkpoint):
    found = sparsify.SparseCoder.load_many("me/sae")
    assert found.keys() == {site.folder for site in checkpoint.sites}
    for site in checkpoint.sites:
        assert torch.equal(found[site.folder].W_dec, checkpoint.sae(site)[0].W_dec)
