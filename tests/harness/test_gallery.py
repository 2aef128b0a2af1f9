"""Methods that look images up, through the stock command and every task of it."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vs2_plugin
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli import train_sae
from vs2_plugin.data.images import open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.demo.digits import CLASSES, TEMPLATES
from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.gallery import search

from .conftest import DIGITS, TINY, at, few_digits, metrics

NAME = "local-dir-tiny-clip_wds-digits"
FEW = ("--samples", "500", "--max_images", "48", "--num_workers", "0", "--quiet", "--no_amp", "--overwrite")
DATA = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few")
DATA += ("--num_workers", "1", "--quiet", "--no_amp")


@pytest.fixture
def few(in_demo):
    """A quarter of the test digits, as ``wds/few``."""
    few_digits(in_demo, "few", 0, count=100)
    return in_demo


@pytest.fixture
def train(in_demo):
    """A function that trains a small checkpoint of the digits, and takes it away again."""
    made = []

    def run(name: str, *words: str) -> str:
        made.append(name)
        assert train_sae.main(["--model", TINY, *DIGITS[:4], *FEW, "--name", name, *words]) == 0
        return name

    yield run
    for name in made:
        shutil.rmtree(in_demo / "store/checkpoints" / name, ignore_errors=True)


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classifier(in_demo):
    return torch.randn(64, 10, generator=torch.Generator().manual_seed(2))


# ---- the command


def test_the_alias_is_the_same_method(few, clip_benchmark):
    models = [f"{method}:{TINY}@{NAME}" for method in ("vs2pp", "vs2++")]
    code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "alias-{model}.json")
    assert code == 0, error
    found = [metrics(few / f"alias-{model}.json") for model in models]
    assert found[0] == found[1] and found[0]["vs2_method"] == "vs2pp"
    assert (found[0]["vs2_n"], found[0]["vs2_rule"], found[0]["vs2_encoder"]) == (50, "majority", "clip")


@pytest.mark.parametrize("method", ["vs2pp", "knn"])
def test_a_classifier_from_a_file_serves_as_well(method, few, clip_benchmark, monkeypatch):
    words = ("eval", "--model", f"{method}:{TINY}@{NAME}", *DATA)
    code, error = clip_benchmark(*words, "--save_clf", "clf.pt", "--output", "saved.json")
    assert code == 0, error
    monkeypatch.setattr("open_clip.model.CLIP.encode_text", lambda *given: pytest.fail("the text tower was asked"))
    code, error = clip_benchmark(*words, "--load_clfs", "clf.pt", "--output", "loaded.json")
    assert code == 0, error
    assert metrics(few / "loaded.json") == metrics(few / "saved.json")


def test_other_prompts_make_other_pseudo_labels(few, clip_benchmark):
    templates = few / "few/zeroshot_classification_templates.txt"
    words = ("eval", "--model", f"vs2pp:{TINY}@{NAME}", *DATA)
    assert clip_benchmark(*words, "--output", "usual.json")[0] == 0
    templates.write_text("a capital letter {c}\nan image of the {c}\n")
    assert clip_benchmark(*words, "--output", "prompts.json")[0] == 0
    usual, other = (metrics(few / f"{name}.json") for name in ("usual", "prompts"))
    assert usual["vs2_agreement"] != other["vs2_agreement"]


def test_pseudo_and_oracle_can_be_told_apart_in_the_results(demo):
    rag = f"rag:{TINY}"
    found = [
        metrics(demo.folder / f"results/{rag}{labels}.json") for labels in ("", "@labels=pseudo", "@labels=oracle")
    ]
    facts = [{key: value for key, value in one.items() if isinstance(value, (str, bool))} for one in found]
    assert facts[0] != facts[1] != facts[2]


def test_images_can_be_compared_by_another_encoder(few, clip_benchmark, train):
    pytest.importorskip("timm")
    name = train("encoder", "--retrieval_encoder", "test_vit,")
    models = [f"vs2pp:{TINY}@{name}@n=5", f"vs2pp:{TINY}@{name}@n=5@encoder=test_vit"]
    code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "e-{model}.json")
    assert code == 0, error
    clip, vit = (metrics(few / f"e-{model}.json") for model in models)
    assert vit["vs2_encoder"] == "test_vit" and vit["vs2_agreement"] != clip["vs2_agreement"]
    manifest = few / "store/checkpoints" / name / "vs2.json"
    manifest.write_text(manifest.read_text().replace('"parameters": "', '"parameters": "0'))
    code, error = clip_benchmark("eval", "--model", models[1], *DATA, "--output", "x.json")
    assert code == 2 and error.splitlines()[-1].startswith("vs2: error: ")


def test_faiss_finds_what_exact_search_finds_in_a_small_gallery(few, clip_benchmark, train, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "_SMALL", 59)
    name = train("faiss", "--max_images", "60")
    models = [f"vs2pp:{TINY}@{name}@n=5@search={search}" for search in ("exact", "faiss", "faiss")]
    code, error = clip_benchmark("eval", "--model", *models, *DATA, "--output", "f-{model}.json")
    assert code == 0, error
    exact, faiss = (metrics(few / f"f-{model}.json") for model in models[:2])
    assert {**exact, "vs2_search": "faiss"} == faiss
    assert (Store.default().find(name).gallery_folder / "clip.faiss").is_file()
    Store.default().find(name).verify()


def test_without_faiss_the_run_ends_with_one_line(few, clip_benchmark, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(search, "_SMALL", 0)
    code, error = clip_benchmark("eval", "--model", f"vs2pp:{TINY}@{NAME}@search=faiss", *DATA, "--output", "x.json")
    assert code == 2 and error.splitlines()[-1].startswith("vs2: error: @search=faiss needs FAISS; install it with: ")


def test_a_query_is_not_its_own_neighbour_where_the_test_images_are_the_gallery(
    in_demo, clip_benchmark, train, monkeypatch
):
    """By a vote of one neighbour, every image gets the zero-shot class of the nearest other one."""
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    name = train("transductive", "--max_images", "897", "--train_split", "test", "--transductive")
    words = ("--pretrained", "", *DIGITS, "--save_clf", "clf.pt", "--output", "transductive.json")
    code, error = clip_benchmark("eval", "--model", f"knn:{TINY}@{name}@n=1", *words)
    assert code == 0, error
    gallery = Store.default().find(name).open_gallery()
    embeddings = F.normalize(torch.from_numpy(gallery.embeddings["clip"][:]).float(), dim=1)
    classes = (embeddings @ F.normalize(torch.load("clf.pt").float(), dim=0)).argmax(1)
    same = torch.from_numpy(gallery.digests[:, None] == gallery.digests[None])
    nearest = (embeddings @ embeddings.T).masked_fill(same, -9).argmax(1)
    images = np.load("transductive.images.npz")
    row = {digest: index for index, digest in enumerate(gallery.digests.tolist())}
    rows = [row[digest] for digest in images["digest"].tolist()]
    found = torch.from_numpy(images["prediction"])
    assert len(rows) == 897 and (classes != classes[nearest]).float().mean() > 0.05
    # The tower under autocast gives embeddings that differ in the third digit: for a few, another image is nearest.
    assert (found == classes[nearest][rows]).float().mean() > 0.99
    assert metrics(in_demo / "transductive.json")["vs2_transductive"] is True


# ---- mistakes


MISTAKES = [
    ("vs2pp:{tiny}@bare", ["'bare' has no gallery of training images", "--overwrite"]),
    ("proto:{tiny}@bare", ["'bare' has no gallery"]),
    ("rag:{tiny}@bare", ["'bare' has no gallery"]),
    ("vs2pp:{tiny}@small@labels=oracle@n=5", ["'small' keeps no training labels", "--gallery_labels"]),
    ("rag:{tiny}@small@labels=oracle@n=5", ["'small' keeps no training labels"]),
    ("knn:{tiny}@small@encoder=resnet10t@n=5", ["no embeddings by 'resnet10t'", "--retrieval_encoder resnet10t"]),
    ("vs2pp:{tiny}@small", ["n is 50, but the gallery of checkpoint 'small' holds 48 images"]),
    ("knn:{tiny}@small@n=0", ["n='0'", "from 1 to 100000"]),
    ("rag:{tiny}@small@mix=1.5", ["mix='1.5'", "from 0 to 1"]),
    ("rag:{tiny}@small@gate=0.9", ["unknown option 'gate' of rag"]),
    ("proto:{tiny}@small@n=5", ["unknown option 'n' of proto"]),
    ("vs2pp:{tiny}@small@rule=most", ["rule='most'", "majority or query"]),
    ("vs2pp:{tiny}@small@encoder=a/b", ["encoder='a/b'", "clip, or the name of a timm model"]),
    ("vs2pp:{tiny}@small@blocks=1@n=5", ["has no SAE at block 1"]),
]


@pytest.fixture(scope="module")
def lacking(demo):
    """The demo's folder with a checkpoint without gallery, and one of 48 images without labels."""
    with pytest.MonkeyPatch.context() as patch:
        at(demo.folder, patch)
        for words in (("--name", "bare", "--no_gallery"), ("--name", "small")):
            assert train_sae.main(["--model", TINY, *DIGITS[:4], *FEW, *words]) == 0
    yield
    for name in ("bare", "small"):
        shutil.rmtree(demo.folder / "store/checkpoints" / name)


