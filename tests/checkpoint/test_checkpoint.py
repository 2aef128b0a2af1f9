import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vs2_plugin.checkpoint import checkpoint as module
from vs2_plugin.checkpoint import manifest
from vs2_plugin.checkpoint.checkpoint import Checkpoint, save_checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointError, CheckpointNotFound, CheckpointReplaced
from vs2_plugin.gallery.contents import RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.harness.loader import load

FIXTURES = Path(__file__).parent / "fixtures"
FIRST, LAST = "visual.transformer.resblocks.0", "visual.transformer.resblocks.11"
TOWER = Tower("ab" * 32, ["GELU"], {"size": [32, 32], "mean": [0.5]})
DATA = TrainingData(("cifar100",), 50_000, ("train",), ("cifar100",))


@pytest.fixture
def save(tmp_path, make_sae):
    """A function that saves a checkpoint with two sites; keywords change it."""

    def write(
        folder=tmp_path / "mine",
        *,
        mean=0.5,
        seed=0,
        training=None,
        created=None,
        tower=TOWER,
        data=DATA,
        d_in=8,
        width=8,
        at_output=False,
    ):
        def site(hookpoint, seed):
            quantiles = {"0.5": 0.25, "0.99": 0.75}
            facts = SiteSAE(
                hookpoint, "plain", "none", width, [mean] * width, 0.125, quantiles, training or {"seconds": 1.5}, {}
            )
            return facts, make_sae(d_in, 32, 4, seed=seed)

        saes = [site(FIRST, seed), site(LAST, seed + 1), *([site("visual", seed + 2)] if at_output else [])]
        return save_checkpoint(
            folder,
            backbone="ViT-B-32",
            pretrained="openai",
            tower=tower,
            data=data,
            saes=saes,
            created=created or {"torch": "2"},
        )

    return write


def change(checkpoint, **facts):
    """Write other facts into the manifest, and no digest of it."""
    path = checkpoint.folder / MANIFEST
    values = {**json.loads(path.read_text()), **facts}
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "digest"}))


# ---- round trip


def test_a_checkpoint_comes_back_as_it_was_saved(save, make_sae):
    saved = save()
    found = Checkpoint.load(str(saved.folder))
    assert found == saved
    assert (found.name, found.backbone, found.pretrained, found.data) == ("mine", "ViT-B-32", "openai", DATA)
    assert found.transductive is False
    assert found.tower == TOWER
    assert [site.hookpoint for site in found.sites] == [FIRST, LAST]
    assert found.sites[0].fvu_quantiles == {"0.5": 0.25, "0.99": 0.75}
    sae, mean = found.sae(found.sites[0])
    assert sae.config == make_sae(8, 32, 4).config
    for name, value in make_sae(8, 32, 4).state_dict().items():
        assert torch.equal(sae.state_dict()[name], value)
    assert torch.equal(mean, torch.full((8,), 0.5))
    assert mean.dtype == torch.float32
    found.verify()


def test_from_inside_its_folder_a_checkpoint_has_its_name_too(save, monkeypatch):
    saved = save()
    for folder, path in ((saved.folder, "."), (saved.folder, ""), (saved.folder / LAST, "..")):
        monkeypatch.chdir(folder)
        found = Checkpoint.load(path)
        assert found == saved and found.name == "mine" and found.free_name == "mine-2"
    with pytest.raises(CheckpointNotFound):
        Checkpoint.load("/")


def test_what_is_no_folder_and_no_site_is_refused(save):
    with pytest.raises(CheckpointError, match="checkpoint 5: expected the path of its folder"):
        Checkpoint.load(5)
    with pytest.raises(CheckpointError, match="site 5: expected one of the checkpoint's sites"):
        save().sae(5)


def test_the_mean_survives_bit_for_bit(save):
    value = torch.rand(1).item() / 3
    found = save(mean=value)
    assert torch.equal(found.sae(found.sites[0])[1], torch.full((8,), value, dtype=torch.float32))


@pytest.mark.parametrize(
    ("blocks", "chosen"), [(None, [11]), ("0", [0]), ("11", [11]), ("11+0", [0, 11]), ("0+0", [0]), ("all", [0, 11])]
)
def test_the_saes_of_blocks_come_in_the_order_of_the_tower(blocks, chosen, save):
    assert [site.block for site in save().select(blocks)] == chosen


