"""Which checkpoints a request asks for, without training any."""

import shlex
from dataclasses import replace

import pytest

from vs2_plugin.checkpoint.checkpoint import save_checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.clip.sites import Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import CheckpointError, DataError, SettingError
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart
from vs2_plugin.sae.foreign import ForeignSAE
from vs2_plugin.training.plan import chosen_sites, fitted, make_plans
from vs2_plugin.training.request import TrainRequest

DATA = TrainingData(("cifar100",), 7)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def put(store, make_sae):
    """A function that saves a checkpoint with SAEs of some variants, and returns its folder."""

    def write(name, *variants):
        saes = [(SiteSAE("visual", one, "none", 4, [0.0] * 4, 0.5, {}, {}, {}), make_sae(4, 8, 2)) for one in variants]
        about = {"backbone": "ViT-B-32", "pretrained": "w", "tower": Tower("x", [], {}), "created": {}}
        return save_checkpoint(store.folder(name), data=DATA, saes=saes, **about).folder

    return write


def plans(store, **given):
    return make_plans(TrainRequest(**{"model": "ViT-B-32", "pretrained": "w", "dataset": "cifar100", **given}), store)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["ViT-B-32_w_cifar100"]),
        ({"dataset": ("a", "b")}, ["ViT-B-32_w_a+b"]),
        ({"name": "n", "k": 8, "seed": 1}, ["n"]),
        ({"name": "n", "k": (8, 16)}, ["n-k8", "n-k16"]),
        ({"name": "n", "k": 8, "seed": (0, 3), "expansion_factor": (2, 4)},
         ["n-x2-seed0", "n-x2-seed3", "n-x4-seed0", "n-x4-seed3"]),
        ({"name": "n", "pass_weight": (0, 0.8)}, ["n"]),
        ({"name": "n", "pass_weight": (0.4, 0.8)}, ["n-pass0.4", "n-pass0.8"]),
    ],
)  # fmt: skip
def test_there_is_a_checkpoint_for_each_combination_named_by_what_differs(store, given, names):
    assert [plan.folder.name for plan in plans(store, **given)] == names


@pytest.mark.parametrize(
    ("weights", "variants"),
    [(None, [{"plain": 0.0}]), (0.8, [{"pass": 0.8}]), ((0, 0.8), [{"plain": 0.0, "pass": 0.8}]),
     ((0, 0.4, 0.8), [{"plain": 0.0, "pass": 0.4}, {"plain": 0.0, "pass": 0.8}])],
)  # fmt: skip
def test_pass_is_a_second_sae_of_the_same_checkpoint(store, weights, variants):
    found = plans(store, pass_weight=weights)
    assert [plan.variants for plan in found] == variants
    assert [plan.config(variant, 512).pass_weight for plan in found for variant in plan.variants] == [
        weight for one in variants for weight in one.values()
    ]


def test_k_follows_the_width_unless_it_is_given(store):
    assert [plans(store)[0].config("plain", width).k for width in (4, 128, 768)] == [1, 16, 64]
    assert plans(store, k=8)[0].config("plain", 128).k == 8


@pytest.mark.parametrize(("model", "shape"), [("ViT-B-32", (4, 64)), ("ViT-B-16", (4, 256)), ("ViT-L-14", (10, 128))])
def test_the_paper_recipe_has_a_shape_for_each_backbone_and_flags_override_it(store, model, shape):
    [paper] = plans(store, model=model, recipe="paper")
    config = paper.config("plain", 768)
    assert (config.expansion_factor, config.k, config.init, config.auxk) == (*shape, "random", 0)
    [other] = plans(store, model=model, recipe="paper", k=8, lr=0.1)
    config = other.config("plain", 768)
    assert (config.expansion_factor, config.k, config.lr, config.init) == (shape[0], 8, 0.1, "random")


def test_a_setting_that_no_training_takes_is_refused_before_any(store):
    with pytest.raises(SettingError, match="sae_batch_size is 1"):
        plans(store, sae_batch_size=1)


def test_an_sae_that_is_there_keeps_its_shape_and_takes_no_settings_of_a_training(make_sae):
    request = TrainRequest(model="ViT-B-32", dataset="cifar100")
    given = ForeignSAE(make_sae(4, 8, 2), "SAELens", 7, None)
    found = fitted(request, given)
    assert (found.blocks, found.k, found.expansion_factor) == (("7",), (2,), (2,))
    assert fitted(request, ForeignSAE(make_sae(4, 3, 2), "SAELens", 7, None)).expansion_factor == (1,)
    assert fitted(request, replace(given, block=None)).blocks == ("last",)
    assert fitted(replace(request, blocks=("1",), seed=(3,)), replace(given, block=None)).blocks == ("1",)
    assert fitted(replace(request, blocks=("07",)), given).blocks == ("7",)
    for block in ("1", "output"):
        with pytest.raises(SettingError, match=f"--blocks {block} contradicts .* activations after block 7; omit --b"):
            fitted(replace(request, blocks=(block,)), given)
    for changed in ({"recipe": "paper"}, {"lr": 0.1}):
        with pytest.raises(SettingError, match=f"omit --{next(iter(changed))}"):
            fitted(replace(request, **changed), given)
    for changed in ({"blocks": ("0", "1")}, {"blocks": ("all",)}, {"seed": (0, 1)}):
        with pytest.raises(SettingError, match="one value of --blocks and of --seed"):
            fitted(replace(request, **changed), given)


