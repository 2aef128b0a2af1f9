"""The word ``auto`` through the stock command, on the demo's digits."""

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.cli.main import main
from vs2_plugin.demo.digits import CLASSES, read_digits
from vs2_plugin.errors import HarnessError, ModelStringError, PluginError
from vs2_plugin.harness import loader
from vs2_plugin.method import Method, Option
from vs2_plugin.model.candidates import ZeroShot
from vs2_plugin.modelstring import parse
from vs2_plugin.plugins import registry
from vs2_plugin.steering.move import Move
from vs2_plugin.steering.retriever import Retriever
from vs2_plugin.strength import RULE

from .conftest import DIGITS, TINY, few_digits, metrics

NAME = "local-dir-tiny-clip_wds-digits"
DATA = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few")
DATA += ("--num_workers", "0", "--quiet", "--no_amp")
ALPHAS = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8]
BLOCK = "visual.transformer.resblocks.3"
#: Where the gallery lies, beside the first SAE.
GALLERY = "visual.transformer.resblocks.0/gallery"


@pytest.fixture
def few(in_demo):
    """Some of the test digits, as ``wds/few``."""
    few_digits(in_demo, "few", 0, count=100)
    return in_demo


@pytest.fixture
def sae(in_demo, monkeypatch):
    """The name of a copy of the demo's checkpoint for which nothing has been chosen yet."""
    # A model that a test inspects waits for a data set; no later test shall bind it.
    monkeypatch.setattr(loader._Waiting, "model", None)
    folder = in_demo / "store/checkpoints/chosen"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.parent / NAME, folder, ignore=shutil.ignore_patterns("auto"))
    yield "chosen"
    shutil.rmtree(folder)


@pytest.fixture
def run(few, clip_benchmark):
    """A function that evaluates one model: its metrics, and the lines on stderr in which a choice is told."""

    def evaluate(model: str, *words: str, data: tuple[str, ...] = DATA) -> tuple[dict, list[str]]:
        code, error = clip_benchmark("eval", "--model", model, *data, "--output", "auto.json", *words)
        assert code == 0, error
        return metrics(few / "auto.json"), [line for line in error.splitlines() if line.startswith("vs2: ")]

    return evaluate


def told_choices(caplog):
    """The choices that were logged."""
    return [record for record in caplog.records if record.name == "vs2_plugin.model.automatic"]


def files(name="chosen"):
    """The kept choices, oldest first."""
    kept = Path("store/checkpoints", name, GALLERY, "auto")
    return sorted(kept.glob("*"), key=lambda file: file.stat().st_mtime_ns)


def without(found, *more):
    """Metrics but for what tells of a choice."""
    return {name: value for name, value in found.items() if not name.startswith("vs2_auto") and name not in more}


@pytest.fixture(scope="module")
def classifier(demo):
    """The class embeddings of the digits, float32."""
    return class_embeddings(demo.folder)


def class_embeddings(folder, template="a photo of the digit {c}"):
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    from vs2_plugin.clip.backbone import load_backbone

    loaded = load_backbone(f"local-dir:{folder / 'tiny-clip'}", "")
    return zero_shot_classifier(loaded.model, loaded.tokenizer, CLASSES, [template], "cpu", amp=False)


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ---- the choice, and the results with it


CHOOSING = {
    "vs2:{tiny}@{sae}@alpha=auto": ["alpha"],
    "vs2:{tiny}@{sae}@alpha=auto@gate=0.9": ["alpha"],
    "pass:{tiny}@{sae}@alpha=auto": ["alpha"],
    "vs2s:{tiny}@{sae}": ["p", "alpha"],
    "vs2s:{tiny}@{sae}@p=2": ["alpha"],
    "vs2pp:{tiny}@{sae}@alpha=auto@n=10@gate=0.95@brake=0.6": ["alpha"],
    "clipsteer:{tiny}@{sae}@alpha=auto@n=10@rule=query@brake=0.3": ["alpha"],
}


@pytest.mark.parametrize("model", CHOOSING)
def test_results_are_those_of_the_values_that_were_chosen(model, run, sae):
    names, model = CHOOSING[model], model.format(tiny=TINY, sae=sae)
    found, lines = run(model)
    assert len(lines) == 1 and lines[0].startswith(f"vs2: {parse(model)}: ")
    told = ", ".join(f"{name} = {found[f'vs2_{name}']:g}" for name in names)
    assert f": {told}: " in lines[0] and "unlabeled images" in lines[0]
    assert found["vs2_auto"] == "+".join(names) and found["vs2_auto_images"] == 900
    evidence = dict(word.split(":") for word in found["vs2_auto_evidence"].split())
    count = {"alpha": 10, "p": 2}
    assert len(evidence) == np.prod([count[name] for name in names])
    chosen = "/".join(f"{found[f'vs2_{name}']:g}" for name in names)
    assert float(evidence[chosen]) == pytest.approx(found["vs2_auto_information"], abs=1e-3)
    assert float(next(iter(evidence.values()))) == pytest.approx(found["vs2_auto_information_plain"], abs=1e-3)
    assert all(isinstance(value, (int, float, str, bool)) for value in found.values())
    given = "".join(f"@{name}={found[f'vs2_{name}']}" for name in names)
    fixed, lines = run(re.sub("@alpha=auto", "", model) + given)
    assert lines == [] and fixed == without(found)


