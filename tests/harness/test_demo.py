"""The demo, and its accuracies computed again without this package."""

import csv
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vs2_plugin.cli import main
from vs2_plugin.demo import run
from vs2_plugin.demo.run import SYSTEMS

from .conftest import DIGITS, TINY, metrics

CHECKPOINT = "store/checkpoints/local-dir-tiny-clip_wds-digits"
BLOCK = "visual.transformer.resblocks.3"


def test_demo_prints_the_accuracies_of_its_results(demo):
    plain = metrics(demo.folder / "results" / f"{TINY}.json")["acc1"]
    for name, model in SYSTEMS.items():
        found = metrics(demo.folder / "results" / f"{model}.json")
        assert f"| {name} | {100 * found['acc1']:.2f} |" in demo.output
        assert model == TINY or f"| {100 * (found['acc1'] - plain):+.2f} |" in demo.output
    ran = [line.split()[1:3] for line in demo.output.splitlines() if line.startswith("$ ")]
    expected = ["vs2-train-sae --model", "clip_benchmark eval", "vs2 sweep", "vs2 report"]
    assert [" ".join(words) for words in ran] == expected


def test_with_several_seeds_the_table_gives_mean_and_spread(tmp_path, monkeypatch, capsys):
    """With few samples and rows: the SAEs do not have to be good."""
    rows = ("zero-shot CLIP", "VS2", "VS2, last two blocks", "VS2++, oracle (training labels)")
    monkeypatch.setattr(run, "SYSTEMS", {name: SYSTEMS[name] for name in rows})
    monkeypatch.setattr(run, "SAMPLES", 1000)
    assert main.main(["demo", "--out", str(tmp_path / "seeds"), "--quiet", "--seed", "0", "3"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("$ ")] == ["vs2-train-sae", "vs2"]
    assert "wrote" not in said.out and said.err == ""  # the commands' own output
    plain = metrics(tmp_path / f"seeds/results/{TINY}.json")["acc1"]
    (row,) = [line for line in lines if line.startswith("| zero-shot CLIP |")]
    assert row.split("|")[2].strip() == f"{100 * plain:.2f}"
    for name, model in (("VS2", f"vs2:{TINY}"), ("VS2, last two blocks", f"vs2:{TINY}@blocks=2+3")):
        files = [run.with_checkpoint(model, f"digits-seed{seed}") for seed in (0, 3)]
        accuracy = 100 * np.array([metrics(tmp_path / f"seeds/results/{file}.json")["acc1"] for file in files])
        (row,) = [line for line in lines if line.startswith(f"| {name} |")]
        spread = f" ({accuracy.std(ddof=1):.1f}) |"
        assert f"| {accuracy.mean():.1f}{spread}" in row and f"| {accuracy.mean() - 100 * plain:+.1f}{spread}" in row
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == list(rows)


def test_results_carry_the_facts_of_the_steering(demo):
    steered = metrics(demo.folder / "results" / f"vs2:{TINY}.json")
    manifest = json.loads((demo.folder / CHECKPOINT / "vs2.json").read_text())
    assert steered["vs2_method"] == "vs2"
    assert (steered["vs2_gamma"], steered["vs2_lam"]) == (1.5, 2.1)
    assert steered["vs2_alpha"] == pytest.approx(1.05)
    assert steered["vs2_labels"] == "none" and steered["vs2_transductive"] is False
    plain = [site["hookpoint"] for site in manifest["sites"] if site["variant"] == "plain"]
    assert steered["vs2_site"] == plain[-1] == "visual.transformer.resblocks.3"
    assert len(steered["vs2_checkpoint_digest"]) == 16
    assert all(isinstance(value, (int, float, str, bool)) for value in steered.values())
    assert not any(key.startswith("vs2_") for key in metrics(demo.folder / "results" / f"{TINY}.json"))


def test_build_carries_them_into_the_csv(in_demo, clip_benchmark):
    assert clip_benchmark("build", *map(str, Path("results").glob("*.json")), "--output", "benchmark.csv")[0] == 0
    rows = {row["model"]: row for row in csv.DictReader((in_demo / "benchmark.csv").open())}
    assert rows.keys() == set(SYSTEMS.values())
    assert rows[f"vs2:{TINY}"]["vs2_gamma"] == "1.5"
    assert rows[TINY]["vs2_gamma"] == ""
    assert 0 < float(rows[f"vs2pp:{TINY}"]["vs2_agreement"]) < 1
    assert rows[f"knn:{TINY}"]["acc5"] == "" != rows[f"vs2pp:{TINY}"]["acc5"]
    assert {name for name, row in rows.items() if row["vs2_labels"] == "oracle"} == set(ORACLES)


ORACLES = [f"{method}:{TINY}@labels=oracle" for method in ("vs2pp", "clipsteer", "rag")] + [f"proto:{TINY}"]


def test_every_result_says_which_labels_it_used(demo):
    for model in SYSTEMS.values():
        found = metrics(demo.folder / "results" / f"{model}.json").get("vs2_labels")
        uses = "oracle" if model in ORACLES else "train" if model.startswith("pass:") else "none"
        assert found == (None if model == TINY else uses)


def test_a_vote_reports_no_top_five(demo):
    """Behind the winning class, the order of the others means nothing."""
    vote, plain = (metrics(demo.folder / "results" / f"{model}.json") for model in (f"knn:{TINY}", TINY))
    assert "acc5" in plain and plain.keys() - vote.keys() == {"acc5"}
    (row,) = [line for line in demo.output.splitlines() if line.startswith("| k-NN vote |")]
    assert row.split("|")[3].strip() == ""


def test_the_oracle_is_marked_on_the_way(demo):
    """The demo shows what its commands print."""
    for model in SYSTEMS.values():
        sentence = f"vs2: {model} is an oracle: it reads labels; its accuracy is an upper bound\n"
        assert (sentence in demo.errors) == (model in ORACLES)


def read_split(folder, split, transform):
    """The preprocessed images and the labels of one split, in the order of the shards."""
    from PIL import Image

    images, labels = [], []
    for shard in range(4):
        with tarfile.open(folder / f"digits/{split}/{shard}.tar") as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    images.append(transform(Image.open(io.BytesIO(data)).convert("RGB")))
                else:
                    labels.append(int(data))
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def known(demo):
    """What the files on disk say: the tower, the images, the SAE, the gallery. Nothing of vs2_plugin is used here."""
    import open_clip
    from safetensors.torch import load_file

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{demo.folder}/tiny-clip")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{demo.folder}/tiny-clip")
    text = []
    with torch.no_grad():
        for name in (demo.folder / "digits/classnames.txt").read_text().split():
            one = F.normalize(model.encode_text(tokenizer([f"a photo of the digit {name}"])), dim=-1).mean(0)
            text.append(one / one.norm())
    sae = demo.folder / CHECKPOINT / BLOCK
    gallery = demo.folder / CHECKPOINT / "visual.transformer.resblocks.0/gallery/0"
    images, targets = read_split(demo.folder, "test", transform)
    train_images, train_labels = read_split(demo.folder, "train", transform)
    text = torch.stack(text, dim=1)
    known = SimpleNamespace(
        visual=model.visual,
        text=text,
        images=images,
        targets=targets,
        k=json.loads((sae / "cfg.json").read_text())["k"],
        w=load_file(sae / "sae.safetensors"),
        tokens=torch.from_numpy(np.load(gallery / f"{BLOCK}.npy")).float(),
        embeddings=F.normalize(torch.from_numpy(np.load(gallery / "embedding.clip.npy")).float(), dim=1),
        labels=torch.from_numpy(np.load(gallery / "labels.npy")),
        classes=F.normalize(text.float(), dim=0),
    )
    assert torch.equal(known.labels, train_labels)
    known.pseudo = (known.embeddings @ known.classes).argmax(1)
    known.codes = code(known, known.tokens)
    same = {image.numpy().tobytes(): index for index, image in enumerate(train_images)}
    known.copies = [same.get(image.numpy().tobytes()) for image in images]
    return known


