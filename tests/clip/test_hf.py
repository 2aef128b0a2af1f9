"""Models of transformers under the interface of open_clip's, against the library itself and against open_clip."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vs2_plugin.clip import hf
from vs2_plugin.clip.backbone import check_backbone, load_backbone
from vs2_plugin.clip.edits import editing, reading
from vs2_plugin.clip.hf import find_folder, revision_of
from vs2_plugin.clip.sites import OUTPUT, Site, finish
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import HubError, TowerError

from . import library
from .library import TINY_CLIP

TEXTS = ["a photo of the number 7", "x", "a photo " * 9]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The name of a random CLIPModel in a folder."""
    return library.write_clip(tmp_path_factory.mktemp("hf") / "clip")


@pytest.fixture(scope="module")
def models(clip, tmp_path_factory):
    """Kind -> the name of a random model of it."""
    folder = tmp_path_factory.mktemp("hf")
    siglips = {kind: getattr(library, f"write_{kind}")(folder / kind) for kind in ("siglip", "siglip2")}
    return {"clip": clip, **siglips}


@pytest.fixture
def folder(clip, tmp_path):
    """A copy of its folder, to be damaged."""
    return Path(shutil.copytree(clip.removeprefix("hf:"), tmp_path / "clip"))


@pytest.fixture(scope="module")
def images():
    """Images of several shapes and colour modes."""
    pixels = torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    return [Image.fromarray(pixels), Image.fromarray(pixels[:20]), Image.fromarray(pixels).convert("L").convert("P")]


# ---- the library's own features


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_images_and_texts_have_the_features_that_the_library_gives_them(kind, models, images):
    from transformers import AutoModel, AutoProcessor

    folder = models[kind].removeprefix("hf:")
    loaded, model = load_backbone(models[kind], "ignored"), AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prepared = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    x = torch.stack([loaded.transform(image) for image in images])
    assert x.equal(prepared["pixel_values"])
    assert loaded.model.encode_image(x).equal(model.get_image_features(**prepared).pooler_output)
    words = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "pt"}
    features = model.get_text_features(**processor.tokenizer(TEXTS, **words)).pooler_output
    assert loaded.model.encode_text(loaded.tokenizer(TEXTS)).sub(features).abs().max() < 1e-6
    assert loaded.model.encode_text(loaded.tokenizer(TEXTS[0])).shape == features[:1].shape
    both = loaded.model(x, loaded.tokenizer(TEXTS))
    assert both[0].norm(dim=-1).sub(1).abs().max() < 1e-6 and both[2] == model.logit_scale.exp()


def test_a_tower_without_cls_token_is_steered_at_its_output(models):
    assert load_backbone(models["clip"], "").sites.output == Site(OUTPUT, 24)
    for kind in ("siglip", "siglip2"):
        sites = load_backbone(models[kind], "").sites
        assert sites.blocks == () and sites.default == Site(OUTPUT, 32)


@torch.no_grad()
def test_a_clip_of_open_clip_has_the_same_activations_under_the_same_names(tmp_path):
    ours, theirs = load_backbone(f"local-dir:{TINY_CLIP}", ""), load_backbone(library.write_tiny(tmp_path / "tiny"), "")
    assert ours.sites == theirs.sites and len(ours.sites.blocks) == 4
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with reading(ours.model, ours.sites.blocks) as expected, reading(theirs.model, theirs.sites.blocks) as found:
        embeddings = ours.model.encode_image(x), theirs.model.encode_image(x)
    for site in ours.sites.blocks:
        assert found[site].sub(expected[site]).abs().max() < 1e-5
    assert embeddings[1].sub(embeddings[0]).abs().max() < 1e-5
    texts = [one.model.encode_text(one.tokenizer(TEXTS)) for one in (ours, theirs)]
    assert texts[1].sub(texts[0]).abs().max() < 1e-5


# ---- reading and steering


