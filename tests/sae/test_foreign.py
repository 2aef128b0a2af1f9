"""SAEs of other libraries, held against these libraries where they are there, and against their formulas."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vs2_plugin.errors import CheckpointError
from vs2_plugin.sae.files import load_sae, save_sae
from vs2_plugin.sae.foreign import read_foreign, write_saelens
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.steering.move import Code, Move, vs2_steer

D, N, K = 16, 40, 5
NORMALIZED = ["none", "layer_norm", "constant_norm_rescale"]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def x():
    return 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.7


def write(folder, facts, weights, library="saelens"):
    folder.mkdir(parents=True, exist_ok=True)
    if library == "saelens":
        save_file(weights, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(facts))
    else:
        torch.save(weights, folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps(facts))
    return folder


def saelens(**changed):
    return {"architecture": "topk", "d_in": D, "d_sae": N, "k": K, "dtype": "float32", "device": "cpu", **changed}


def prisma(**changed):
    return {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D,
        "normalize_activations": "layer_norm", "cls_token_only": True, "hook_point": "blocks.11.hook_resid_post",
        "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "is_transcoder": False, **changed,
    }  # fmt: skip


def reference(x, weights, *, normalized="none", subtract=True, rescale=False, absolute=False):
    """The reconstruction by the formulas of SAELens and Prisma, densely, in double precision."""
    x, w = x.double().numpy(), {name: tensor.double().numpy() for name, tensor in weights.items()}
    mean, out, divisor = np.zeros((len(x), 1)), np.ones((len(x), 1)), np.ones((len(x), 1))
    if normalized == "layer_norm":
        mean, out = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        divisor = out + 1e-5
    if normalized == "constant_norm_rescale":
        out = divisor = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    z = (x - mean) / divisor - subtract * w["b_dec"]
    norm = np.linalg.norm(w["W_dec"], axis=1) if rescale else np.ones(N)
    pre = (z @ w["W_enc"] + w["b_enc"]) * norm
    order = np.argsort(-(abs(pre) if absolute else pre), axis=1)[:, :K]
    code = np.zeros_like(pre)
    kept = np.take_along_axis(pre, order, 1)
    np.put_along_axis(code, order, kept if absolute else np.maximum(kept, 0), 1)
    return torch.from_numpy(((code / norm) @ w["W_dec"] + w["b_dec"]) * out + mean).float()


@pytest.mark.parametrize("normalized", NORMALIZED)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_saelens_reconstructs_as_by_its_formulas(tmp_path, weights, x, normalized, subtract, rescale, absolute):
    facts = saelens(
        architecture="abstopk" if absolute else "topk", normalize_activations=normalized,
        apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale,
    )  # fmt: skip
    found = read_foreign(write(tmp_path / "sae", facts, weights))
    wanted = reference(x, weights, normalized=normalized, subtract=subtract, rescale=rescale, absolute=absolute)
    torch.testing.assert_close(found.sae(x), wanted, rtol=1e-4, atol=1e-3)
    assert found.library == "SAELens" and found.block is None


@pytest.mark.parametrize("normalized", NORMALIZED)
def test_prisma_reconstructs_as_by_its_formulas(tmp_path, weights, x, normalized):
    folder = write(tmp_path / "sae", prisma(normalize_activations=normalized), weights, "prisma")
    found = read_foreign(folder)
    torch.testing.assert_close(found.sae(x), reference(x, weights, normalized=normalized), rtol=1e-4, atol=1e-3)
    assert (found.library, found.block, found.sae.config.k) == ("Prisma", 11, K)
    assert found.model == "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"


@pytest.mark.parametrize("normalized", NORMALIZED)
@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_round_trip_by_files_of_saelens(tmp_path, x, normalized, activation):
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(D, N, K, activation, normalized)).eval()
    torch.nn.init.normal_(sae.b_dec)
    write_saelens(sae, tmp_path / "out", model="ViT-B-32", block=3)
    found = read_foreign(tmp_path / "out")
    assert found.sae.config == sae.config and found.block == 3 and found.model == "ViT-B-32"
    assert torch.equal(found.sae(x), sae(x))


def test_the_output_embedding_has_no_name_in_saelens(tmp_path):
    write_saelens(TopKSAE(SaeConfig(D, N, K)), tmp_path / "out", model="ViT-B-32", block=None)
    assert read_foreign(tmp_path / "out").block is None


@pytest.mark.parametrize("normalized", NORMALIZED)
def test_saelens_itself_agrees_both_ways(tmp_path, weights, x, normalized):
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    facts = saelens(normalize_activations=normalized, rescale_acts_by_decoder_norm=True)
    theirs = sae_lens.SAE.load_from_disk(write(tmp_path / "theirs", {**facts, "metadata": {}}, weights))
    torch.testing.assert_close(read_foreign(tmp_path / "theirs").sae(x), theirs(x), rtol=1e-4, atol=1e-4)
    theirs.save_model(tmp_path / "saved")
    torch.testing.assert_close(read_foreign(tmp_path / "saved").sae(x), theirs(x), rtol=1e-4, atol=1e-4)
    for activation in ("relu", "abs"):
        ours = TopKSAE(SaeConfig(D, N, K, activation, normalized)).eval()
        torch.nn.init.normal_(ours.b_dec)
        write_saelens(ours, tmp_path / activation, model="ViT-B-32", block=11)
        loaded = sae_lens.SAE.load_from_disk(tmp_path / activation)
        torch.testing.assert_close(loaded(x), ours(x), rtol=1e-4, atol=1e-4)
        assert loaded.cfg.metadata.hook_name == "blocks.11.hook_resid_post"


def test_sparsify_folder_tells_its_block(tmp_path):
    sae = TopKSAE(SaeConfig(D, N, K))
    save_sae(sae, tmp_path / "layers.7")
    found = read_foreign(tmp_path / "layers.7")
    assert (found.library, found.block) == ("sparsify", 7)
    assert read_foreign(tmp_path).block == 7  # the only one in there
    save_sae(sae, tmp_path / "layers.8")
    with pytest.raises(CheckpointError, match=r"several SAEs; name the folder of one: layers\.7, layers\.8"):
        read_foreign(tmp_path)


@pytest.mark.parametrize("normalized", NORMALIZED)
@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_normalisation_is_kept_in_our_own_files(tmp_path, x, normalized, activation):
    sae = TopKSAE(SaeConfig(D, N, K, activation, normalized))
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert loaded.config == sae.config and torch.equal(loaded(x), sae(x))
    plain = json.loads((tmp_path / "cfg.json").read_text())["activation"] == "topk"
    assert plain == ((normalized, activation) == ("none", "relu"))  # sparsify reads no other


@pytest.mark.parametrize("normalized", NORMALIZED)
@torch.no_grad()
def test_codes_are_in_the_units_of_the_activations(x, normalized):
    sae = TopKSAE(SaeConfig(D, N, K, "relu", normalized))
    torch.nn.init.normal_(sae.b_dec)
    code = Code.of(sae, x)
    torch.testing.assert_close(code.reconstruction, sae(x))
    torch.testing.assert_close(code[torch.tensor([3, 1])].reconstruction, sae(x[[3, 1]]))
    torch.testing.assert_close(Move(code, 1.0, base="b_dec", keep_norm=False).apply(x), sae(x))
    # Steering is of the activation: x is moved by W_decᵀ c, which is what the reconstruction adds to its origin.
    moved = x + 0.5 * (sae(x) - sae.origin(x))
    norm = x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(vs2_steer(x, sae, 0.5), moved * norm / moved.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"architecture": "jumprelu"}, "architecture 'jumprelu', which does not keep a fixed number"),
        ({"architecture": "standard", "activation_fn": "relu"}, "'standard' with relu"),
        ({"architecture": ["topk"]}, "architecture"),
        ({"k": None}, "k is None"),
        ({"k": N + 1}, "more than the 40 latents"),
        ({"normalize_activations": "expected_average_only_in"}, "a factor that is not in its files; fold it in"),
        ({"normalize_activations": True}, "a factor that is not in its files; fold it in"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"reshape_activations": "hook_z"}, "reshapes activations"),
        ({"is_transcoder": True}, "it is a transcoder"),
        ({"transcoder_with_skip_connection": True}, "it has a skip connection"),
        ({"use_patches_only": True}, "it was trained on patches"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "is for blocks.3.hook_mlp_out"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "is for blocks.0.hook_resid_pre"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_with_the_reason(tmp_path, weights, changed, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_foreign(write(tmp_path / "sae", saelens(**changed), weights))


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_codes_that_fine_tuning_scales_are_refused_and_a_factor_of_one_is_none(tmp_path, weights, factor):
    scaled = {**weights, "scaling_factor": torch.full((N,), factor)}
    folder = write(tmp_path / "sae", saelens(finetuning_scaling_factor=True), scaled)
    if factor == 1:
        assert read_foreign(folder).sae.config.num_latents == N
        return
    with pytest.raises(CheckpointError, match="scales each latent by a factor of fine-tuning"):
        read_foreign(folder)
    assert read_foreign(write(tmp_path / "plain", saelens(), scaled)).sae.config.num_latents == N  # not used


@pytest.mark.parametrize(
    ("hook", "block"), [("blocks.4.hook_resid_pre", 3), ("vision_model.encoder.layers.9", 9), ("visual", None)]
)
def test_hooks_are_blocks(tmp_path, weights, hook, block):
    assert read_foreign(write(tmp_path / "sae", saelens(metadata={"hook_name": hook}), weights)).block == block


class _Runs:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_damaged_files_are_refused_and_no_code_runs(tmp_path, weights):
    with pytest.raises(CheckpointError, match="no folder"):
        read_foreign(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"expected cfg.json with sae.safetensors \(sparsify\)"):
        read_foreign(tmp_path)
    folder = write(tmp_path / "a", saelens(), weights)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds list"):
        read_foreign(folder)
    folder = write(tmp_path / "b", saelens(), {**weights, "W_dec": weights["W_dec"][:-1]})
    with pytest.raises(CheckpointError, match="do not match each other"):
        read_foreign(folder)
    folder = write(tmp_path / "c", saelens(), {**weights, "b_enc": torch.full((N,), torch.nan)})
    with pytest.raises(CheckpointError, match="not finite"):
        read_foreign(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        read_foreign(folder)
    folder = write(tmp_path / "d", prisma(), weights, "prisma")
    (folder / "weights.pt").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        read_foreign(folder)
    write(tmp_path / "e", prisma(), {"W_enc": weights["W_enc"], "b_enc": 3}, "prisma")
    with pytest.raises(CheckpointError, match="lack W_dec, b_enc, b_dec"):
        read_foreign(tmp_path / "e")
    assert set(load_file(write(tmp_path / "f", saelens(), weights) / "sae_weights.safetensors")) == set(weights)