@pytest.mark.parametrize(("blocks", "missing"), [("5", "5"), ("0+5+7", "5 7"), ("1", "1")])
def test_blocks_without_sae_are_refused_with_those_there_are(blocks, missing, save):
    with pytest.raises(CheckpointError) as error:
        save().select(blocks)
    assert f"checkpoint 'mine' has no SAE at block {missing} (its blocks: 0 11)" in str(error.value)
    assert "--overwrite --blocks 0 " in str(error.value) and "11" in str(error.value)  # those it has, too
    with pytest.raises(CheckpointError, match=r"\(its blocks: 0 11\); .* --overwrite --blocks [0-9 ]+ output$"):
        save(at_output=True).select(blocks)
    typed = save(created={"command": "vs2-train-sae --model X"})
    with pytest.raises(CheckpointError, match=r"the same vs2-train-sae command \(vs2-train-sae --model X\) and --over"):
        typed.select(blocks)


def test_a_checkpoint_of_the_output_embedding_has_no_blocks(save):
    saved = save()
    sites = json.loads((saved.folder / MANIFEST).read_text())["sites"]
    change(saved, sites=[{**sites[0], "hookpoint": "visual"}])
    found = Checkpoint.load(saved.folder)
    assert [site.block for site in found.select()] == [None]
    for blocks in ("0", "all"):
        with pytest.raises(CheckpointError, match=rf"no SAE at block {blocks} \(its blocks: none, only visual\)"):
            found.select(blocks)


@pytest.mark.parametrize("number", ["\u00b2", "1" * 5000, ""])
def test_what_is_no_block_number_is_none(number, save):
    [site, *_] = save().sites
    assert replace(site, hookpoint=f"visual.transformer.resblocks.{number}").block is None


def test_a_transductive_checkpoint_says_so(save):
    assert save(data=replace(DATA, transductive=True)).transductive is True


def test_an_sae_folder_is_all_that_sparsify_needs(save):
    folder = save().folder
    assert {path.name for path in folder.iterdir()} == {MANIFEST, FIRST, LAST}
    assert {path.name for path in (folder / LAST).iterdir()} == {"cfg.json", "sae.safetensors"}


# ---- the version before


OLD = json.loads((FIXTURES / "version1.json").read_text())


def test_a_checkpoint_of_the_version_before_is_read():
    """The fixture was written by the code of before checkpoints had types, and so were the numbers beside it."""
    found = Checkpoint.load(FIXTURES / "version1")
    assert found.digest == OLD["digest"]
    assert (found.backbone, found.pretrained, found.tower.activations) == ("local-dir:model", "", ["GELU"])
    assert found.data == TrainingData(("wds/digits",), 100, ("train",), ("wds/digits",), amp=False, max_images=100)
    assert [(site.block, site.variant, site.labels) for site in found.sites] == [
        (0, "plain", "none"), (1, "plain", "none"), (0, "pass", "train"), (1, "pass", "train")
    ]  # fmt: skip
    contents = found.require_gallery(labels=True, n=100)
    assert [(part.dataset, part.count, part.classes) for part in contents.parts] == [("wds/digits", 100, 10)]
    assert contents.encoders == {"clip": RetrievalEncoder(16)}
    found.verify()


@pytest.mark.parametrize("model", OLD["embeddings"])
def test_a_checkpoint_of_the_version_before_steers_as_then(model, monkeypatch):
    monkeypatch.chdir(FIXTURES)
    images = (torch.arange(3 * 3 * 32 * 32) % 251).float().view(3, 3, 32, 32) / 125 - 1
    steered, _, _ = load(model.format("local-dir:model@version1"), "", dataset="wds/digits")
    if model.startswith(("vs2pp", "vs2s")):
        steered.set_classifier(torch.nn.functional.normalize(torch.arange(160).view(16, 10).sin(), dim=0))
    with torch.no_grad():
        found = steered.encode_image(images)
    torch.testing.assert_close(found, torch.tensor(OLD["embeddings"][model]), atol=1e-4, rtol=0)


def test_saved_again_it_has_the_same_digest(tmp_path):
    """So the facts on disk have the same keys and values as before."""
    old = Checkpoint.load(FIXTURES / "version1")
    files = {path.stem: path for path in (old.gallery_folder / "0").iterdir()}
    new = save_checkpoint(
        tmp_path / "again", backbone=old.backbone, pretrained=old.pretrained, tower=old.tower, data=old.data,
        saes=[(site, old.sae(site)[0]) for site in old.sites], created=old.created,
        gallery=GalleryFiles(old.gallery, [files]),
    )  # fmt: skip
    assert new == replace(old, folder=new.folder)
    written = json.loads((new.folder / MANIFEST).read_text())
    assert written.pop("digest") == old.digest
    assert written == json.loads((old.folder / MANIFEST).read_text())


