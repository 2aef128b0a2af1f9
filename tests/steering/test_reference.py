"""The built-in methods, built as the harness builds them, against the NumPy reference, on real activations."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vs2_plugin.checkpoint.checkpoint import save_checkpoint
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.edits import editing, reading
from vs2_plugin.clip.sites import Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.images import image_digest
from vs2_plugin.demo.digits import CLASSES, MODEL, TEMPLATES, read_digits
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.model.steered import SteeredCLIP
from vs2_plugin.modelstring import parse
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.sae.train import train_sae
from vs2_plugin.steering.batch import Batch, steer
from vs2_plugin.steering.context import Context
from vs2_plugin.steering.gate import Gate

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

K = 8


@pytest.fixture(scope="module")
def digits():
    """400 digits, the shipped tiny CLIP, and what it makes of them: tokens by block, embeddings, and the classes."""
    loaded = load_backbone(MODEL, "")
    pictures, targets = (one[:400] for one in read_digits("train"))
    images = torch.stack([loaded.transform(picture.convert("RGB")) for picture in pictures])
    sites = Sites.of(loaded.model).blocks
    with torch.no_grad(), reading(loaded.model, sites) as found:
        embeddings = loaded.model.encode_image(images)
        text = loaded.model.encode_text(loaded.tokenizer([TEMPLATES[0].format(c=name) for name in CLASSES]))
    return SimpleNamespace(
        loaded=loaded,
        images=images,
        targets=np.array(targets),
        tokens={site.block: found[site] for site in sites},
        embeddings=embeddings,
        classifier=torch.nn.functional.normalize(text, dim=-1).T.contiguous(),
    )


@pytest.fixture(scope="module")
def activations(digits):
    """The digits at the last block: ``[400, 128]``."""
    assert Sites.of(digits.loaded.model).default.block == 3
    return digits.tokens[3]


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
    steered = steer(build(text, sae, mean), activations[:60], Batch()).detach().double().numpy()
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


# ---- with a gallery

GALLERY = 300
QUERIES = slice(GALLERY, GALLERY + 60)


def double(tensor):
    return tensor.detach().double().numpy()


@pytest.fixture(scope="module")
def train_saes(digits):
    """A function that gives the SAEs at blocks 2 and 3, with their facts."""
    made = {}

    def train(activation):
        for site in [] if activation in made else Sites.of(digits.loaded.model).blocks[2:]:
            config = TrainConfig(k=K, expansion_factor=2, samples=4000, activation=activation)
            sae, mean, figures = train_sae(digits.tokens[site.block].numpy(), config, quiet=True)
            facts = SiteSAE(site.hookpoint, "plain", "none", 128, mean.tolist(), 0.1, figures.fvu_quantiles, {}, {})
            made.setdefault(activation, {})[site.block] = facts, sae
        return made[activation]

    return train


@pytest.fixture(scope="module")
def gallery_of(digits, train_saes, tmp_path_factory):
    """A function that gives a checkpoint whose gallery are some rows of the digits, and all that the reference needs of
    it: the half-precision numbers that are stored."""
    tower = Tower.of(digits.loaded.model, digits.loaded.transform)
    made = {}

    def write(rows, activation):
        folder = tmp_path_factory.mktemp("gallery")
        saes = train_saes(activation)
        columns = {facts.hookpoint: digits.tokens[block][rows].half() for block, (facts, _) in saes.items()}
        columns["embedding.clip"] = digits.embeddings[rows].half()
        columns = {name: tensor.numpy() for name, tensor in columns.items()}
        columns["digests"] = np.array([image_digest(digits.images[row]) for row in rows], np.uint64)
        columns["labels"] = digits.targets[rows]
        for name, array in columns.items():
            np.save(folder / f"{name}.npy", array)
        part = GalleryPart("digits", len(rows), 10, "x")
        sites = tuple(facts.hookpoint for facts, _ in saes.values())
        contents = GalleryContents((part,), sites, {"clip": RetrievalEncoder(64)}, labels=True)
        checkpoint = save_checkpoint(
            folder / "checkpoint",
            backbone="X",
            pretrained="",
            tower=tower,
            data=TrainingData(("digits",), len(rows)),
            saes=list(saes.values()),
            created={},
            gallery=GalleryFiles(contents, [{name: folder / f"{name}.npy" for name in columns}]),
        )
        weights = {
            block: {name: double(tensor) for name, tensor in sae.state_dict().items()}
            for block, (_, sae) in saes.items()
        }
        tokens = {block: columns[facts.hookpoint].astype(float) for block, (facts, _) in saes.items()}
        embeddings, classifier = columns["embedding.clip"].astype(float), double(digits.classifier)
        classes = [reference.zero_shot(embedding, classifier) for embedding in embeddings]
        return checkpoint, SimpleNamespace(
            rows=rows,
            w=weights,
            tokens=tokens,
            codes={
                block: np.stack([reference.code(weights[block], x, K, activation) for x in tokens[block]])
                for block in tokens
            },
            embeddings=embeddings,
            classifier=classifier,
            labels={"oracle": columns["labels"].tolist(), "pseudo": [label for label, _ in classes], "none": None},
            confidence=[odds for _, odds in classes],
            quantiles={block: facts.fvu_quantiles for block, (facts, _) in saes.items()},
            mean={block: np.array(facts.mean) for block, (facts, _) in saes.items()},
        )

    def give(rows, activation):
        key = (*rows, activation)
        if key not in made:
            made[key] = write(list(rows), activation)
        return made[key]

    return give


@pytest.fixture
def steered(digits, gallery_of):
    """A function from a model string to the steered model, and what the reference needs."""

    def make(text, rows=range(GALLERY), activation="relu"):
        checkpoint, known = gallery_of(rows, activation)
        loaded = replace(digits.loaded, model=copy.deepcopy(digits.loaded.model))
        model = SteeredCLIP(parse(text), loaded, lambda task: checkpoint)
        model.bind(None)
        model.set_classifier(digits.classifier)
        return model, known

    return make


def neighbours_of(digits, known, query, n):
    """The reference's neighbours of one of the digits, itself and its copies left out."""
    same = [row for row, image in enumerate(known.rows) if torch.equal(digits.images[image], digits.images[query])]
    return reference.neighbours(double(digits.embeddings[query]), known.embeddings, n, same)