@pytest.mark.parametrize(("model", "fragments"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_what_the_gallery_lacks_is_said_before_anything_is_loaded(
    model, fragments, lacking, in_demo, clip_benchmark, monkeypatch
):
    import open_clip

    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *given, **more: pytest.fail("too early"))
    code, error = clip_benchmark("eval", "--model", TINY, model.format(tiny=TINY), "--pretrained", "", *DIGITS)
    assert code == 2
    said = [line for line in error.splitlines() if not line.endswith("its accuracy is an upper bound")]
    assert len(said) == 1 and said[0].startswith("vs2: error: ")
    assert all(fragment in said[0] for fragment in fragments)


@pytest.mark.parametrize("method", ["tda:vs2", "stata:vs2", "inmap:vs2", "tda:centre"])
def test_methods_that_learn_nothing_from_a_gallery_need_none(method, lacking, in_demo, clip_benchmark):
    model = f"{method}:{TINY}@bare" + ("@unlabeled=test" if method.startswith("inmap") else "")
    code, error = clip_benchmark("eval", "--model", model, "--pretrained", "", *DIGITS, "--output", "without.json")
    assert code == 0, error
    assert metrics(in_demo / "without.json")["acc1"] > 0.3


# ---- other tasks


def test_a_mixed_embedding_takes_part_in_retrieval(in_demo, clip_benchmark, captions):
    models = [TINY, f"rag:{TINY}@{NAME}", f"rag:{TINY}@{NAME}@mix=1"]
    words = (*captions, "--task", "zeroshot_retrieval", "--output", "r-{model}.json", "--recall_k", "5", "50")
    code, error = clip_benchmark("eval", "--model", *models, *words)
    assert code == 0, error
    plain, mixed, unmixed = (metrics(in_demo / f"r-{model}.json") for model in models)
    assert {key: mixed[key] for key in plain} != plain
    assert {key: unmixed[key] for key in plain} == pytest.approx(plain, abs=0.01)
    assert mixed["vs2_site"] == "visual" and mixed["vs2_labels"] == "none"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("vs2pp", "vs2pp needs classes"),
        ("clipsteer", "clipsteer needs classes"),
        ("proto", "proto needs classes"),
        ("knn", "knn needs classes"),
        ("rag", "rag with @labels=pseudo needs classes"),
    ],
)
def test_methods_that_need_classes_refuse_retrieval(method, words, in_demo, clip_benchmark, captions):
    model = f"{method}:{TINY}@{NAME}" + ("@labels=pseudo" if method == "rag" else "")
    code, error = clip_benchmark("eval", "--model", model, *captions, "--task", "zeroshot_retrieval")
    assert code == 2 and error.count("\n") == 1
    assert words in error and "expected the task zeroshot_classification" in error


