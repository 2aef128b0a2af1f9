"""SAE folders: our own, sparsify's, and broken ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vs2_plugin.errors import CheckpointError
from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, load_sae, save_sae
from vs2_plugin.sae.topk import SaeConfig, TopKSAE


def make_sae(activation="relu", num_latents=64):
    torch.manual_seed(0)
    sae = TopKSAE(SaeConfig(16, num_latents, 4, activation))
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.encoder.weight *= 0.8
        if activation == "relu":
            sae.encoder.bias.normal_()
    return sae


@pytest.fixture
def folder(tmp_path):
    save_sae(make_sae(), tmp_path / "a" / "sae")
    return tmp_path / "a" / "sae"


@pytest.mark.parametrize("activation", ["relu", "abs"])
@pytest.mark.parametrize("num_latents", [64, 70, 8])  # 70 and 8 are no multiple of the width
@torch.no_grad()
def test_round_trip(tmp_path, activation, num_latents):
    sae = make_sae(activation, num_latents)
    save_sae(sae, tmp_path)
    loaded = load_sae(str(tmp_path))
    assert loaded.config == sae.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    x = torch.randn(20, 16)
    assert torch.equal(loaded(x), sae(x))


@torch.no_grad()
def test_weights_in_half_precision_are_read_as_float32(folder):
    save_file({name: t.half() for name, t in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE)
    loaded = load_sae(folder)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(loaded.W_dec, make_sae().W_dec, atol=1e-3, rtol=0)


@torch.no_grad()
def test_sparsify_reads_ours(sparsify, folder):
    theirs, x = sparsify.SparseCoder.load_from_disk(folder), torch.randn(20, 16)
    torch.testing.assert_close(theirs(x).sae_out, make_sae()(x), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.k == 4


@pytest.mark.parametrize("size", [{"expansion_factor": 4}, {"num_latents": 70}])
@torch.no_grad()
def test_we_read_sparsifys(sparsify, tmp_path, size):
    theirs = sparsify.SparseCoder(16, sparsify.SparseCoderConfig(k=4, **size))
    theirs.b_dec.normal_()
    theirs.encoder.bias.normal_()
    theirs.save_to_disk(tmp_path)
    ours, x = load_sae(tmp_path), torch.randn(20, 16)
    assert ours.config == SaeConfig(16, size.get("num_latents", 64), 4)
    torch.testing.assert_close(ours(x), theirs(x).sae_out, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_signed_one_of_early_sparsify_keeps_negative_latents(tmp_path):
    made, x = make_sae("relu"), torch.randn(20, 16)
    made.encoder.bias.normal_()
    save_sae(made, tmp_path)
    edit(tmp_path, signed=True)
    drop(tmp_path, "activation")
    pre = (x - made.b_dec) @ made.encoder.weight.T + made.encoder.bias
    places = pre.abs().topk(made.config.k).indices
    code = torch.zeros_like(pre).scatter(1, places, pre.gather(1, places))
    torch.testing.assert_close(load_sae(tmp_path)(x), code @ made.W_dec + made.b_dec, atol=1e-5, rtol=1e-5)
    edit(tmp_path, signed=False)
    assert load_sae(tmp_path).config.activation == "relu"


def test_sparsify_refuses_an_abs_sae(sparsify, tmp_path):
    # read as "topk" it would drop every negative latent without a word
    save_sae(make_sae("abs"), tmp_path)
    with pytest.raises(Exception, match="got abs|Unknown activation: abs"):
        sparsify.SparseCoder.load_from_disk(tmp_path)(torch.randn(20, 16))


def edit(folder, **facts):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def drop(folder, *names):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in names}))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), CONFIG_FILE),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "cut config": (lambda f: truncate(f / CONFIG_FILE), CONFIG_FILE),
    "cut weights": (lambda f: truncate(f / WEIGHTS_FILE), WEIGHTS_FILE),
    "config of bytes": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), CONFIG_FILE),
    "empty weights": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), WEIGHTS_FILE),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "list"),
    "no k": (lambda f: drop(f, "k"), "'k'"),
    "no d_in": (lambda f: drop(f, "d_in"), "'d_in'"),
    "no latents": (lambda f: drop(f, "num_latents", "expansion_factor"), "expansion_factor"),
    "null k": (lambda f: edit(f, k=None), "k is None"),
    "k of text": (lambda f: edit(f, k="4"), "k is '4'"),
    "d_in of text": (lambda f: edit(f, d_in="16", num_latents=0), "d_in"),
    "k too large": (lambda f: edit(f, k=65), "k is 65"),
    "other width": (lambda f: edit(f, d_in=17), r"\(64, 17\)"),
    "other latents": (lambda f: edit(f, num_latents=65), r"\(65, 16\)"),
    "group-max": (lambda f: edit(f, activation="groupmax"), "groupmax"),
    "activation no text": (lambda f: edit(f, activation=["topk"]), "activation"),
    "transcoder": (lambda f: edit(f, transcode=True), "transcode"),
    "skip connection": (lambda f: edit(f, skip_connection=True), "skip_connection"),
    "weight missing": (lambda f: edit_weights(f, lambda w: w.pop("b_dec")), "b_dec"),
    "weight too many": (lambda f: edit_weights(f, lambda w: w.update(W_skip=torch.zeros(2))), "W_skip"),
    "transposed": (lambda f: edit_weights(f, lambda w: w.update(W_dec=w["W_dec"].T.contiguous())), r"\(16, 64\)"),
    "true d_in": (lambda f: edit(f, d_in=True), "d_in is True; expected a whole number"),
    "d_in of a fraction": (lambda f: edit(f, d_in=16.0), "d_in is 16.0"),
    "k of a fraction": (lambda f: edit(f, k=64.0), "k is 64.0"),
    "absurd width": (lambda f: edit(f, d_in=10**12), "d_in is 1000000000000; expected a whole number, 1 to 2147483647"),
    "absurd latents": (lambda f: edit(f, num_latents=10**9), r"\(1000000000, 16\)"),
    "text times a number": (lambda f: edit(f, d_in="16", num_latents=0, expansion_factor=10**12), "d_in is '16'"),
    "beyond str": (lambda f: (f / CONFIG_FILE).write_text('{"d_in": ' + "9" * 5000 + "}"), "4300"),
    "nested without end": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "recursion"),
    "nested activation": (lambda f: edit(f, activation=json.loads("[" * 300 + "]" * 300)), r"activation \[\[\["),
    "null d_in": (lambda f: edit(f, d_in=None), "d_in is None"),
    "whole weights": (lambda f: edit_weights(f, lambda w: w.update(b_dec=torch.zeros(16, dtype=torch.int8))), "int8"),
    "tiny floats": (
        lambda f: edit_weights(f, lambda w: w.update(b_dec=torch.zeros(16).to(torch.float8_e4m3fn))), "float8_e4m3fn"
    ),
    "complex": (lambda f: edit_weights(f, lambda w: w.update(b_dec=torch.zeros(16, dtype=torch.complex64))), "complex"),
    "beyond float32": (
        lambda f: edit_weights(f, lambda w: w.update(b_dec=torch.full((16,), 1e300, dtype=torch.double))), "not finite"
    ),
    "config is a folder": (lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).mkdir()), CONFIG_FILE),
    "weights are a folder": (lambda f: ((f / WEIGHTS_FILE).unlink(), (f / WEIGHTS_FILE).mkdir()), WEIGHTS_FILE),
    "config leads nowhere": (
        lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).symlink_to("nowhere")), CONFIG_FILE
    ),
    "not finite": (lambda f: edit_weights(f, lambda w: w["W_dec"].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_sentence(folder, case):
    damage, named = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_sae(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_sae(tmp_path / "nowhere")