def sets_of(digits, known, query, n, rule, labels):
    own, _ = reference.zero_shot(double(digits.embeddings[query]), known.classifier)
    return reference.split(neighbours_of(digits, known, query, n), known.labels[labels], rule, own)


def expected_of(method, digits, known, query, options, x, block=3):
    """What the reference makes of the activation (or embedding) x of one of the digits."""
    options = {"gamma": 1.5, "lam": 2.1, "n": 50, "rule": "majority", "labels": "pseudo", "mix": 0.5, **options}
    gamma, lam, n, labels = options["gamma"], options["lam"], options["n"], options["labels"]
    w, codes = known.w[block], known.codes[block]
    if method in ("vs2pp", "clipsteer"):
        sets = sets_of(digits, known, query, n, options["rule"], labels)
        if method == "clipsteer":
            return reference.clipsteer(x, known.tokens[block], *sets, gamma, lam)
        forms = [
            reference.vs2pp(w, x, codes, *sets, gamma, lam, form)
            for form in (reference.contrast_of_codes, reference.contrast_of_directions)
        ]
        assert np.abs(forms[0] - forms[1]).max() < 1e-12 * np.linalg.norm(x)
        return forms[0]
    if method == "rag":
        return reference.rag(
            x, known.embeddings, neighbours_of(digits, known, query, n), options["mix"], known.labels[labels]
        )
    if method == "knn":
        return reference.knn(neighbours_of(digits, known, query, n), known.labels["pseudo"], known.classifier)
    prototype = reference.prototype(digits.targets[query], codes, known.labels["pseudo"], known.confidence)
    return reference.proto(w, x, prototype, gamma, lam)


def run(model, digits, queries):
    """The embeddings of some of the digits, and their tokens at blocks 2 and 3 as the steered tower has them."""
    sites = Sites.of(model).blocks[2:]
    model.set_targets(torch.from_numpy(digits.targets[queries]))
    with torch.no_grad(), reading(model, sites) as found:
        embeddings = model.encode_image(digits.images[queries])
    return embeddings, {site.block: found[site] for site in sites}