def test_on_the_digits_it_helps(demo):
    """What the README says: with a strength chosen without labels, steering helps here."""
    names = (TINY, f"vs2:{TINY}@alpha=auto", f"vs2s:{TINY}")
    plain, told, selective = (metrics(demo.folder / f"results/{name}.json")["acc1"] for name in names)
    assert plain + 0.05 < told and plain + 0.05 < selective


def test_selective_steering_with_p_0_is_vs2(run, sae):
    for alpha in ("0.5", "2"):
        one, _ = run(f"vs2s:{TINY}@{sae}@p=0@alpha={alpha}")
        other, _ = run(f"vs2:{TINY}@{sae}@alpha={alpha}")
        assert without(one, "vs2_method", "vs2_p") == without(other, "vs2_method")


def test_selective_steering_alters_embeddings_as_vs2_does_at_p_0(in_demo, classifier, images):
    found = []
    for model in (f"vs2s:{TINY}@p=0@alpha=2", f"vs2:{TINY}@alpha=2", f"vs2s:{TINY}@p=2@alpha=2"):
        steered, *_ = vs2_plugin.load(model, dataset="wds/digits")
        steered.set_classifier(classifier)
        with torch.no_grad():
            found.append(steered.encode_image(images))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-2)


def test_alpha_0_is_the_plain_model(run, sae):
    plain, _ = run(TINY)
    for model in (f"vs2s:{TINY}@{sae}@alpha=0@p=2", f"vs2:{TINY}@{sae}@alpha=0"):
        found, _ = run(model)
        assert {name: found[name] for name in plain} == plain


# ---- the choice again, from the files


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def steered_classes(folder, classifier, alphas):
    """The classes of the gallery's images at each α, from the files of checkpoint and tower alone."""
    from safetensors.numpy import load_file

    where = folder / "store/checkpoints/chosen"
    sae = {name: array.astype(float) for name, array in load_file(where / BLOCK / "sae.safetensors").items()}
    config = json.loads((where / BLOCK / "cfg.json").read_text())
    tower = load_file(folder / "tiny-clip/open_clip_model.safetensors")
    tower = {name: array.astype(float) for name, array in tower.items() if name.startswith("visual.")}
    x = np.load(where / GALLERY / f"0/{BLOCK}.npy").astype(float)
    pre = (x - sae["b_dec"]) @ sae["encoder.weight"].T + sae["encoder.bias"]
    code = np.zeros_like(pre)
    top = np.argsort(-pre, axis=1)[:, : config["k"]]
    np.put_along_axis(code, top, np.maximum(np.take_along_axis(pre, top, 1), 0), 1)
    ways = []
    for alpha in alphas:
        moved = x + alpha * code @ sae["W_dec"]
        moved *= np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(moved, axis=1, keepdims=True)
        centred = moved - moved.mean(1, keepdims=True)
        scaled = centred / np.sqrt(moved.var(1, keepdims=True) + 1e-5)
        embedding = (scaled * tower["visual.ln_post.weight"] + tower["visual.ln_post.bias"]) @ tower["visual.proj"]
        ways.append((normalized(embedding) @ classifier).argmax(1))
    return ways


def told(way, graph, classes):
    """The influence of each image on the information, and on the divergence from even shares."""
    joint = np.zeros((classes, classes))
    for image, row in enumerate(graph):
        for other in row:
            joint[way[image], way[other]] += 1
            joint[way[other], way[image]] += 1
    joint /= joint.sum()
    margin = joint.sum(1)
    share = np.bincount(way, minlength=classes) / len(way)
    tells = np.zeros(len(way))
    edges = [(image, other) for image, row in enumerate(graph) for other in row]
    log = np.log(joint, where=joint > 0, out=np.zeros_like(joint)) - np.log(np.outer(margin, margin) + (joint == 0))
    mean = np.mean([log[way[i], way[j]] for i, j in edges])
    for image, other in edges:
        for end in (image, other):  # an image counts as one and as a neighbour
            tells[end] += (log[way[image], way[other]] - mean) / graph.shape[1]
    return tells + mean, np.log(classes * share[way])