# ---- digest


def test_the_digest_ignores_what_another_run_of_the_same_training_changes(save, tmp_path):
    first = save()
    again = save(tmp_path / "other-name", training={"seconds": 99.0}, created={"torch": "3", "command": "x"})
    assert again.digest == first.digest
    assert save(created={"torch": "4"}).digest == first.digest


CHANGED = {
    "weights": {"seed": 5},
    "mean": {"mean": 0.25},
    "data": {"data": replace(DATA, amp=False)},
    "images": {"data": replace(DATA, images=1)},
    "tower": {"tower": Tower("cd" * 32, ["GELU"], {})},
}


@pytest.mark.parametrize("changed", CHANGED)
def test_the_digest_changes_with_what_results_depend_on(changed, save, tmp_path):
    assert save(tmp_path / "other", **CHANGED[changed]).digest != save().digest


# ---- damage


def one_sentence(error):
    return "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_a_folder_without_manifest_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFound, match=rf"no SAE checkpoint in {tmp_path}: no readable vs2\.json"):
        Checkpoint.load(tmp_path)


BAD_MANIFESTS = {
    "cut": (lambda text: text[: len(text) // 2], "is damaged: JSONDecodeError"),
    "empty": (lambda text: "", "is damaged: JSONDecodeError"),
    "no text": (lambda text: "\udcff\udcfe", "is damaged: "),
    "a list": (lambda text: "[]", "is not a vs2-checkpoint file"),
    "another format": (lambda text: '{"format": "other"}', "is not a vs2-checkpoint file"),
    "next version": (
        lambda text: text.replace('"format_version": 1', '"format_version": 2'),
        "has format version 2, this vs2-plugin (",
    ),
    "no version": (lambda text: text.replace('"format_version"', '"f"'), "has format version None"),
    "no tower": (lambda text: text.replace('"tower"', '"t"'), "is damaged: tower is missing"),
    "no sites": (lambda text: text.replace('"sites"', '"s"'), "is damaged: sites is missing"),
    "no mean": (lambda text: text.replace('"mean": [\n   ', '"m": [\n   '), "is damaged: sites[0].mean is missing"),
    "other width": (lambda text: text.replace('"width": 8', '"width": 9'), "8 numbers; expected 9"),
    "sites of text": (lambda text: json.dumps({**json.loads(text), "sites": ["x"]}), "sites[0] is 'x'; "),
    "zero sites": (lambda text: json.dumps({**json.loads(text), "sites": []}), "it has no sites"),
    "nested without end": (lambda text: "[" * 100_000, "is damaged: RecursionError"),
    "mean beyond floats": (lambda text: text.replace("0.5,", "1" + "0" * 400 + ",", 1), "is damaged: "),
    "mean of nothing": (lambda text: text.replace("0.5,", "NaN,", 1), "is not finite"),
}


@pytest.mark.parametrize("bad", BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_in_one_sentence(bad, save):
    make, message = BAD_MANIFESTS[bad]
    path = save().folder / MANIFEST
    path.write_bytes(make(path.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(path.parent)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert one_sentence(error)


GARBAGE = [None, True, 5, -1, 0.5, "text", [], ["text"], [[[]]], {}, {"a": {"b": []}}]
#: What each place of the manifest may hold of that.
ACCEPTED = {
    ("backbone",): ["text"],
    ("pretrained",): ["text"],
    ("created",): [{}],
    ("data",): [],
    ("data", "datasets"): [[], ["text"]],
    ("data", "images"): [5],
    ("data", "max_images"): [None, 5, -1],
    ("data", "amp"): [True],
    ("gallery",): [None],
    ("gallery", "labels"): [True],
    ("gallery", "sites"): [[], ["text"]],
    ("gallery", "parts"): [],
    ("gallery", "parts", 0): [],
    ("gallery", "parts", 0, "count"): [5],
    ("gallery", "parts", 0, "classes"): [None, 5],
    ("gallery", "encoders"): [],
    ("gallery", "encoders", "clip"): [],
    ("gallery", "encoders", "clip", "width"): [5],
    ("sites",): [],
    ("sites", 0): [],
    ("sites", 0, "hookpoint"): ["text"],
    ("sites", 0, "variant"): [],
    ("sites", 0, "labels"): [],
    ("sites", 0, "width"): [],
    ("sites", 0, "mean"): [],
    ("sites", 0, "mean", 0): [5, -1, 0.5],
    ("sites", 0, "fvu"): [5, 0.5],
    ("sites", 0, "fvu_quantiles"): [{}],
    ("sites", 0, "fvu_quantiles", "0.01"): [],
    ("sites", 0, "training"): [{}],
    ("sites", 0, "training", "seed"): [None, True, 5, -1, 0.5, "text"],
    ("sites", 0, "files"): [],
    ("sites", 0, "files", "cfg.json"): ["text"],
    ("tower",): [None],
    ("tower", "parameters"): ["text"],
    ("tower", "activations"): [[], ["text"]],
    ("tower", "preprocessing"): [{}, {"a": {"b": []}}],
}


@pytest.mark.parametrize("place", ACCEPTED, ids=lambda place: ".".join(map(str, place)))
def test_values_of_another_kind_are_refused_in_one_sentence(place, tmp_path):
    for value in GARBAGE:
        facts = json.loads((FIXTURES / "version1" / MANIFEST).read_text())
        *way, last = place
        inner = facts
        for key in way:
            inner = inner[key]
        inner[last] = value
        (tmp_path / MANIFEST).write_text(json.dumps(facts))
        if any(value is known or (value == known and type(value) is type(known)) for known in ACCEPTED[place]):
            Checkpoint.load(tmp_path)
        else:
            with pytest.raises(CheckpointError) as error:
                Checkpoint.load(tmp_path)
            assert "is damaged: " in str(error.value) and one_sentence(error), value


#: Values that no training writes: where they stand, what stands there, and what is said.
IMPOSSIBLE = [
    (("sites", 0, "hookpoint"), "../x", "sites[0] has the hookpoint '../x'; expected names joined by dots"),
    (("sites", 0, "hookpoint"), "visual.\xb2", "has the hookpoint"),
    (("sites", 0, "hookpoint"), "a\0b", "has the hookpoint 'a\\x00b'"),
    (("sites", 0, "hookpoint"), "visual.transformer.resblocks.1", "two of its SAEs are for the same site"),
    (("sites", 0, "variant"), "raw", "has the variant 'raw'; expected plain or pass"),
    (("sites", 0, "labels"), "some", "has the labels 'some'; expected none or train"),
    (("sites", 0, "files", "../x"), "00", "has files ['../x', 'cfg.json', 'sae.safetensors']; expected cfg.json and"),
    (("sites", 0, "files"), {"cfg.json": "00"}, "has files ['cfg.json']; expected cfg.json and sae.safetensors"),
    (("sites", 0, "mean", 3), 1e39, "has a mean that is not finite in float32"),
    (("sites", 0, "fvu"), float("nan"), "has FVU nan; expected a number of at least 0"),
    (("sites", 0, "fvu"), 10**400, "has FVU 1000"),
    (("sites", 0, "fvu_quantiles", "many"), 1.0, "has FVU quantiles ['many']; expected levels such as 0.95"),
    (("sites", 0, "fvu_quantiles", "nan"), 1.0, "has FVU quantiles ['nan']"),
    (("sites", 0, "fvu_quantiles", "0.99"), 0.1, "expected finite numbers that rise with their levels"),
    (("sites", 0, "fvu_quantiles", "0.995"), float("inf"), "expected finite numbers that rise with their levels"),
    (("data", "images"), 10**30, "it was made from 1000000000000000000000000000000 images"),
    (("gallery", "parts", 0, "count"), -1, "its gallery has images and classes [-1, 10]"),
    (("gallery", "parts", 0, "classes"), 10**12 * 10, "its gallery has images and classes [100, 10000000000000]"),
    (("gallery", "encoders", "../x"), {"width": 16}, "its gallery has embeddings ('../x', 16)"),
    (("tower", "preprocessing", "mode"), [[[[]]]] * 3, None),
    (("tower", "preprocessing", "mode"), json.loads("[" * 200 + "]" * 200), "expected less within each other"),
    (("format_version",), json.loads("[" * 500 + "]" * 500), "has format version [[[[[["),
]


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE, ids=lambda part: str(part)[:40])
def test_values_that_no_training_writes_are_refused(place, value, message, tmp_path):
    facts = json.loads((FIXTURES / "version1" / MANIFEST).read_text())
    inner = facts
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / MANIFEST).write_text(json.dumps(facts))
    if message is None:
        Checkpoint.load(tmp_path)
        return
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(tmp_path)
    assert message in str(error.value) and one_sentence(error) and len(str(error.value)) < 400


def test_a_mean_of_large_whole_numbers_is_read(save):
    saved = save()
    sites = json.loads((saved.folder / MANIFEST).read_text())["sites"]
    change(saved, sites=[{**sites[0], "mean": [10**30] * 8}])
    found = Checkpoint.load(saved.folder)
    assert found.sae(found.sites[0])[1].tolist() == pytest.approx([1e30] * 8)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def append(path):
    with open(path, "ab") as file:
        file.write(b" ")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", ["sae.safetensors", "cfg.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "is not the file that was written (SHA-256 "),
        (append, "is not the file"),
        (remove, "No such file"),
    ],
)
def test_a_changed_or_missing_file_is_named(damage, message, name, save):
    saved = save()
    damage(saved.folder / LAST / name)
    saved.sae(saved.sites[0])
    for read in (lambda: saved.sae(saved.sites[1]), saved.verify):
        with pytest.raises(CheckpointError) as error:
            read()
        assert f"checkpoint 'mine' is damaged: {saved.folder / LAST / name}" in str(error.value)
        assert message in str(error.value)
        assert one_sentence(error)