def difference(found, expected, x):
    """The largest deviation, relative to the mean norm of the activations."""
    return np.abs(double(found) - expected).max() / np.linalg.norm(double(x), axis=1).mean()


GALLERY_CASES = {
    "vs2pp:X": {},
    "vs2pp:X@gamma=3@lam=0.5@n=25": {"gamma": 3, "lam": 0.5, "n": 25},
    "vs2pp:X@alpha=-2": {"gamma": -1, "lam": 1},
    "vs2pp:X@rule=query": {"rule": "query"},
    "vs2pp:X@labels=oracle": {"labels": "oracle"},
    "vs2pp:X@labels=oracle@rule=query": {"labels": "oracle", "rule": "query"},
    "vs2pp:X@n=1": {"n": 1},
    "vs2pp:X@n=1@rule=query": {"n": 1, "rule": "query"},
    "vs2pp:X@n=300": {"n": 300},
    "clipsteer:X": {},
    "clipsteer:X@rule=query@n=10": {"rule": "query", "n": 10},
    "clipsteer:X@labels=oracle@alpha=0.3": {"labels": "oracle", "gamma": 1.3, "lam": 1},
    "rag:X": {"labels": "none"},
    "rag:X@mix=0.2@n=300": {"labels": "none", "mix": 0.2, "n": 300},
    "rag:X@labels=pseudo@mix=0": {"mix": 0},
    "rag:X@labels=oracle@n=7": {"labels": "oracle", "n": 7},
    "knn:X": {},
    "knn:X@n=3": {"n": 3},
    "proto:X": {},
    "proto:X@gamma=-1@lam=0.4": {"gamma": -1, "lam": 0.4},
}


@pytest.mark.parametrize(
    ("text", "activation"),
    [*((text, "relu") for text in GALLERY_CASES), *((text, "abs") for text in ("vs2pp:X", "proto:X"))],
)
def test_methods_with_a_gallery_agree_with_the_reference(text, activation, steered, digits):
    model, known = steered(text, activation=activation)
    queries, method = range(*QUERIES.indices(400)), model.spec.method.name
    embeddings, tokens = run(model, digits, QUERIES)
    found, x = (embeddings, digits.embeddings) if method in ("rag", "knn") else (tokens[3], digits.tokens[3])
    expected = np.stack(
        [expected_of(method, digits, known, query, GALLERY_CASES[text], double(x[query])) for query in queries]
    )
    assert difference(found, expected, x) < 1e-5
    assert not np.allclose(expected, double(x[QUERIES]), atol=1e-3)  # the comparison is about something


def test_the_cases_hold_neighbourhoods_without_friend_and_without_foe(steered, digits):
    _, known = steered("vs2pp:X@n=1")
    empty = {"query": set(), "majority": set()}
    for query in range(*QUERIES.indices(400)):
        for rule, seen in empty.items():
            seen.add(tuple(map(bool, sets_of(digits, known, query, 1, rule, "pseudo"))))
    assert empty == {"query": {(True, False), (False, True)}, "majority": {(True, False)}}


def test_agreement_is_the_mean_share_of_the_neighbours_in_the_chosen_class(steered, digits):
    model, known = steered("vs2pp:X@rule=query@n=20")
    model.reset_statistics()
    run(model, digits, slice(300, 330))
    run(model, digits, slice(330, 360))
    shares = [len(sets_of(digits, known, query, 20, "query", "pseudo")[0]) / 20 for query in range(300, 360)]
    assert model.vs2_facts()["vs2_agreement"] == pytest.approx(np.mean(shares)) and 0 < np.mean(shares) < 1


def test_a_class_without_prototype_leaves_its_images_alone(steered, digits):
    """No image is put into an eleventh class, far from all of them."""
    model, _ = steered("proto:X")
    far = -digits.embeddings.mean(0)
    model.set_classifier(torch.cat([digits.classifier, far[:, None]], dim=1))
    queries = slice(300, 306)
    model.set_targets(torch.tensor([10, 10, 1, 10, 3, 10]))
    with torch.no_grad():
        found, plain = (
            model.encode_image(digits.images[queries]),
            digits.loaded.model.encode_image(digits.images[queries]),
        )
    alone = (found == plain).all(1)
    assert alone.tolist() == [True, True, False, True, False, True]