@pytest.mark.parametrize("method", ["vs2", "rag", "vs2pp"])
def test_captioning_is_refused(method, in_demo, clip_benchmark, captions):
    code, error = clip_benchmark("eval", "--model", f"{method}:{TINY}@{NAME}", *captions, "--task", "captioning")
    assert code == 2 and error.count("\n") == 1 and f"evaluate the plain model: --model {TINY}" in error


def test_a_linear_probe_is_refused_where_neighbours_are_looked_up(in_demo, clip_benchmark):
    code, error = clip_benchmark(
        "eval", "--model", f"rag:{TINY}@{NAME}", "--pretrained", "", *DIGITS, "--task", "linear_probe"
    )
    assert code == 2 and error.count("\n") == 1 and "a linear probe encodes images in several copies" in error


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 32, 32)], ids=["two images", "one image"])
@pytest.mark.parametrize("name", ["vs2", "rag"])
def test_images_and_captions_are_matched_by_the_steered_embedding(name, shape, in_demo):
    """The task of Winoground and SugarCrepe."""
    from clip_benchmark.metrics import image_caption_selection

    model, _, tokenizer = vs2_plugin.load(f"{name}:{TINY}", dataset="wds/digits")
    torch.manual_seed(0)
    texts = [[f"a photo of the digit {word}" for word in pair] for pair in (CLASSES[:2], CLASSES[4:6], CLASSES[7:9])]
    loader = [(torch.randn(3, *shape), texts) for _ in range(8)]
    found = image_caption_selection.evaluate(model, loader, tokenizer, "cpu", amp=False)
    right = []
    with torch.no_grad():
        for images, _ in loader:
            for some, pair in zip(images.view(3, -1, 3, 32, 32), texts, strict=True):
                scores = (
                    F.normalize(model.encode_image(some), dim=-1) @ F.normalize(model.encode_text(tokenizer(pair))).T
                )
                right.append(all(row.argmax() == index for index, row in enumerate(scores)))
    assert found["text_acc"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    assert found["vs2_method"] == name and found["vs2_checkpoint"] == NAME


class CudaByName(str):
    """``clip_benchmark``'s linear probe asserts that it is given "cuda"."""

    def __eq__(self, other):
        return other == "cuda" or str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_linear_probe_sees_the_steered_features(in_demo, train, monkeypatch, tmp_path):
    """The harness's own, on the CPU. Two checkpoints do not share what it caches, nor two contents of a file; and
    nothing is said of the images, which are those of both splits."""
    from clip_benchmark.metrics import linear_probe

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *given, **more: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *given, **more: self)
    torch.manual_seed(0)
    images, targets = torch.randn(24, 3, 32, 32), torch.arange(24) % 6
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=8)
    cached, other = {}, train("other")
    for name, method, edits in ((NAME, "vs2", ""), (other, "vs2", ""), (NAME, "latents", "1"), (NAME, "latents", "2")):
        options = "@edits=edits.json" if edits else ""
        (in_demo / "edits.json").write_text(f'{{"{edits}": 3}}')
        model, *_ = vs2_plugin.load(f"{method}:{TINY}@{name}{options}", dataset="wds/digits")
        settings = {"fewshot_k": -1, "batch_size": 8, "num_workers": 0, "lr": 0.1, "epochs": 2, "seed": 0}
        found = linear_probe.evaluate(
            model,
            loader,
            loader,
            model_id="a name",
            feature_root=str(tmp_path / "features"),
            device=CudaByName("cpu"),
            normalize=False,
            amp=False,
            **settings,
        )
        assert 0 <= found["lp_acc1"] <= 1 and found["vs2_checkpoint"] == name and "vs2_mean_fvu" not in found
        (folder,) = set((tmp_path / "features").iterdir()) - set(cached)
        cached[folder] = torch.load(folder / "features_test.pt")
        with torch.no_grad():
            expected = torch.cat([model.encode_image(batch) for batch in images.split(8)])
        assert torch.equal(cached[folder], expected)
    first, second, *_ = cached.values()
    assert len(cached) == 4 and not torch.equal(first, second)