def test_the_whole_choice_follows_from_the_files(run, sae, in_demo):
    """A gain counts if it is sure, large and of a graph that knows the classes, and if the shares do not surely move
    away from even ones; of those, most evidence."""
    run(f"vs2:{TINY}@{sae}@alpha=auto", "--save_clf", "clf.pt")
    kept = json.loads(files()[0].read_text())["choice"]
    classifier = torch.load("clf.pt").double().numpy()
    ways = steered_classes(in_demo, classifier, ALPHAS)
    embeddings = np.load(f"store/checkpoints/{sae}/{GALLERY}/0/embedding.clip.npy").astype(float)
    cosines = normalized(embeddings) @ normalized(embeddings).T
    np.fill_diagonal(cosines, -2)
    graph = np.argsort(-cosines, axis=1)[:, :10]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(900, generator=generator).numpy() for _ in range(4)]
    gained, sure, apart, surely, entropy = [], [], [], [], []
    for way in ways:
        information, divergence = told(way, graph, 10)
        if not gained:
            plain = information, divergence
        gained.append(information.mean() - np.mean([told(way[order], graph, 10)[0].mean() for order in orders]))
        apart.append(divergence.mean())
        entropy.append(np.log(10) - divergence.mean())
        for values, base, means, errors in (
            (information, plain[0], gained, sure),
            (divergence, plain[1], apart, surely),
        ):
            spread = np.std(values - base, ddof=1) / 30
            errors.append((means[-1] - means[0]) / spread if spread else 0.0)
    # An image at the border of two classes may fall to either side.
    assert kept["information"] == pytest.approx(gained, abs=4e-3)
    assert kept["information_errors"] == pytest.approx(sure, abs=0.3)
    assert kept["divergence"] == pytest.approx(apart, abs=4e-3)
    assert kept["divergence_errors"] == pytest.approx(surely, abs=0.4)
    assert kept["entropy"] == pytest.approx(entropy, abs=4e-3)
    good = [
        index
        for index in range(1, 10)
        if sure[index] > RULE.errors > surely[index]
        and gained[index] - gained[0] > RULE.gain
        and gained[index] > RULE.known * entropy[index]
    ]
    best = max(good, key=lambda index: sure[index] - surely[index])
    chosen = kept["index"]
    assert sure[chosen] - surely[chosen] == pytest.approx(sure[best] - surely[best], abs=0.7) and chosen in good
    assert kept["candidates"] == [{"alpha": alpha} for alpha in ALPHAS] and kept["images"] == 900


