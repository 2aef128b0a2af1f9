"""Retrieval encoders of timm, with random weights: what they are fed, and how the same one is found again."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.gallery.encoders import load_encoder

timm = pytest.importorskip("timm")

CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "size": [32, 32]}
NAMES = ["test_vit", "test_resnet"]


@pytest.fixture(scope="module")
def encoders():
    return {name: load_encoder(name, "", CLIP, "cpu") for name in NAMES}


def colours(kind, size):
    if kind == "constant":
        return torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, *size).contiguous()
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (48, 80), (160, 160)])
@pytest.mark.parametrize("kind", ["constant", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_images_reach_the_model_in_its_own_size_and_normalisation(name, kind, size, encoders, monkeypatch):
    encoder, seen = encoders[name], []
    config = timm.get_pretrained_cfg(name)
    original = colours(kind, size)
    monkeypatch.setattr(encoder.model, "forward", lambda images: seen.append(images) or images.mean((2, 3)))
    encoder(normalize(original, CLIP["mean"], CLIP["std"]))
    own = list(config.input_size[-2:])
    interpolation = InterpolationMode(config.interpolation)
    resized = resize(original, own, interpolation, antialias=True).clamp(0, 1) if list(size) != own else original
    torch.testing.assert_close(seen[0], normalize(resized, config.mean, config.std), atol=2e-5, rtol=1e-5)
    assert seen[0].shape == (2, 3, *own)
    if kind == "constant":
        expected = (torch.tensor([0.2, 0.5, 0.9]) - torch.tensor(config.mean)) / torch.tensor(config.std)
        torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_is_the_models_without_its_classifier(name, encoders):
    encoder = encoders[name]
    original = colours("random", encoder.size)
    config = timm.get_pretrained_cfg(name)
    whole = timm.create_model(name, num_classes=0).eval()
    whole.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        found = encoder(normalize(original, CLIP["mean"], CLIP["std"]))
        torch.testing.assert_close(found, whole(normalize(original, config.mean, config.std)), atol=1e-4, rtol=1e-4)
    assert found.shape == (2, encoder.width) and found.dtype == torch.float32
    assert not torch.allclose(found[0], found[1])


def test_values_that_clips_resampling_pushed_out_of_range_are_clamped(encoders, monkeypatch):
    encoder, seen = encoders["test_vit"], []
    monkeypatch.setattr(encoder.model, "forward", lambda images: seen.append(images) or images.mean((2, 3)))
    encoder(torch.full((1, 3, 160, 160), 100.0))
    white = (1 - encoder.mean.flatten()) / encoder.std.flatten()
    torch.testing.assert_close(seen[0].amax((0, 2, 3)), white)


def test_half_precision_images_are_taken(encoders):
    images = normalize(colours("random", (32, 32)), CLIP["mean"], CLIP["std"])
    with torch.no_grad():
        found = encoders["test_vit"](images.bfloat16())
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


# ---- weights


def test_random_weights_are_the_same_every_time_and_disturb_nobody(encoders):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = load_encoder("test_vit", "", CLIP, "cpu")
    assert torch.rand(1) == expected
    for name, value in encoders["test_vit"].model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_a_file_of_weights_makes_the_round_trip(tmp_path, encoders):
    from safetensors.torch import save_file

    torch.manual_seed(9)
    other = timm.create_model("test_vit", num_classes=0)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    loaded = load_encoder("test_vit", file, CLIP, "cpu")
    facts = loaded.identity("test_vit", file)
    assert (facts.model, facts.weights, facts.width) == ("test_vit", file, loaded.width)
    for name, value in other.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    load_encoder("test_vit", file, CLIP, "cpu", expected=facts)

    save_file({name: value + 1 for name, value in other.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="test_vit has other weights than the one that the gallery was made with"):
        load_encoder("test_vit", file, CLIP, "cpu", expected=facts)
    with pytest.raises(CheckpointError, match="other weights"):
        load_encoder("test_vit", "", CLIP, "cpu", expected=facts)


def test_weights_with_a_classifier_are_taken_too(tmp_path):
    """timm's own files hold the classifier that a retrieval encoder leaves out."""
    from safetensors.torch import save_file

    torch.manual_seed(9)
    whole = timm.create_model("test_vit").state_dict()
    save_file(whole, tmp_path / "w.safetensors")
    loaded = load_encoder("test_vit", str(tmp_path / "w.safetensors"), CLIP, "cpu").model.state_dict()
    assert loaded and all(torch.equal(value, whole[name]) for name, value in loaded.items())


def not_there(folder):
    return "no-such-file.pth"


def of_another_model(folder):
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "w.pth")
    return str(folder / "w.pth")


def garbage(folder):
    (folder / "w.pth").write_bytes(b"garbage")
    return str(folder / "w.pth")


@pytest.mark.parametrize("weights", [not_there, of_another_model, garbage])
def test_weights_that_do_not_fit_are_a_data_error_in_one_line(weights, tmp_path):
    with pytest.raises(DataError, match="retrieval encoder test_vit") as error:
        load_encoder("test_vit", weights(tmp_path), CLIP, "cpu")
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_names_like_it():
    with pytest.raises(
        DataError, match=r"retrieval encoder no_such_model, which timm does not know; expected one of timm\.list_models"
    ):
        load_encoder("no_such_model", "", CLIP, "cpu")
    with pytest.raises(DataError, match=r"retrieval encoder dinov2, which timm .* for example vit_\w+dinov2"):
        load_encoder("dinov2", "", CLIP, "cpu")


def test_weights_that_cannot_be_fetched_are_a_data_error(monkeypatch):
    def no_hub(*given, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("vs2_plugin.gallery.encoders.require_hub", no_hub)
    with pytest.raises(DataError, match=r"ConnectionError: no route to host; without a network, .*: test_vit,FILE"):
        load_encoder("test_vit", None, CLIP, "cpu")


def test_dinov2_has_its_own_size_and_normalisation():
    encoder = load_encoder("vit_small_patch14_dinov2", "", CLIP, "cpu")
    assert (encoder.size, encoder.width, encoder.mode) == ((518, 518), 384, "bicubic")
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert encoder.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert encoder.clip_mean.flatten().tolist() == pytest.approx(CLIP["mean"])