class Torn(torch.utils.data.Dataset):
    """Images of which one cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise OSError("Truncated File Read")
        return torch.zeros(3, 32, 32), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_pil_cannot_read_is_told_by_its_number(in_demo, workers):
    from clip_benchmark.metrics import zeroshot_classification as harness

    model, *_ = vs2_plugin.load(f"vs2:{TINY}@{NAME}")
    loader = torch.utils.data.DataLoader(Torn(), batch_size=2, num_workers=workers)
    with pytest.raises(DataError, match="number 4 or one of the batch after it, .*: OSError: Truncated File Read$"):
        harness.run_classification(model, torch.eye(64)[:, :3], loader, "cpu", amp=False)


# ---- in Python


def test_without_classes_it_is_said_how_they_are_given(in_demo, images, classifier):
    model, *_ = vs2_plugin.load(f"vs2pp:{TINY}", dataset="wds/digits")
    with torch.no_grad():
        with pytest.raises(HarnessError, match=r"call model\.set_classifier\(classifier\)"):
            model.encode_image(images)
        model.set_classifier(classifier)
        steered = model.encode_image(images)
        model.set_classifier(classifier.flip(1))  # the same classes in another order
        torch.testing.assert_close(model.encode_image(images), steered)
        model.set_classifier(-classifier)
        assert not torch.allclose(model.encode_image(images), steered)


def test_several_labels_per_image_have_no_prototype(in_demo, images):
    from clip_benchmark.metrics import zeroshot_classification

    model, _, tokenizer = vs2_plugin.load(f"proto:{TINY}", dataset="wds/digits")
    loader = [(images, torch.eye(10)[:6])]
    with pytest.raises(DataError, match="data sets with one label per image"):
        zeroshot_classification.evaluate(model, loader, tokenizer, list("0123456789"), ["{c}"], "cpu", amp=False)
    with pytest.raises(DataError, match="need the true class of every image"):
        model.encode_image(images)


@pytest.mark.parametrize("options", ["", "@blocks=2+3", "@rule=query"])
def test_a_copy_looks_up_its_own_neighbours(options, in_demo, images, classifier):
    import copy

    model, *_ = vs2_plugin.load(f"vs2pp:{TINY}{options}", dataset="wds/digits")
    model.set_classifier(classifier)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied.encode_image(images), model.encode_image(images))
        copied.set_classifier(-classifier)
        assert not torch.equal(copied.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("options", ["", "@blocks=2+3"])
def test_whatever_runs_the_tower_sees_the_neighbours_of_its_own_images(options, in_demo, images, classifier):
    """Steered right or refused, but never along the neighbours of an earlier batch."""
    model, _, tokenizer = vs2_plugin.load(f"vs2pp:{TINY}{options}", dataset="wds/digits")
    model.set_classifier(classifier)
    tokens = tokenizer(["a", "b"])
    with torch.no_grad():
        for batch in (images[:3], images[3:]):
            try:
                found = model(batch, tokens)[0]
            except HarnessError as error:
                assert "encode_image" in str(error)
            else:
                expected = F.normalize(model.encode_image(batch), dim=-1)
                torch.testing.assert_close(F.normalize(found, dim=-1), expected)
            with pytest.raises(HarnessError, match="encode_image"):
                model.model.encode_image(batch)


def test_an_error_within_a_batch_leaves_nothing_behind(in_demo, images, classifier):
    model, *_ = vs2_plugin.load(f"vs2pp:{TINY}@blocks=2+3", dataset="wds/digits")
    with torch.no_grad():
        with pytest.raises(HarnessError):
            model.encode_image(images)
        model.set_classifier(classifier)
        after = model.encode_image(images)
        again, *_ = vs2_plugin.load(f"vs2pp:{TINY}@blocks=2+3", dataset="wds/digits")
        again.set_classifier(classifier)
        assert torch.equal(again.encode_image(images), after)


@pytest.mark.parametrize("method", ["vs2pp", "clipsteer", "rag", "knn"])
def test_the_dtype_is_the_towers(method, in_demo, images, classifier):
    model, *_ = vs2_plugin.load(f"{method}:{TINY}", dataset="wds/digits")
    model.set_classifier(classifier)
    for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.no_grad(), torch.autocast("cpu", enabled=amp):
            assert model.encode_image(images).dtype == dtype


def test_an_oracle_by_the_query_rule_knows_the_data_set_under_evaluation(in_demo, train):
    """The classes of a gallery of several data sets are not each other's, and the query's own class is one of the data
    set under evaluation, whichever stands first."""
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    for shard, name in enumerate(("one", "two")):
        few_digits(in_demo, name, shard, count=60)
    train("union", "--dataset", "wds/one", "wds/two", "--dataset_root", "{dataset}", "--gallery_labels", "--no_amp")
    labels = torch.from_numpy(Store.default().find("union").open_gallery().labels)
    for dataset, start in (("wds/one", 0), ("wds/two", int(labels[:48].max()) + 1)):
        options = "@labels=oracle@rule=query@n=96"
        model, transform, tokenizer = vs2_plugin.load(f"vs2pp:{TINY}@union{options}", dataset=dataset)
        classifier = zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES, "cpu", amp=False)
        model.set_classifier(classifier)
        plain, *_ = vs2_plugin.load(f"vs2:{TINY}@union@alpha=0", dataset=dataset)
        (batch,) = open_images(DataSet.of(dataset, dataset.removeprefix("wds/")), "test", transform).batches(999, 0)
        with torch.no_grad():
            model.encode_image(batch.images)
            own = (F.normalize(plain.encode_image(batch.images), dim=-1) @ classifier).argmax(1)
        expected = (labels[None] == own[:, None] + start).float().mean().item()
        assert expected > 0.01 and model.vs2_facts()["vs2_agreement"] == pytest.approx(expected, abs=1e-3)