@torch.no_grad()
def test_steering_reaches_the_embedding_as_it_does_in_the_library(clip, batch):
    loaded = load_backbone(clip, "")
    model, last = loaded.model, loaded.sites.blocks[-1]
    with reading(model, [last]) as seen:
        plain = model.encode_image(batch)
    shift = torch.ones(32)
    with editing(model, last, lambda x: x + shift):
        steered = model.encode_image(batch)
    trunk = model.visual.trunk
    assert steered.equal(model.visual.projection(trunk.post_layernorm(seen[last] + shift)))
    assert model.encode_image(batch).equal(plain) and finish(model, last, seen[last]).equal(plain)
    with editing(model, loaded.sites.output, torch.neg):
        assert model.encode_image(batch).equal(-plain)


def test_it_goes_to_loader_workers_and_into_copies(clip, images):
    loaded = load_backbone(clip, "")
    transform, tokenizer = pickle.loads(pickle.dumps((loaded.transform, loaded.tokenizer)))
    assert transform(images[0]).equal(loaded.transform(images[0]))
    assert tokenizer(TEXTS).equal(loaded.tokenizer(TEXTS))
    names = [name for name, _ in loaded.model.named_parameters()]
    assert set(loaded.model.state_dict()) == {*names}  # each weight once


# ---- the identity of a tower


def test_a_tower_is_the_same_wherever_its_folder_lies(clip, folder):
    loaded = [load_backbone(name, "") for name in (clip, f"hf:{folder}")]
    towers = [Tower.of(one.model, one.transform) for one in loaded]
    assert towers[0] == towers[1] == Tower(**json.loads(json.dumps(towers[0].to_json())))
    assert towers[0].activations == ["QuickGELUActivation"] and str(folder) not in str(towers[1].to_json())
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": 2}))
    other = load_backbone(f"hf:{folder}", "")
    assert "interpolation bicubic, not bilinear" in towers[0].difference(Tower.of(other.model, other.transform))


# ---- a hub