def test_an_sae_of_another_width_is_refused(save):
    saved = save(d_in=8, width=6)
    with pytest.raises(CheckpointError, match=f"the SAE at {LAST} has width 8, expected 6"):
        saved.sae(saved.sites[1])


# ---- of no use


@pytest.mark.parametrize(
    ("fvu", "training", "told"),
    [(0.999, {"dead": 0.5}, None), (1.0, {}, "its FVU is 1, while that of the mean activation alone is 1"),
     (3.25, {"dead": 0.9}, "its FVU is 3.25, while"), (0.1, {"dead": 0.75}, "75.0% of its latents are dead"),
     (0.1, {}, None), (0.1, {"dead": None}, None), (0.1, {"dead": "all"}, None), (0.1, {"dead": 1.0}, "100.0% of its"),
     (0.1, {"dead": 0.35}, None), (1.12, {"held_out_count": 9}, None), (1.0, {"held_out_count": "9"}, "its FVU is 1,"),
     (1.125, {"held_out_count": 9}, "its FVU is 1.125, while"), (1.01, {"held_out_count": 101}, "its FVU is 1.01,")],
)  # fmt: skip
def test_an_sae_of_no_use_is_told_from_one_that_serves(fvu, training, told):
    """Half of the latents dead is too much; the demo's SAEs have 14 to 35 % of them."""
    site = SiteSAE(FIRST, "plain", "none", 1, [0.0], fvu, {}, training, {})
    assert site.warning is None if told is None else site.warning.startswith(told)