def code(known, x):
    pre = (x - known.w["b_dec"]) @ known.w["encoder.weight"].T + known.w["encoder.bias"]
    return torch.where(pre >= pre.topk(known.k).values[:, -1:], pre, torch.zeros_like(pre)).clamp_min(0)


def at_norm_of(x, moved):
    return moved * x.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)


def embedding(known, x):
    return known.visual.ln_post(x) @ known.visual.proj


def neighbours(known, queries, rows, n=50):
    """Similarity and row of the 50 nearest images of the gallery, none of them pixel for pixel the query."""
    similarity = queries @ known.embeddings.T
    for place, row in enumerate(rows):
        if known.copies[row] is not None:
            similarity[place, known.copies[row]] = -9
    return similarity.topk(n)


def most_frequent(labels, similarity):
    """The most frequent label of each row; of equally frequent ones that with the greater sum of similarities."""
    chosen = []
    for some, weights in zip(labels.tolist(), similarity.double().tolist(), strict=True):
        score = lambda label: (some.count(label), sum(w for s, w in zip(some, weights, strict=True) if s == label))  # noqa: E731,B023
        chosen.append(max(set(some), key=score))
    return torch.tensor(chosen)


def contrast(known, x, rows, vectors, labels, rule="majority"):
    """The mean of the neighbours' vectors with the chosen label, less the mean of the others'."""
    queries = F.normalize(embedding(known, x), dim=1)
    similarity, found = neighbours(known, queries, rows)
    theirs = labels[found]
    chosen = most_frequent(theirs, similarity) if rule == "majority" else (queries @ known.classes).argmax(1)
    friends = (theirs == chosen[:, None]).float()
    means = [
        (m[:, :, None] * vectors[found]).sum(1) / m.sum(1, keepdim=True).clamp_min(1) for m in (friends, 1 - friends)
    ]
    return means[0] - means[1]


