"""Towers without a pooled CLS token, steered at their output: trained, stored and evaluated by the commands."""

import json

import numpy as np
import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae

from .conftest import few_digits, metrics

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "convnext": {  # a timm trunk, with the logit bias and the text tower class that SigLIP has
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "convnext_atto",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "width": 64, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
    "average": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
            "pool_type": "avg",
        },
        "text_cfg": TEXT,
    },
}


def make_tower(folder, name):
    """Write a tower with random weights into a folder, and return its name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = folder / name
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TOWERS[name], "preprocess_cfg": {"size": 32}})
    )
    torch.manual_seed(0)
    weights = open_clip.create_model(f"local-dir:{folder}").state_dict()  # random ones
    save_file({key: value.clone() for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{name}"


DATA = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few")
DATA += ("--num_workers", "0", "--quiet", "--no_amp")


@pytest.fixture
def few(in_demo):
    """A hundred of the digits of each split, as ``wds/few``."""
    few_digits(in_demo, "few", 0, count=100)
    return in_demo


@pytest.mark.parametrize("name", TOWERS)
def test_other_towers_are_steered_at_their_output(name, few, clip_benchmark):
    model = make_tower(few, name)
    assert train_sae.main(["--model", model, *DATA, "--samples", "1000", "--overwrite"]) == 0
    models = (model, f"vs2:{model}", f"vs2:{model}@alpha=0", f"rec:{model}@gate=0.9")
    code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "t-{model}.json")
    assert code == 0, error
    stock = metrics(few / f"t-{model}.json")
    unsteered = metrics(few / f"t-vs2:{model}@alpha=0.json")
    steered = metrics(few / f"t-vs2:{model}.json")
    assert {key: unsteered[key] for key in stock} == stock
    assert steered["vs2_site"] == "visual" and steered["vs2_mean_fvu"] > 0
    assert 0 <= metrics(few / f"t-rec:{model}@gate=0.9.json")["vs2_coverage"] <= 1
    code, error = clip_benchmark("eval", "--model", f"vs2:{model}@blocks=1", *DATA)
    assert code == 2 and "has no SAE at block 1" in error


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_other_towers_look_up_neighbours_too(name, few, clip_benchmark, monkeypatch):
    """The activation that is steered is the embedding itself, by which neighbours are looked up.

    The width of a timm trunk is told by running it, which no steering may see: each image counts once."""
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    model = make_tower(few, name)
    words = ("--samples", "500", "--overwrite", "--name", "neighbours")
    assert train_sae.main(["--model", model, *DATA, *words]) == 0
    models = [f"{method}:{model}@neighbours" for method in ("vs2pp", "clipsteer", "rag", "knn", "proto")]
    models += [f"vs2pp:{model}@neighbours@alpha=0"]
    code, error = clip_benchmark("eval", "--model", model, *models, *DATA, "--output", "n-{model}.json")
    assert code == 0, error
    stock, *steered, unsteered = (metrics(few / f"n-{one}.json") for one in (model, *models))
    assert {key: unsteered[key] for key in stock} == stock
    for found in steered:
        assert found["vs2_site"] == "visual" and 0 <= found["acc1"] <= 1
    assert steered[0]["vs2_mean_fvu"] > 0 and 0 < steered[0]["vs2_agreement"] <= 1
    images = np.load(few / f"n-{models[0]}.images.npz")
    assert images["fvu"].shape == images["target"].shape and len(images["target"]) == 100
    folder = Store.default().find("neighbours").gallery_folder / "0"
    assert (folder / "visual.npy").read_bytes() == (folder / "embedding.clip.npy").read_bytes()


@pytest.fixture
def architecture(tmp_path):
    """The name of a tiny architecture that open_clip knows for the while."""
    import open_clip
    from open_clip import factory

    paths, known = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    text = {**TEXT, "width": 16}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    (tmp_path / "tiny-ViT.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-ViT.json")
    yield "tiny-ViT"
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(known)


def test_files_of_weights_have_checkpoints_of_their_own_in_all_commands(few, architecture, clip_benchmark, capsys):
    """One holds weights, the other of that name a checkpoint of open_clip's training by several processes."""
    import open_clip
    import torch

    import vs2_plugin
    from vs2_plugin.cli import main

    files = [f"{folder}/epoch_5.pt" for folder in ("a", "b")]
    for seed, file in enumerate(files):
        (few / file).parent.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        weights = open_clip.create_model(architecture).state_dict()
        trained = {"epoch": 5, "state_dict": {f"module.{key}": value for key, value in weights.items()}}
        torch.save(trained if seed else weights, few / file)
    data = DATA[2:]
    for file in files:
        assert train_sae.main(["--model", architecture, "--pretrained", file, *data, "--samples", "500"]) == 0
    names = sorted(name for name in Store.default().names() if name.startswith("tiny-ViT"))
    assert len(names) == 2 and all(name.startswith("tiny-ViT_epoch-5-") for name in names)
    words = ("--model", architecture, f"vs2:{architecture}", "--pretrained", *files, *data)
    code, error = clip_benchmark("eval", *words, "--output", "w-{pretrained_full_path}-{model}.json")
    assert code == 0, error
    found = [metrics(few / f"w-{file.replace('/', '_')}-vs2:{architecture}.json")["vs2_checkpoint"] for file in files]
    assert sorted(found) == names
    swept = ["--model", f"vs2:{architecture}@alpha=1", "--pretrained", files[1], *data]
    assert main.main(["sweep", *swept, "--output", "s/{model}.json"]) == 0
    assert metrics(few / f"s/vs2:{architecture}@alpha=1.json")["vs2_checkpoint"] == found[1]
    model, *_ = vs2_plugin.load(f"vs2:{architecture}", files[0], dataset="wds/few")
    assert model.checkpoint.name == found[0]


WRONG_FILES = [
    (b"no weights" * 9, "it is not a file of weights ("),
    ("ViT", "its weights do not fit this architecture (RuntimeError: Error(s) in loading state_dict for CLIP"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_a_file_without_the_weights_is_told_in_a_sentence(content, message, few, architecture, capsys):
    import torch

    file = few / "wrong.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"state_dict": {"visual.proj": torch.zeros(3)}}, file)
    assert train_sae.main(["--model", architecture, "--pretrained", str(file), *DATA[2:], "--quiet"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"could not load {architecture} with weights '{file}': {message}" in said
    assert said.endswith(f"open_clip wrote for {architecture}, a state_dict or a checkpoint of a training, as .pt or "
                         ".safetensors")  # fmt: skip