@pytest.mark.parametrize(
    ("fvu", "variant", "training", "told"),
    [
        (0.3, "plain", {"pca_fvu": 0.25, "k": 16}, True),
        (0.25, "plain", {"pca_fvu": 0.25, "k": 16}, False),
        (0.3, "pass", {"pca_fvu": 0.25, "k": 16}, False),
        (0.3, "plain", {"pca_fvu": 0.25, "k": 16, "library": "sparsify"}, False),
        (0.3, "plain", {}, False),
    ],
)
def test_an_sae_that_explains_less_than_principal_components_says_so(fvu, variant, training, told):
    site = SiteSAE(FIRST, variant, "none", 1, [0.0], fvu, {}, training, {})
    expected = (
        "it explains 70.0% of the variance of images that it has not seen, but as many principal components as active "
        "latents (16) explain 75.0%"
    )
    assert site.below_components == (expected if told else None)


# ---- tower


def test_its_own_tower_is_accepted(save):
    assert save().require_tower(Tower(**TOWER.to_json()), "ViT-B-32") is None


OTHER_TOWERS = [
    (
        Tower("cd" * 32, ["GELU"], TOWER.preprocessing),
        "its vision tower had other parameters (SHA-256 abababababab, this one has cdcdcdcdcdcd)",
    ),
    (Tower(TOWER.parameters, ["QuickGELU"], TOWER.preprocessing), "with GELU, this one has QuickGELU"),
    (
        Tower(TOWER.parameters, ["GELU"], {"size": [64, 64], "mean": [0.5]}),
        "preprocessed with size [32, 32], not [64, 64]",
    ),
]


