"""Latents by hand: each chosen one multiplied, all else as it was; and what cannot be chosen."""

import json

import numpy as np
import pytest
import torch

from vs2_plugin.errors import ModelStringError
from vs2_plugin.modelstring import parse
from vs2_plugin.steering.batch import Batch, steer
from vs2_plugin.steering.by_hand import ByHand, factors_of
from vs2_plugin.steering.context import Context


@pytest.fixture(scope="module", params=["relu", "abs"])
def sae(request, make_sae):
    return make_sae(activation=request.param)


@pytest.fixture(scope="module")
def x():
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 3


def build(text, sae):
    spec = parse(f"latents:X{text}")
    options = {option.name: spec.options[option.name] for option in spec.method.options}
    return spec.method.build(Context(torch.nn.Identity(), "visual", 32, sae), **options)


def by_numpy(x, sae, factors):
    """``x`` without ``c_j w_j`` of each chosen latent, and ``f_j c_j w_j`` in its place; in float64."""
    dense = torch.zeros(len(x), sae.config.num_latents).scatter(1, sae.encode(x).indices, sae.encode(x).values)
    changed, weights = x.double().numpy().copy(), sae.W_dec.double().numpy()
    for row, code in zip(changed, dense.double().numpy()):
        for latent, factor in factors.items():
            row += (factor - 1) * code[latent] * weights[latent]
    return changed


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("@suppress=3", {3: 0}),
        ("@suppress=3+63+0", {3: 0, 63: 0, 0: 0}),
        ("@boost=7", {7: 2}),
        ("@suppress=3@boost=7+8@factor=-1.5", {3: 0, 7: -1.5, 8: -1.5}),
    ],
)
def test_chosen_latents_are_multiplied_and_nothing_else_changes(text, factors, sae, x):
    steered = steer(build(text, sae), x, Batch())
    np.testing.assert_allclose(steered.numpy(), by_numpy(x, sae, factors), rtol=1e-5, atol=1e-5)
    active = (sae.encode(x).indices[..., None] == torch.tensor(list(factors))) & (sae.encode(x).values != 0)[..., None]
    touched = active.flatten(1).any(1)
    assert torch.equal(steered[~touched], x[~touched]) and 0 < touched.sum() < len(x)
    assert not torch.isclose(steered[touched], x[touched]).all(1).any()


def test_a_move_tells_the_chosen_latents_that_are_active_only(sae, x):
    move = build("@suppress=3@boost=7", sae)(x, batch=Batch())
    code, seen = sae.encode(x), set()
    for row in range(len(x)):
        latents, activations, amounts = move.code.active(row)
        known = dict(zip(code.indices[row].tolist(), code.values[row].tolist()))
        assert set(latents.tolist()) == {latent for latent in (3, 7) if known.get(latent)}
        for latent, activation, amount in zip(latents.tolist(), activations.tolist(), amounts.tolist()):
            assert activation == known[latent] and amount == (-activation if latent == 3 else activation)
        seen |= set(latents.tolist())
    assert seen == {3, 7}


def test_a_factor_of_one_changes_no_bit(sae, x):
    assert torch.equal(steer(build("@boost=3+7@factor=1", sae), x, Batch()), x)


def test_a_file_says_the_same_as_options(sae, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.json").write_text('{"3": 0, "7": 2.5}')
    by_file, by_options = build("@edits=edits.json", sae), build("@suppress=3@boost=7@factor=2.5", sae)
    assert torch.equal(steer(by_file, x, Batch()), steer(by_options, x, Batch()))
    assert by_file.facts == by_options.facts == {"factors": "3*0+7*2.5"}


def test_results_say_of_many_latents_how_many_and_their_digest(make_sae):
    sae = make_sae(num_latents=512)
    many, other = (dict.fromkeys(range(300), factor) for factor in (0.0, 0.5))
    told, changed = (ByHand(sae, factors).facts["factors"] for factors in (many, other))
    assert told.startswith("300 latents, sha256:") and told != changed
    assert ByHand(sae, dict(reversed(many.items()))).facts["factors"] == told


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "no latents are chosen; expected @suppress=12+99, @boost=5 or @edits=FILE.json"),
        ("@factor=2", "no latents are chosen"),
        ("@suppress=3@factor=2", "factor=2 is for @boost="),
        ("@suppress=3+7+3", "latent 3 is chosen twice"),
        ("@suppress=3@boost=03", "latent 3 is chosen twice"),
        ("@suppress=3+64", "latent 64 is chosen, but the SAE has 64 latents; expected numbers from 0 to 63"),
        ("@suppress=", "suppress='': expected numbers of latents joined by + (12+99)"),
        ("@boost=3,7", "boost='3,7': expected numbers of latents joined by +"),
        ("@suppress=3@edits=edits.json", "'edits' and 'suppress' exclude each other"),
        ("@edits=nope.json", "No such file"),
    ],
)
def test_what_cannot_be_chosen_is_told(text, fragment, make_sae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelStringError) as error:
        build(text, make_sae())
    assert fragment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "Expecting value"),
        ('{"3": 0', "Expecting"),
        ("{}", "it names no latent"),
        ("[]", "it names no latent"),
        ("[3, 7]", "it does not map latents to factors"),
        ("3", "it does not map latents to factors"),
        ('{"3": 0, "3": 1}', "latent 3 is chosen twice"),
        ('{"3": 0, "003": 1}', "latent 3 is chosen twice"),
        ('{"three": 0}', "'three' is not the number of a latent"),
        ('{"-1": 0}', "'-1' is not the number of a latent"),
        ('{"3": "0"}', "latent 3 has the factor '0'"),
        ('{"3": true}', "latent 3 has the factor True"),
        ('{"3": {"a": 1}}', "latent 3 has the factor ["),
        ('{"3": NaN}', "latent 3 has the factor nan"),
        ('{"3": 1001}', "expected a number from -1000 to 1000"),
        (f'{{"3": {"[" * 100_000}', "option edits="),
    ],
)
def test_a_broken_file_is_told_in_one_sentence(text, fragment, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(ModelStringError, match="option edits=.*expected a JSON file such as") as error:
        factors_of(None, None, None, str(path))
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "edits.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelStringError, match="option edits="):
        factors_of(None, None, None, str(tmp_path / "edits.json"))


def test_factors_are_read_in_any_order(tmp_path):
    factors = {9: 0.0, 1: 2.0, 5: -1.0}
    (tmp_path / "edits.json").write_text(json.dumps({str(latent): factor for latent, factor in factors.items()}))
    assert factors_of(None, None, None, str(tmp_path / "edits.json")) == factors
    assert factors_of("9", "1+5", 2, None) == {9: 0, 1: 2, 5: 2}
