"""The built-in methods, built as the harness builds them, against the NumPy reference, on real activations."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.sites import default_site, reading
from vs2_plugin.demo.run import _TINY_CLIP
from vs2_plugin.modelstring import parse
from vs2_plugin.sae import TrainConfig, train_sae
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.gate import Gate

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

K = 8


@pytest.fixture(scope="module")
def activations():
    """The digits at the last block of the shipped tiny CLIP: ``[400, 128]``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    loaded = load_backbone(f"local-dir:{_TINY_CLIP}", "")
    pixels = (load_digits().images[:400] * 255 / 16).round().astype("uint8")
    images = torch.stack([loaded.transform(Image.fromarray(array).convert("RGB")) for array in pixels])
    site = default_site(loaded.model)
    with torch.no_grad(), reading(loaded.model, [site]) as found:
        loaded.model.encode_image(images)
    return found[site]


@pytest.fixture(scope="module", params=["relu", "abs"])
def trained(request, activations):
    config = TrainConfig(k=K, expansion_factor=2, samples=4000, activation=request.param)
    sae, mean, _ = train_sae(activations.numpy(), config, quiet=True)
    arrays = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    return sae, mean, arrays, request.param


CASES = {
    "vs2:X": lambda w, x, a: reference.vs2(w, x, K, 1.5, 2.1, a),
    "vs2:X@gamma=3@lam=0.5": lambda w, x, a: reference.vs2(w, x, K, 3, 0.5, a),
    "vs2:X@gamma=0.5@lam=2": lambda w, x, a: reference.vs2(w, x, K, 0.5, 2, a),
    "vs2:X@alpha=4": lambda w, x, a: reference.vs2(w, x, K, 5, 1, a),
    "rec:X": lambda w, x, a: reference.rec(w, x, K, a),
    "amp:X": lambda w, x, a: reference.amp(w, x, K, 1.5, a),
    "amp:X@gamma=0": lambda w, x, a: reference.amp(w, x, K, 0, a),
    "amp:X@gamma=-1": lambda w, x, a: reference.amp(w, x, K, -1, a),
}


def build(text, sae, mean):
    spec = parse(text)
    context = Context(torch.nn.Identity(), "visual", sae.config.d_in, sae, mean)
    return spec.method.build(context, **{option.name: spec.options[option.name] for option in spec.method.options})


@pytest.mark.parametrize("text", CASES)
def test_methods_agree_with_the_reference(text, trained, activations):
    sae, mean, arrays, activation = trained
    steered = build(text, sae, mean)(activations[:60]).detach().double().numpy()
    expected = np.stack([CASES[text](arrays, x, activation) for x in activations[:60].double().numpy()])
    scale = np.linalg.norm(activations.numpy(), axis=1).mean()
    assert np.abs(steered - expected).max() / scale < 1e-5
    moved = not np.allclose(expected, activations[:60].numpy(), atol=1e-3)
    assert moved  # the comparison is about something


def test_the_gate_agrees_with_the_reference(trained, activations):
    sae, mean, arrays, activation = trained
    x = activations[:60]
    ratios = np.array([reference.fvu(arrays, row, K, mean.double().numpy(), activation) for row in x.double().numpy()])
    tau = float(np.sort(ratios)[30:32].mean())  # between two images
    gate = Gate(build("vs2:X", sae, mean), sae, mean, tau)
    steered = gate(x)
    expected = [
        reference.gated(
            arrays, row, K, mean.double().numpy(), tau, reference.vs2(arrays, row, K, 1.5, 2.1, activation), activation
        )
        for row in x.double().numpy()
    ]
    assert np.abs(steered.double().numpy() - np.stack(expected)).max() / np.linalg.norm(x.numpy(), axis=1).mean() < 1e-5
    skipped = torch.from_numpy(ratios > tau)
    assert skipped.sum() == 29 and torch.equal(steered[skipped], x[skipped])
    assert gate.facts["coverage"] == pytest.approx(31 / 60) and gate.facts["mean_fvu"] == pytest.approx(
        ratios.mean(), rel=1e-4
    )