@pytest.mark.parametrize(("tower", "words"), OTHER_TOWERS)
def test_another_tower_is_refused_with_what_differs(tower, words, save):
    with pytest.raises(CheckpointError) as error:
        save().require_tower(tower, "local-dir:there/clip", "pass")
    assert "checkpoint 'mine' (ViT-B-32, openai) is for another tower: " in str(error.value)
    assert words in str(error.value)
    assert (
        "; for local-dir:there/clip as it is loaded now, add --name mine-2 to its vs2-train-sae command and evaluate "
        "it as pass:local-dir:there/clip@mine-2, or replace the checkpoint with --overwrite" in str(error.value)
    )


def test_a_free_name_is_no_other_checkpoints(save):
    saved = save()
    saved.folder.with_name("mine-2").mkdir()
    assert saved.free_name == "mine-3"


# ---- replacing


def test_saving_again_replaces_and_leaves_nothing_else(save):
    first = save()
    (first.folder / "leftover.txt").write_text("of the old one")
    second = save(mean=0.75)
    assert Checkpoint.load(second.folder).digest == second.digest != first.digest
    assert not (second.folder / "leftover.txt").exists()
    assert {path.name for path in second.folder.parent.iterdir()} == {"mine", ".locks"}
    second.verify()


def fails(*args, **kwargs):
    raise OSError("no space left")


@pytest.mark.parametrize("existing", [False, True], ids=["nothing there", "old one there"])
@pytest.mark.parametrize("step", [(module, "file_digest"), (manifest.json, "dumps")], ids=["file_digest", "json.dumps"])
def test_a_failure_while_saving_leaves_the_old_one(step, existing, save, monkeypatch, tmp_path):
    old = save() if existing else None
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(*step, fails)
        save(mean=0.75)
    if existing:
        assert Checkpoint.load(old.folder) == old
        old.verify()
    names = [path.name for path in tmp_path.iterdir() if path.name not in ("default-store", ".locks")]
    assert names == (["mine"] if existing else [])


@pytest.mark.parametrize("place", ["sites", "data", "tower"])
def test_a_manifest_that_was_changed_after_it_was_written_is_refused(place, save):
    folder = save().folder
    values = json.loads((folder / MANIFEST).read_text())
    if place == "sites":
        values["sites"][1]["mean"][3] += 1e-6
    elif place == "data":
        values["data"]["images"] += 1
    else:
        values["tower"]["parameters"] = "cd" * 32
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"vs2\.json is damaged: it is not what was written: its digest"):
        Checkpoint.load(folder)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_called_damaged(save):
    first = save()
    second = save(seed=5)
    with pytest.raises(
        CheckpointReplaced, match=r"'mine' was replaced while it was being read; run the same command again"
    ):
        first.sae(first.sites[0])
    (second.folder / second.sites[0].folder / "cfg.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        second.sae(second.sites[0])


def test_damage_is_told_with_the_command_that_made_the_checkpoint(save, tmp_path):
    for command in ("vs2-train-sae --k 8", "vs2-train-sae --k 8 --overwrite"):
        checkpoint = save(created={"command": command, "folder": os.path.realpath(tmp_path / "mine")})
        (checkpoint.folder / LAST / "cfg.json").write_text("{}")
        mended = r"cfg\.json is not the file .*; make it again with: vs2-train-sae --k 8 --overwrite$"
        with pytest.raises(CheckpointError, match=mended):
            checkpoint.sae(checkpoint.sites[1])


@pytest.mark.parametrize("origin", ["mine", "gone", None])
@pytest.mark.parametrize("command", ["vs2-train-sae --k 8", "vs2-train-sae --k 8 --overwrite"])
def test_damage_of_a_copy_is_told_without_a_command_that_replaces_the_original(command, origin, save, tmp_path):
    made_in = {} if origin is None else {"folder": os.path.realpath(tmp_path / origin)}
    saved = save(created={"command": command, **made_in})
    copy = Checkpoint.load(shutil.copytree(saved.folder, tmp_path / "copy"))
    (copy.folder / LAST / "cfg.json").write_text("{}")
    again = f"copy it again from {saved.folder.resolve()}" if origin == "mine" else "if it is a copy, copy it again"
    with pytest.raises(CheckpointError) as told:
        copy.verify()
    assert str(told.value).endswith(f"); {again}; it was made with: vs2-train-sae --k 8")
    saved.verify()