def test_what_is_there_is_added_to_or_replaced_when_asked(store, put):
    put("n", "plain")
    with pytest.raises(
        DataError, match="checkpoint 'n' in .* already exists; replace it with --overwrite, or give another"
    ):
        plans(store, name="n")
    [adding] = plans(store, name="n", pass_weight=0.8)
    assert [site.variant for site in adding.kept] == ["plain"]
    [replacing] = plans(store, name="n", overwrite=True)
    assert replacing.existing is not None and replacing.kept == replacing.load_kept(DATA, []) == []
    put("n", "plain", "pass")
    with pytest.raises(DataError, match="already exists with a PASS SAE"):
        plans(store, name="n", pass_weight=0.8)


@pytest.mark.parametrize(
    ("given", "of"),
    [
        ({"model": "local-dir:d2/clip", "pretrained": "w"}, "local-dir:d2/clip"),
        ({"pretrained": ""}, "ViT-B-32, random weights"),
    ],
)
def test_one_of_another_model_is_told_with_the_command_that_keeps_both(given, of, store, put):
    put("n", "plain")
    with pytest.raises(DataError) as error:
        plans(store, name="n", samples=9, **given)
    told, _, rest = str(error.value).partition(f" already exists, for ViT-B-32, w and not for {of}; keep both with: ")
    command, _, _ = rest.partition("; replace it with --overwrite")
    assert told and shlex.split(command)[-2:] == ["--name", "n-2"] and "--samples 9" in command
    request = TrainRequest(**vars(train_sae.parser().parse_args(shlex.split(command)[1:])))
    assert [plan.folder.name for plan in make_plans(request, store)] == ["n-2"]


def test_a_damaged_checkpoint_is_replaced_only_when_asked(store, put):
    (put("n", "plain") / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError):
        plans(store, name="n")
    assert plans(store, name="n", overwrite=True)[0].existing is None


def test_an_sae_that_stays_is_read_where_it_is_of_the_same_data(store, put):
    put("n", "plain")
    [plan] = plans(store, name="n", pass_weight=0.8)
    [(site, sae)] = plan.load_kept(DATA, [])
    assert site.variant == "plain" and sae.config.num_latents == 8
    parts = (GalleryPart("cifar10", 7, None, contents={"digests": "ab"}),)
    held = replace(plan.existing, gallery=GalleryContents(parts, (), {}, False))
    assert replace(plan, existing=held).load_kept(DATA, ["ab"])
    with pytest.raises(DataError, match=r"was trained on other data \(other images now\); give --name"):
        replace(plan, existing=held).load_kept(DATA, ["cd"])
    with pytest.raises(DataError, match="the other SAE of checkpoint 'n' was trained on other data .*; give --name"):
        plan.load_kept(TrainingData(("cifar10",), 7), [])


def test_sites_are_those_that_are_named_in_the_order_of_the_tower(make_clip):
    sites = Sites.of(make_clip())
    first, second, last = sites.blocks
    for words, chosen in (
        (["last"], [last]),
        (["output", "1", "0", "1"], [first, second, sites.output]),
        (["all"], [first, second, last]),
        (["2", "last"], [last]),
    ):
        assert chosen_sites(sites, words) == chosen
    for word in ("\u00b2", "\u0663", "1" * 5000):  # isdigit() is true of all three
        with pytest.raises(SettingError, match="expected last, all, output, or block numbers from 0 to 2"):
            chosen_sites(sites, [word])
    with pytest.raises(SettingError, match="--blocks '3': expected last, all, output, or block numbers from 0 to 2"):
        chosen_sites(sites, ["0", "3"])


def test_a_tower_without_a_pooled_token_has_its_output_alone(make_clip):
    sites = Sites.of(make_clip(pool_type="avg"))
    assert chosen_sites(sites, ["last"]) == chosen_sites(sites, ["all", "output"]) == [sites.output]
    with pytest.raises(SettingError, match="no block numbers, as this tower pools no CLS token"):
        chosen_sites(sites, ["0"])