ALPHA = 2.1 * (1.5 - 1)


def vs2(known, x, rows):
    return at_norm_of(x, x + ALPHA * code(known, x) @ known.w["W_dec"])


def vs2pp(known, x, rows, labels="pseudo", rule="majority"):
    labels = known.pseudo if labels == "pseudo" else known.labels
    return at_norm_of(x, x + ALPHA * contrast(known, x, rows, known.codes, labels, rule) @ known.w["W_dec"])


def clipsteer(known, x, rows):
    return x + ALPHA * contrast(known, x, rows, known.tokens, known.pseudo)


def proto(known, x, rows):
    logits = (100 * known.embeddings @ known.classes).double()
    odds = torch.stack([row[own] - row[torch.arange(10) != own].logsumexp(0) for row, own in zip(logits, known.pseudo)])
    prototypes = torch.zeros(10, known.codes.shape[1])
    for label in known.pseudo.unique():
        mine = (known.pseudo == label).nonzero()[:, 0]
        prototypes[label] = known.codes[mine[odds[mine].argsort(descending=True)[:10]]].mean(0)
    return at_norm_of(x, x + ALPHA * prototypes[known.targets[rows]] @ known.w["W_dec"])


def knn(known, x, rows):
    similarity, found = neighbours(known, F.normalize(x, dim=1), rows)
    return known.classes.T[most_frequent(known.pseudo[found], similarity)]


def rag(known, x, rows):
    queries = F.normalize(x, dim=1)
    similarity, found = neighbours(known, queries, rows)
    weights = similarity.clamp_min(0) / similarity.clamp_min(0).sum(1, keepdim=True)
    retrieved = (weights[:, :, None] * known.embeddings[found]).sum(1)
    return x.norm(dim=1, keepdim=True) * (0.5 * queries + 0.5 * retrieved)


#: Model string without backbone -> what it does, and whether it does so to the embedding (else to the last block).
AGAIN = {
    "vs2": (vs2, False),
    "vs2pp": (vs2pp, False),
    "vs2pp@rule=query": (lambda *given: vs2pp(*given, rule="query"), False),
    "vs2pp@labels=oracle": (lambda *given: vs2pp(*given, labels="oracle"), False),
    "clipsteer": (clipsteer, False),
    "proto": (proto, False),
    "rag": (rag, True),
    "knn": (knn, True),
}


@pytest.mark.parametrize("name", ["plain", *AGAIN])
def test_accuracy_equals_plain_torch(demo, known, name):
    """The methods from METHOD's formulas and the files on disk alone."""
    steer, at_output = AGAIN.get(name, (None, False))
    right, visual = 0, known.visual
    with torch.no_grad():
        for start in range(0, len(known.images), 64):
            rows = range(start, min(start + 64, len(known.images)))
            x = visual.transformer(visual._embeds(known.images[start : start + 64]))[:, 0]
            x = embedding(known, x) if at_output else x
            if steer is not None:
                x = steer(known, x, rows)
            features = F.normalize(x if at_output else embedding(known, x), dim=-1)
            predicted = (100.0 * features @ known.text).float().topk(5).indices[:, 0]
            right += predicted.eq(known.targets[start : start + 64]).sum().item()
    method, _, options = name.partition("@")
    model = TINY if name == "plain" else f"{method}:{TINY}" + (f"@{options}" if options else "")
    assert right / len(known.targets) == metrics(demo.folder / "results" / f"{model}.json")["acc1"]


def test_the_same_seed_gives_the_same_numbers(in_demo, clip_benchmark):
    """Twice, as in the demo."""
    for output in ("again-1.json", "again-2.json"):
        words = ("--model", f"vs2:{TINY}", "--pretrained", "", *DIGITS, "--output", output)
        assert clip_benchmark("eval", *words)[0] == 0
    first = (in_demo / "again-1.json").read_text()
    assert first == (in_demo / "again-2.json").read_text()
    assert metrics(in_demo / "again-1.json") == metrics(in_demo / "results" / f"vs2:{TINY}.json")


def test_demo_leaves_strangers_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert main.main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "thesis.tex" in error and len(error.splitlines()) == 1
    assert (tmp_path / "thesis.tex").read_text() == "precious"