COPIES = [*range(100), 0, 0, 7, *range(100, 150), 7, 99]


@pytest.mark.parametrize(
    ("text", "options"), [("vs2pp:X@n=10", {"n": 10}), ("rag:X@n=155", {"labels": "none", "n": 155})]
)
def test_a_query_is_never_its_own_neighbour_however_often_it_is_there(text, options, steered, digits):
    model, known = steered(text, COPIES)
    queries = slice(0, 20)
    embeddings, tokens = run(model, digits, queries)
    method = model.spec.method.name
    found, x = (embeddings, digits.embeddings) if method == "rag" else (tokens[3], digits.tokens[3])
    expected = np.stack([expected_of(method, digits, known, q, options, double(x[q])) for q in range(20)])
    assert difference(found, expected, x) < 1e-5


def test_two_sites_are_steered_along_the_neighbours_of_the_plain_embedding(steered, digits):
    model, known = steered("vs2pp:X@blocks=2+3@n=20")
    _, tokens = run(model, digits, QUERIES)
    queries = range(*QUERIES.indices(400))
    first = np.stack(
        [expected_of("vs2pp", digits, known, q, {"n": 20}, double(digits.tokens[2][q]), block=2) for q in queries]
    )
    assert difference(tokens[2], first, digits.tokens[2]) < 1e-5
    plain = digits.loaded.model
    second, third = Sites.of(plain).blocks[2:]
    moved = torch.from_numpy(first).float()
    with torch.no_grad(), editing(plain, second, lambda x: moved), reading(plain, [third]) as seen:
        plain.encode_image(digits.images[QUERIES])
    expected = np.stack(
        [
            expected_of("vs2pp", digits, known, query, {"n": 20}, x, block=3)
            for query, x in zip(queries, double(seen[third]), strict=True)
        ]
    )
    assert difference(tokens[3], expected, digits.tokens[3]) < 1e-5
    assert difference(seen[third], double(digits.tokens[3][QUERIES]), digits.tokens[3]) > 1e-2


def test_the_gate_leaves_out_what_the_sae_does_not_know_of_the_neighbours_methods_too(steered, digits):
    model, known = steered("vs2pp:X@gate=0.75")
    _, tokens = run(model, digits, QUERIES)
    x, tau = digits.tokens[3][QUERIES], known.quantiles[3]["0.75"]
    moved = [expected_of("vs2pp", digits, known, q, {}, double(digits.tokens[3][q])) for q in range(300, 360)]
    expected = [
        reference.gated(known.w[3], row, K, known.mean[3], tau, other)
        for row, other in zip(double(x), moved, strict=True)
    ]
    assert difference(tokens[3], np.stack(expected), x) < 1e-5
    skipped = (tokens[3] == x).all(1)
    assert 0 < skipped.sum() < 60
    assert skipped.tolist() == [bool((other == row).all()) for other, row in zip(expected, double(x), strict=True)]
    assert model.vs2_facts()["vs2_coverage"] == pytest.approx(1 - skipped.float().mean().item())


@pytest.mark.parametrize("text", ["vs2pp:X", "vs2pp:X@blocks=2+3", "clipsteer:X", "rag:X", "knn:X", "proto:X"])
def test_an_image_does_not_depend_on_its_batch(text, steered, digits):
    model, _ = steered(text)
    whole, _ = run(model, digits, slice(300, 330))
    parts = [run(model, digits, slice(start, min(start + 7, 330)))[0] for start in range(300, 330, 7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_codes_of_a_gallery_that_is_too_large_are_computed_for_each_batch(steered, digits, monkeypatch):
    kept, _ = run(steered("vs2pp:X")[0], digits, QUERIES)
    monkeypatch.setattr("vs2_plugin.steering.neighbours._RESIDENT", 0)
    for text in ("vs2pp:X", "proto:X"):
        model, _ = steered(text)
        monkeypatch.setattr("vs2_plugin.steering.neighbours.Codes._encode_all", lambda self: pytest.fail("kept"))
        found, _ = run(model, digits, QUERIES)
        if text == "vs2pp:X":
            torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)