@pytest.fixture
def shared(hub, folder):
    """The hub, which has the model as org/clip, and much else beside it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.commit("org/clip", {**files, "flax_model.msgpack": b"x", "modeling_own.py": b"1 / 0"})
    return hub


def test_a_repository_is_fetched_once_and_its_commit_is_told(shared, clip, batch, monkeypatch):
    sha, _ = shared.files("org/clip")
    loaded = load_backbone("hf:org/clip", "")
    assert not any(path.endswith(("msgpack", ".py")) for _, path in shared.asked if "resolve" in path)
    shared.asked.clear()
    assert load_backbone("hf:org/clip", "").model.encode_image(batch).equal(loaded.model.encode_image(batch))
    assert revision_of("hf:org/clip") == sha and revision_of(clip) is None
    assert load_backbone(f"hf:org/clip#{sha}", "").model.encode_image(batch).shape == (4, 24)
    assert not any("resolve" in path for _, path in shared.asked)
    with pytest.raises(HubError, match="refuses org/none"):
        load_backbone("hf:org/none", "")


def test_a_damaged_file_in_the_cache_is_named(shared, folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    shared.commit("org/parts", {path.name: path.read_bytes() for path in folder.iterdir()})
    load_backbone("hf:org/parts", "")
    (find_folder("hf:org/parts") / "model.safetensors.index.json").write_text("{")
    with pytest.raises(TowerError, match=r"model\.safetensors\.index\.json cannot be read"):
        load_backbone("hf:org/parts", "")


def test_another_cache_can_be_named(shared, tmp_path):
    load_backbone("hf:org/clip", "", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "models--org--clip").is_dir()


def test_weights_in_a_pickle_are_read_as_tensors_only(hub, folder, batch, tmp_path):
    from safetensors.torch import load_file

    plain = load_backbone(f"hf:{folder}", "").model.encode_image(batch)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "weights")
    hub.commit("org/old", {**files, "pytorch_model.bin": (tmp_path / "weights").read_bytes()})
    assert load_backbone("hf:org/old", "").model.encode_image(batch).equal(plain)
    hub.commit("org/evil", {**files, "pytorch_model.bin": pickle.dumps(Evil(tmp_path / "harm"))})
    with pytest.raises(TowerError, match="could not load hf:org/evil: "):
        load_backbone("hf:org/evil", "")
    assert not (tmp_path / "harm").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- what cannot be loaded


def edit_config(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def fewer_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": one for name, one in weights.items()}, folder / "model.safetensors")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def larger_images(folder):
    file = folder / "preprocessor_config.json"
    crop = {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 48}}
    file.write_text(json.dumps(json.loads(file.read_text()) | crop))


def smaller_vocabulary(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["vocab_size"] = 9
    file.write_text(json.dumps(values))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "token_embedding" in name)
    save_file({**weights, name: weights[name][:9].clone()}, folder / "model.safetensors")


UNREADABLE = {
    "no config": (without("config.json"), "no config.json in .*; expected the model and its processor, each"),
    "no weights": (without("model.safetensors"), "no model.safetensors in .*save_pretrained"),
    "no processor": (without("preprocessor_config.json"), "no preprocessor_config.json in .*processor.save_pretrained"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json in "),
    "a part of the weights": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
        "no model-2.safetensors, which model.safetensors.index.json names",
    ),
    "no JSON": (write("config.json", "{"), r"config.json cannot be read \(JSONDecodeError"),
    "another kind": (edit_config(model_type="bert"), "is of the kind 'bert'; expected .* CLIPModel or SiglipModel"),
    "code of its own": (edit_config(model_type="own", auto_map={"AutoModel": "own.Own"}), "is of the kind 'own'; "),
    "NaFlex": (edit_config(model_type="siglip2"), r"of the kind 'siglip2' \(NaFlex: images of any shape.*\); expected"),
    "weights of other names": (fewer_weights, r"its weights lack logit_scale and \d+ more of the model that config"),
    "a torn file": (truncated, "could not load .*: .*Error"),
    "another processor": (larger_images, r"gives images \[3, 48, 48\], but its tower takes \[3, 32, 32\]; expected"),
    "another tokenizer": (smaller_vocabulary, "its tokenizer has 74 tokens, but its text tower 9; expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_loaded_is_told_in_a_sentence(name, folder):
    change, message = UNREADABLE[name]
    change(folder)
    with pytest.raises(TowerError, match=message) as error:
        load_backbone(f"hf:{folder}", "")
    assert "\n" not in str(error.value)


NAMES = [
    ("hf:", "no config.json in ."),
    ("hf:clip", "no folder clip; expected one that save_pretrained wrote, or hf:OWNER/NAME"),
    ("hf:./nowhere", "no folder nowhere"),
    (f"hf:{TINY_CLIP}", f"is a folder that open_clip wrote; name it local-dir:{TINY_CLIP}"),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_names_are_checked_before_anything_is_loaded(name, message):
    with pytest.raises(TowerError) as error:
        check_backbone(name, "")
    assert message in str(error.value)
    check_backbone("hf:owner/name#v1", "")


def test_where_the_package_is_missing_or_too_old_one_sentence_says_so(clip, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(TowerError, match=r"need transformers 5 or newer, and 4.57.6 is installed; update it with: pip"):
        load_backbone(clip, "")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TowerError, match=r"need the package transformers .*: pip install 'vs2-plugin\[transformers\]'"):
        load_backbone(clip, "")


def test_a_tokenizer_of_a_missing_package_is_told(models, monkeypatch):
    from transformers import AutoTokenizer

    def missing(*args, **kwargs):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(
        TowerError, match=r"a package that is not installed \(SiglipTokenizer requires.*; install it with"
    ):
        load_backbone(models["siglip"], "")
    assert hf._INSTALL == "pip install 'vs2-plugin[transformers]'"