def test_batches_and_workers_do_not_matter_and_autocast_hardly(run, sae):
    model = f"vs2:{TINY}@{sae}@alpha=auto"
    evidence = [name for name in run(model)[0] if name.startswith("vs2_auto")]
    first, _ = run(model)
    kept = files()
    kept[0].unlink()
    again, _ = run(model, "--batch_size", "7", "--num_workers", "1")
    assert {name: again[name] for name in evidence} == {name: first[name] for name in evidence}
    assert files()[0].name == kept[0].name
    # The class embeddings are of another precision, and with them the key.
    mixed, _ = run(model, data=DATA[:-1])
    assert len(files()) == 2
    numbers = [[float(word.split(":")[1]) for word in found["vs2_auto_evidence"].split()] for found in (first, mixed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)


# ---- choices are kept


def test_the_kept_choice_is_used(run, sae):
    model = f"vs2:{TINY}@{sae}@alpha=auto"
    first, _ = run(model)
    [file] = files()
    kept = json.loads(file.read_text())["choice"]
    assert kept["index"] != 3
    text = json.dumps({**kept, "index": 3}, sort_keys=True)
    file.write_text(json.dumps({"choice": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    altered, lines = run(model)
    assert altered["vs2_alpha"] == 0.75 and "alpha = 0.75" in lines[0]
    file.write_text("{")
    again, _ = run(model)
    assert again == first and json.loads(file.read_text())["choice"] == kept
    file.unlink()
    again, _ = run(model)
    assert again == first and [other.name for other in files()] == [file.name]


def test_a_folder_that_cannot_be_written_does_no_harm(run, sae):
    expected, _ = run(f"vs2:{TINY}@{sae}@alpha=auto")
    folder = Path("store/checkpoints", sae, GALLERY, "auto")
    shutil.rmtree(folder)
    folder.write_text("no folder")  # even root cannot write into it
    found, lines = run(f"vs2:{TINY}@{sae}@alpha=auto")
    assert found == expected and len(lines) == 1 and folder.read_text() == "no folder"


def test_other_prompts_and_classes_are_other_choices(run, sae, few):
    model = f"vs2:{TINY}@{sae}@alpha=auto"
    run(model)
    for number, (flag, content) in enumerate(
        [
            ("--custom_template_file", {"few": ["{c}"]}),
            ("--custom_classname_file", {"few": ["nought", *CLASSES[1:]]}),
        ],
        2,
    ):
        Path("custom.json").write_text(json.dumps(content))
        run(model, flag, "custom.json")
        assert len(files()) == number
    run(model)
    assert len(files()) == 3


def test_other_options_and_checkpoints_are_other_choices(run, sae, in_demo, monkeypatch):
    for number, model in enumerate(
        ("vs2:{}", "vs2:{}@gate=0.9", "vs2:{}@gate=0.5", "pass:{}", "vs2pp:{}@n=5@brake=0.3"), 1
    ):
        run(model.format(f"{TINY}@{sae}@alpha=auto"))
        assert len(files()) == number
    assert len({file.read_text() for file in files()}) == 5
    manifest = Path("store/checkpoints", sae, "vs2.json")
    facts = json.loads(manifest.read_text())
    facts["sites"][3]["fvu_quantiles"]["0.5"] += 1e-3  # another training, as far as anybody can tell
    del facts["digest"]
    manifest.write_text(json.dumps(facts))
    run(f"vs2:{TINY}@{sae}@alpha=auto")
    assert len(files()) == 6
    for number, (name, other) in enumerate({"__version__": "0.0", "NEIGHBOURS": 9}.items(), 7):
        monkeypatch.setattr(f"vs2_plugin.model.automatic.{name}", other)  # another version may choose otherwise
        run(f"vs2:{TINY}@{sae}@alpha=auto")
        assert len(files()) == number


# ---- priors


def test_a_prior_by_name_or_in_order_is_the_same(run, sae):
    model = f"vs2:{TINY}@{sae}@alpha=auto"
    shares = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    Path("list.json").write_text(json.dumps(shares))
    by_name = {name: 10 * share for name, share in zip(CLASSES, shares, strict=True) if share}
    Path("names.json").write_text(json.dumps(dict(reversed(by_name.items()))))
    run(model)
    listed, _ = run(f"{model}@prior=list.json")
    named, _ = run(f"{model}@prior=names.json")
    assert (listed["vs2_prior"], named["vs2_prior"]) == ("list.json", "names.json")
    told = "vs2_prior", "vs2_option_files"
    assert without(listed, *told) == without(named, *told) and len(files()) == 2


def test_a_prior_that_steering_moves_away_from_forbids_it(run, sae, in_demo):
    """The prior is what the plain model predicts, from which any other prediction is further away."""
    model = f"vs2:{TINY}@{sae}@alpha=auto"
    free, _ = run(model, "--save_clf", "clf.pt")
    [plain] = steered_classes(in_demo, torch.load("clf.pt").double().numpy(), [0])
    Path("plain.json").write_text(json.dumps(np.bincount(plain, minlength=10).tolist()))
    bound, lines = run(f"{model}@prior=plain.json")
    assert free["vs2_alpha"] > 0 == bound["vs2_alpha"] and "alpha = 0: " in lines[0]
    assert bound["vs2_auto_evidence"] == free["vs2_auto_evidence"]
    Path("even.json").write_text(json.dumps([1] * 10))
    assert run(f"{model}@prior=even.json")[0]["vs2_alpha"] == free["vs2_alpha"]


# ---- neighbours


@pytest.fixture
def asked(monkeypatch):
    """What was found for images of the gallery itself: ``[(their rows, Neighbours)]``."""
    found, inner = [], Retriever._neighbours

    def neighbours(self, batch):
        result = inner(self, batch)
        if batch.rows is not None:
            found.append((batch.rows, result))
        return result

    monkeypatch.setattr(Retriever, "_neighbours", neighbours)
    return found


def expected_neighbours(gallery, encoder, n):
    """The n nearest other images of each, by brute force."""
    unit = normalized(np.asarray(gallery.embeddings[encoder][:]).astype(float))
    cosines = unit @ unit.T
    cosines[gallery.digests[:, None] == gallery.digests[None]] = -2
    return np.argsort(-cosines, axis=1, kind="stable")[:, :n], cosines


def assert_left_out(asked, gallery, encoder, n):
    expected, cosines = expected_neighbours(gallery, encoder, n)
    seen = torch.cat([rows for rows, _ in asked])
    assert (torch.bincount(seen, minlength=len(gallery)) == 1).all()  # the candidates share them
    for rows, hood in asked:
        assert hood.rows.shape == (len(rows), n) and hood.valid.all()
        assert (hood.rows != rows[:, None]).all()
        assert (gallery.digests[hood.rows.numpy()] != gallery.digests[rows.numpy()][:, None]).all()
        near = np.take_along_axis(cosines[rows.numpy()], hood.rows.numpy(), 1)
        assert near == pytest.approx(np.take_along_axis(cosines[rows.numpy()], expected[rows.numpy()], 1), abs=1e-3)


def test_while_choosing_no_image_is_its_own_neighbour(run, sae, asked):
    run(f"vs2pp:{TINY}@{sae}@alpha=auto@n=10@brake=0.5")
    assert_left_out(asked, Store.default().find(sae).open_gallery(), "clip", 10)


def test_images_are_compared_by_the_encoder_that_was_asked_for(run, few, asked):
    pytest.importorskip("timm")
    words = ("--samples", "500", "--max_images", "48", "--num_workers", "0", "--quiet", "--no_amp", "--overwrite")
    name = "by-vit"
    assert (
        train_sae.main(["--model", TINY, *DIGITS[:4], *words, "--name", name, "--retrieval_encoder", "test_vit,"]) == 0
    )
    try:
        model = f"vs2pp:{TINY}@{name}@n=5@encoder=test_vit@brake=0.5"
        found, _ = run(f"{model}@alpha=auto")
        assert_left_out(asked, Store.default().find(name).open_gallery(), "test_vit", 5)
        assert found["vs2_auto_images"] == 48 and found["vs2_encoder"] == "test_vit"
        fixed, _ = run(f"{model}@alpha={found['vs2_alpha']}")
        assert fixed == without(found)
    finally:
        shutil.rmtree(few / "store/checkpoints" / name)


def test_the_brake_is_reported(run, sae):
    free, _ = run(f"vs2pp:{TINY}@{sae}@n=10")
    none, _ = run(f"vs2pp:{TINY}@{sae}@n=10@brake=0")
    most, _ = run(f"vs2pp:{TINY}@{sae}@n=10@brake=1")
    assert without(none, "vs2_brake", "vs2_braked") == free and none["vs2_braked"] == 0
    assert most["vs2_brake"] == 1 and 0 < most["vs2_braked"] < 1 and most["vs2_agreement"] == free["vs2_agreement"]
    assert "vs2_braked" not in free


# ---- mistakes


@pytest.fixture(scope="module")
def bare(demo):
    """A checkpoint without a gallery, as older ones are."""
    folder = demo.folder / "store/checkpoints"
    shutil.copytree(folder / NAME, folder / "old", ignore=shutil.ignore_patterns("auto", "gallery"))
    manifest = folder / "old/vs2.json"
    facts = json.loads(manifest.read_text())
    del facts["gallery"], facts["digest"]
    manifest.write_text(json.dumps(facts))
    yield "old"
    shutil.rmtree(folder / "old")


PRIORS = {
    "text.json": "no JSON",
    "number.json": "3",
    "words.json": '["a", "b"]',
    "below.json": json.dumps([1, -1, *[1] * 8]),
    "zero.json": "[0, 0]",
    "infinite.json": "[1, Infinity]",
    "nan.json": "[1, NaN]",
    "large.json": f"[1, 1{'0' * 400}]",
    "deep.json": "[" * 5000 + "]" * 5000,
    "true.json": "[true, 1]",
    "nested.json": '{"zero": {"share": 1}}',
    "empty.json": "[]",
}
EARLY = [
    ("vs2:{tiny}@alpha=auto@gamma=2", ["gamma"]),
    ("vs2:{tiny}@alpha=automatic", ["alpha='automatic'", "or auto"]),
    ("vs2:{tiny}@gamma=auto", ["gamma='auto'"]),
    ("vs2:{tiny}@prior=x.json", ["option prior is for auto", "@alpha=auto"]),
    ("vs2s:{tiny}@p=1@alpha=2@prior=x.json", ["option prior is for auto; expected @p=auto or @alpha=auto beside it"]),
    ("vs2:{tiny}@alpha=auto@prior=absent.json", ["prior='absent.json'", "No such file", "expected a JSON file"]),
    ("vs2:{tiny}@alpha=auto@prior=few", ["prior='few'", "expected a JSON file"]),
    *((f"vs2:{{tiny}}@alpha=auto@prior={name}", [f"prior='{name}'", "expected a JSON file"]) for name in PRIORS),
    ("vs2:{tiny}@old@alpha=auto", ["'old' has no gallery of training images", "--overwrite"]),
    ("vs2s:{tiny}@old", ["'old' has no gallery"]),
    ("vs2s:{tiny}@old@p=0@alpha=1", ["'old' has no gallery"]),
    ("proto:{tiny}@alpha=auto", ["alpha='auto'"]),
]


@pytest.mark.parametrize(("model", "parts"), EARLY, ids=[row[0] for row in EARLY])
def test_mistakes_are_named_before_anything_is_loaded(model, parts, bare, few, clip_benchmark, monkeypatch):
    import open_clip

    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *given, **more: pytest.fail("too early"))
    for name, content in PRIORS.items():
        Path(name).write_text(content)
    words = ("--pretrained", "", *DIGITS)
    code, error = clip_benchmark("eval", "--model", TINY, model.format(tiny=TINY), *words)
    assert code == 2 and error.count("\n") == 1 and error.startswith("vs2: error: ")
    assert all(part in error for part in parts), error


LATE = [
    ("alpha=auto@blocks=1+2", None, ["alpha=auto is chosen by activations at the end", "begins at block 1", "numbers"]),
    ("alpha=auto@blocks=all", None, ["alpha=auto", "begins at block 0"]),
    ("alpha=auto@prior=x.json", [1, 2, 3], ["prior='x.json': 3 shares for 10 classes"]),
    ("alpha=auto@prior=x.json", {"zero": 1, "eleven": 2}, ["'eleven' is not a class of the data set"]),
]


@pytest.mark.parametrize(("options", "prior", "parts"), LATE, ids=[str(row[:2]) for row in LATE])
def test_mistakes_that_only_classes_and_tower_tell(options, prior, parts, few, clip_benchmark):
    Path("x.json").write_text(json.dumps(prior))
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}@{NAME}@{options}", *DATA, "--output", "x-out.json")
    said = [line for line in error.splitlines() if line.startswith("vs2: ")]
    assert code == 2 and len(said) == 1 and said[0].startswith("vs2: error: ") and "Traceback" not in error
    assert all(part in said[0] for part in parts), said


@pytest.mark.parametrize("task", ["zeroshot_retrieval", "captioning", "linear_probe"])
@pytest.mark.parametrize("model", ["vs2:{}@alpha=auto", "vs2s:{}", "vs2s:{}@p=0@alpha=1"])
def test_other_tasks_have_no_classes(task, model, few, clip_benchmark, captions):
    words = (*DATA,) if task == "linear_probe" else captions
    model = model.format(f"{TINY}@{NAME}")
    code, error = clip_benchmark("eval", "--model", model, *words, "--task", task, "--output", "t.json")
    assert code == 2 and error.count("\n") == 1 and error.startswith("vs2: error: ")
    if task != "captioning":
        needs = "vs2 with @alpha=auto needs classes" if model.startswith("vs2:") else "vs2s needs classes"
        assert f"{needs}, but {task} has none; expected the task zeroshot_classification" in error


# ---- in Python


@pytest.mark.parametrize(
    "model", ["vs2:{}@alpha=auto", "vs2:{}@alpha=auto@gate=0.9", "vs2s:{}", "vs2pp:{}@alpha=auto@brake=0.5"]
)
def test_without_classes_it_is_said_how_they_are_given(model, in_demo, sae, images, classifier, caplog):
    caplog.set_level("INFO")
    steered, *_ = vs2_plugin.load(model.format(f"{TINY}@{sae}"), dataset="wds/digits")
    with torch.no_grad():
        with pytest.raises(HarnessError, match=r"call model\.set_classifier\(classifier\)"):
            steered.encode_image(images)
        steered.set_classifier(classifier)
        assert len(told_choices(caplog)) == 1
        assert steered.encode_image(images).shape == (6, 64)
    assert all(place.steering is not None for place in steered.places)


def test_the_same_classes_are_not_chosen_for_twice(in_demo, sae, classifier, caplog, images):
    caplog.set_level("INFO")
    steered, *_ = vs2_plugin.load(f"vs2pp:{TINY}@{sae}@alpha=auto@n=10@brake=0.5", dataset="wds/digits")
    steered.set_classifier(classifier)
    steering = steered.places[0].steering
    with torch.no_grad():
        steered.encode_image(images)
    facts = steered.vs2_facts()
    assert facts["vs2_agreement"] > 0 and len(told_choices(caplog)) == 1
    files()[0].unlink()
    steered.set_classifier(classifier.clone())
    assert steered.places[0].steering is steering and steered.vs2_facts() == facts
    assert len(told_choices(caplog)) == 1 and files() == []
    steered.set_classifier(classifier.flip(1))
    assert len(told_choices(caplog)) == 2 and len(files()) == 1
    steered.reset_statistics()
    assert "vs2_agreement" not in steered.vs2_facts()


def test_the_callers_autocast_does_not_change_the_evidence(in_demo, sae, classifier):
    steered, *_ = vs2_plugin.load(f"vs2:{TINY}@{sae}@alpha=auto", dataset="wds/digits")
    steered.set_classifier(classifier)
    expected = steered.vs2_facts()["vs2_auto_evidence"]
    for file in files():
        file.unlink()
    steered.set_classifier(classifier.flip(1))  # others
    with torch.autocast("cpu", torch.bfloat16):
        steered.set_classifier(classifier)
    assert steered.vs2_facts()["vs2_auto_evidence"] == expected


def test_what_was_seen_while_choosing_does_not_count(in_demo, sae, classifier, images):
    steered, *_ = vs2_plugin.load(f"vs2pp:{TINY}@{sae}@alpha=auto@n=10@gate=0.9@brake=0.5", dataset="wds/digits")
    steered.set_classifier(classifier)
    assert {"vs2_coverage", "vs2_mean_fvu", "vs2_agreement", "vs2_braked"}.isdisjoint(steered.vs2_facts())
    with torch.no_grad():
        steered.encode_image(images)
    assert steered.vs2_facts()["vs2_coverage"] * 6 == pytest.approx(round(steered.vs2_facts()["vs2_coverage"] * 6))


def test_before_the_classes_are_known_the_word_itself_is_reported(in_demo, sae, classifier):
    steered, *_ = vs2_plugin.load(f"vs2s:{TINY}@{sae}", dataset="wds/digits")
    facts = steered.vs2_facts()
    assert (facts["vs2_p"], facts["vs2_alpha"]) == ("auto", "auto") and "vs2_auto" not in facts
    steered.set_classifier(classifier)
    assert isinstance(steered.vs2_facts()["vs2_alpha"], float)


@pytest.mark.parametrize("model", ["vs2:{}@alpha=auto@gate=0.95", "vs2s:{}", "vs2pp:{}@alpha=auto@n=10@brake=0.5"])
def test_a_copy_chooses_for_itself(model, in_demo, sae, images, classifier):
    steered, *_ = vs2_plugin.load(model.format(f"{TINY}@{sae}"), dataset="wds/digits")
    steered.set_classifier(classifier)
    copied = copy.deepcopy(steered)
    other = class_embeddings(in_demo, "{c}")
    with torch.no_grad():
        before = steered.encode_image(images)
        assert torch.equal(copied.encode_image(images), before)
        copied.set_classifier(other)
        fresh, *_ = vs2_plugin.load(model.format(f"{TINY}@{sae}"), dataset="wds/digits")
        fresh.set_classifier(other)
        torch.testing.assert_close(copied.encode_image(images), fresh.encode_image(images))
        assert torch.equal(steered.encode_image(images), before)
    assert copied.vs2_facts()["vs2_auto_evidence"] == fresh.vs2_facts()["vs2_auto_evidence"]
    assert copied.vs2_facts()["vs2_auto_evidence"] != steered.vs2_facts()["vs2_auto_evidence"]


def test_names_in_a_prior_need_classes_that_are_known(in_demo, sae, classifier):
    Path("named.json").write_text(json.dumps({"zero": 1}))
    steered, *_ = vs2_plugin.load(f"vs2:{TINY}@{sae}@alpha=auto@prior=named.json", dataset="wds/digits")
    with pytest.raises(ModelStringError, match="whose names are not known"):
        steered.set_classifier(classifier)
    Path("named.json").write_text(json.dumps([1] * 10))
    steered.set_classifier(classifier)


# ---- methods of plugins


@pytest.fixture
def add_method(monkeypatch):
    """Register a method for one test."""

    def add(method: Method) -> None:
        monkeypatch.setitem(registry().methods, method.name, method)
        monkeypatch.setitem(registry().owners, method.name, "a test")

    return add


class Centring(torch.nn.Module):
    """Takes a share of the mean activation away."""

    def __init__(self, mean, share):
        super().__init__()
        self.register_buffer("mean", mean)
        self.share = share

    def forward(self, x):
        return x - self.share * self.mean


def test_a_method_of_a_plugin_can_have_an_automatic_option(run, sae, add_method):
    built = []

    def build(context, share):
        built.append(share)
        return (lambda x: x) if share == 0 else Centring(context.mean, share)

    add_method(Method("centre", build, [Option("share", float, 0.5, minimum=0, maximum=2, auto=[0, 0.5, 1])]))
    found, lines = run(f"centre:{TINY}@{sae}@share=auto")
    assert built[:3] == [0, 0.5, 1] and built[3:] == [found["vs2_share"]] and len(lines) == 1
    assert found["vs2_auto"] == "share" and found["vs2_auto_evidence"].count(":") == 3
    fixed, lines = run(f"centre:{TINY}@{sae}@share={found['vs2_share']}")
    assert lines == [] and without(found) == fixed
    del built[:]
    again, _ = run(f"centre:{TINY}@{sae}@share=auto")
    assert built == [found["vs2_share"]] and again == found


def test_a_function_may_follow_a_module(run, sae, add_method):
    """The choice falls on the first candidate, which is no module, after others that are."""

    def build(context, share):
        return (lambda x: x) if share == 0 else Centring(50 * torch.randn_like(context.mean), share)

    add_method(Method("spoil", build, [Option("share", float, 0.0, auto=(0.0, 1.0, 2.0))]))
    found, _ = run(f"spoil:{TINY}@{sae}@share=auto")
    plain, _ = run(TINY)
    assert found["vs2_share"] == 0 and {name: found[name] for name in plain} == plain


def test_an_automatic_option_at_the_output_embedding(run, sae, add_method):
    embeddings = np.load(f"store/checkpoints/{sae}/{GALLERY}/0/embedding.clip.npy")
    mean = torch.from_numpy(embeddings.astype("float32").mean(0))

    def build(context, share):
        return Centring(mean, share)

    add_method(Method("shift", build, [Option("share", float, 0.0, auto=(0.0, 0.5, 1.0))], site="output"))
    found, _ = run(f"shift:{TINY}@{sae}@share=auto")
    fixed, _ = run(f"shift:{TINY}@{sae}@share={found['vs2_share']}")
    assert without(found) == fixed and found["vs2_site"] == "visual"
    assert float(found["vs2_auto_evidence"].split()[0].split(":")[1]) > 0.5


def test_a_builder_that_fails_for_a_candidate_is_named(few, clip_benchmark, add_method):
    def build(context, share):
        return lambda x: x * (1 / (1 - share))

    def broken(context, share):
        return 1 / (1 - share)

    add_method(Method("bad", broken, [Option("share", float, 0.0, auto=(0.0, 1.0))]))
    code, error = clip_benchmark("eval", "--model", f"bad:{TINY}@{NAME}@share=auto", *DATA, "--output", "b.json")
    assert code == 2 and "vs2: error: method 'bad' built 1.0; expected a function" in error


def test_a_first_candidate_that_moves_activations_is_refused(few, clip_benchmark, add_method):
    """Whatever was compared with it would not be compared with the plain model."""

    def build(context, share):
        return lambda x: x * torch.linspace(1, 2 - share, x.shape[1])

    add_method(Method("tilt", build, [Option("share", float, 0.0, auto=(0.0, 1.0))]))
    code, error = clip_benchmark("eval", "--model", f"tilt:{TINY}@{NAME}@share=auto", *DATA, "--output", "b.json")
    said = [line for line in error.splitlines() if line.startswith("vs2: ")]
    assert code == 2 and len(said) == 1 and said[0].startswith("vs2: error: method 'tilt' moves activations by up to ")
    assert "with share=0; expected that its automatic options" in said[0] and not Path("b.json").exists()


def test_a_number_beside_auto_with_which_a_plugin_moves_activations_is_told(few, add_method):
    def build(context, share, turn):
        return lambda x: x * torch.linspace(1, 2 - share + turn, x.shape[1])

    options = [Option(name, float, first, auto=(first, 0.5)) for name, first in (("share", 1.0), ("turn", 0.0))]
    add_method(Method("turn", build, options))
    model, *_ = vs2_plugin.load(f"turn:{TINY}@{NAME}@share=auto@turn=2", dataset="wds/few")
    with pytest.raises(PluginError, match="with share=1 and turn=2 as given; expected that its automatic"):
        model.set_classifier(torch.nn.functional.normalize(torch.randn(64, 5), dim=0))


def test_a_number_that_leaves_no_plain_model_to_compare_with_is_told_as_such(few, clip_benchmark):
    models = (TINY, f"vs2s:{TINY}@{NAME}@alpha=1")
    code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "before-{model}.json")
    assert not [*Path().glob("before-*")]  # nothing was evaluated first
    assert code == 2 and error.splitlines()[-1] == (
        f"vs2: error: model 'vs2s:{TINY}@{NAME}@alpha=1': with alpha=1, method 'vs2s' steers whatever p is, and auto "
        "chooses between steering and the model as it is; expected auto for alpha too, or numbers for all"
    )
    still = f"vs2s:{TINY}@{NAME}@alpha=0"  # of any p
    assert clip_benchmark("eval", "--model", still, *DATA, "--output", "still.json")[0] == 0


def test_rounding_is_no_move(run, sae, add_method):
    rounded = []

    def build(context, share):
        def steer(x):
            near = (x - 100) + 100
            rounded.append(not torch.equal(near, x))
            return near - share * context.mean

        return steer

    add_method(Method("rounding", build, [Option("share", float, 0.0, auto=(0.0, 1.0))]))
    assert run(f"rounding:{TINY}@{sae}@share=auto")[0]["vs2_auto"] == "share" and all(rounded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_move", [False, True])
@pytest.mark.parametrize("options", ["@share=auto", "@share=1", "@share=1@gate=0.9"])
def test_a_method_that_steers_to_no_number_is_refused(as_move, value, options, few, clip_benchmark, add_method):
    """As a class, NaN is the first: an accuracy would come out of it."""

    def build(context, share):
        def steer(x, batch):
            wild = torch.where(torch.arange(len(x))[:, None] % 2 == 0, 1.0, value)
            if as_move:
                return Move(batch.code(context.sae, x).scaled(wild), share)
            return x * wild if share else x

        return steer

    add_method(Method("wild", build, [Option("share", float, 0.0, auto=(0.0, 1.0))]))
    code, error = clip_benchmark("eval", "--model", f"wild:{TINY}@{NAME}{options}", *DATA, "--output", "b.json")
    said = [line for line in error.splitlines() if line.startswith("vs2: ")]
    assert code == 2 and len(said) == 1 and "Traceback" not in error and not Path("b.json").exists()
    assert said[0].startswith("vs2: error: method 'wild' of a test steered to NaN or infinity at block 3; expected")


@pytest.mark.parametrize("model", [f"{name}:{{tiny}}@{{sae}}@alpha=auto" for name in ("vs2", "vs2s")])
def test_the_choice_is_the_same_if_every_candidate_is_computed(model, run, sae, monkeypatch):
    calls = []
    along = ZeroShot.along
    monkeypatch.setattr(ZeroShot, "along", lambda *args: calls.append(1) or along(*args))
    found, [line] = run(model.format(tiny=TINY, sae=sae))
    assert calls
    shutil.rmtree(Path("store/checkpoints", sae, GALLERY, "auto"))
    monkeypatch.setattr(ZeroShot, "mixes", False)
    calls.clear()
    assert run(model.format(tiny=TINY, sae=sae)) == (found, [line]) and not calls


# ---- the other commands


def test_methods_lists_the_word(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "vs2s:" in text and "a number from -1000 to 1000, or auto (default auto)" in text
    assert "@prior=" in text and "@brake=" in text and "a number from 0 to 8, or auto (default auto)" in text


@pytest.mark.parametrize(
    "model", ["vs2:{}@alpha=auto", "vs2s:{}", "vs2s:{}@p=2@alpha=3", "vs2pp:{}@alpha=auto@n=10@brake=0.5"]
)
def test_inspect_shows_what_the_chosen_steering_does(model, in_demo, sae, capsys):
    read_digits("test")[0][4].save("904.png")
    model = model.format(f"{TINY}@{sae}")
    assert main(["inspect", "904.png", "--model", model, "--pretrained", "", *DIGITS[:4]]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("vs2: ")]
    assert len(lines) == ("auto" in model or model.count("@") == 1)
    rows = {
        name: float(value)
        for name, value in re.findall(
            r"^    (\S.*?)  +(?:-?[\d.]+ +)?([+-][\d.]+)(?:  .*)?$", captured.out, re.MULTILINE
        )
    }
    change = rows.pop("change")
    assert sum(rows.values()) == pytest.approx(change, abs=0.02) and abs(rows["remainder"]) < 0.01
    assert "back to the norm of x" in rows and any(name.startswith("latent ") for name in rows)


def test_the_report_holds_the_runs_with_a_chosen_strength(demo):
    rows = {row["model"]: row for row in json.loads((demo.folder / "report/report.json").read_text())["rows"]}
    page = (demo.folder / "report/index.html").read_text(encoding="utf-8")
    for name in (f"vs2:{TINY}@alpha=auto", f"vs2s:{TINY}"):
        acc1 = metrics(demo.folder / f"results/{name}.json")["acc1"]
        assert rows[name]["acc1"] == pytest.approx(acc1, abs=1e-9)
        named = name.replace(f":{TINY}", "").replace("@", " @")
        [shown] = re.findall(rf'<th scope="row">{named} .*?</tr>', page, re.DOTALL)
        assert f"{100 * acc1:.2f}" in shown

