"""Every writer of the package, with a fault at each call: old or new, never half, and a later run works.

The invariants are those of ``faults.py``: what lies under the final name is the old or the new content; only OSError
or Vs2Error comes out; the next writing works, and leaves no more than a writing that met no fault.
"""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vs2_plugin.checkpoint.checkpoint import Checkpoint, save_checkpoint
from vs2_plugin.checkpoint.records import SiteSAE, TrainingData
from vs2_plugin.classify.table import Part, columns
from vs2_plugin.classify.table import write_table as write_predictions
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.cache import ActivationCache, extract
from vs2_plugin.data.images import TrainingImages
from vs2_plugin.demo import run
from vs2_plugin.errors import CheckpointNotFound
from vs2_plugin.files import atomic_file, atomic_folder, settle
from vs2_plugin.gallery.contents import GalleryContents, GalleryPart, RetrievalEncoder
from vs2_plugin.gallery.files import GalleryFiles
from vs2_plugin.gallery.search import FaissSearch
from vs2_plugin.model.automatic import _kept
from vs2_plugin.report.rendering import save
from vs2_plugin.reproduce import stand_in
from vs2_plugin.reproduce import table as measure
from vs2_plugin.reproduce.cells import Table
from vs2_plugin.results.images import Images
from vs2_plugin.results.runs import Run, read_run, write_run, write_table
from vs2_plugin.sae.topk import SaeConfig, TopKSAE
from vs2_plugin.strength.choice import Choice
from vs2_plugin.strength.criterion import Scores
from vs2_plugin.sweep.figures import save as save_figure

from .faults import FAULTS, LEFT, Writer, troubles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made by fork and limits of Unix")
SITE = "visual.transformer.resblocks.0"


def text(version):
    return f"version {version}\n" * 1000 * version


def version_of(found):
    [version] = [version for version in (1, 2) if text(version) == found]
    return version


# ---- the writers


def write_file(folder, version):
    with atomic_file(folder / "x.txt") as scratch:
        scratch.write_text(text(version))


def read_file(folder):
    path = folder / "x.txt"
    return version_of(path.read_text()) if path.exists() else None


def write_folder(folder, version):
    with atomic_folder(folder / "around" / "x") as scratch:
        for name in "ab":
            (scratch / name).write_text(text(version))


def read_folder(folder):
    path = folder / "around" / "x"
    settle(path)
    if not path.exists():
        return None
    first, second = (version_of((path / name).read_text()) for name in "ab")
    assert first == second
    return first


def extraction(folder, version):
    values = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 4, 4) + 100 * version
    images = TrainingImages([(image, number) for number, image in enumerate(values.clone())], None, None, True)
    return extract(
        lambda batch: {"mean": batch.mean((2, 3))}, {"mean": 3}, images, ActivationCache(folder / "cache"), {"a": 1},
        device="cpu", batch_size=4, num_workers=0, dtype=np.dtype("float32"), quiet=True,
    )  # fmt: skip


def read_extraction(folder):
    found = ActivationCache(folder / "cache").open({"a": 1}, {"mean": 3}, labels=True)
    if found is None:
        return None
    version = int(found.columns["mean"][0, 0]) // 100
    assert np.array_equal(found.columns["mean"], np.arange(10)[:, None].repeat(3, 1) + 100.0 * version)
    assert found.labels.tolist() == list(range(10)) and len(set(found.digests.tolist())) == 10
    return version


@pytest.fixture(autouse=True, scope="module")
def extracted(tmp_path_factory):
    """The files that the galleries of both versions link."""
    for version in (1, 2):
        kept = {SITE: np.full((4, 8), version, np.float16), "embedding.clip": np.ones((4, 6), np.float16)}
        kept["digests"] = np.arange(4, dtype=np.uint64)
        folder = tmp_path_factory.mktemp("extracted")
        EXTRACTED[version] = {name: folder / f"{name}.npy" for name in kept}
        for name, array in kept.items():
            np.save(EXTRACTED[version][name], array)


EXTRACTED = {}


def write_checkpoint(folder, version):
    contents = GalleryContents((GalleryPart("digits", 4, None, "x"),), (SITE,), {"clip": RetrievalEncoder(6)}, False)
    torch.manual_seed(version)
    sae = TopKSAE(SaeConfig(8, 32, 4))
    facts = SiteSAE(SITE, "plain", "none", 8, [float(version)] * 8, 0.125, {"0.5": 0.25}, {"seconds": 1.5}, {})
    save_checkpoint(
        folder / "store" / "mine",
        backbone="ViT-B-32",
        pretrained="openai",
        tower=Tower("ab" * 32, ["GELU"], {"size": [32, 32]}),
        data=TrainingData(("digits",), 4, ("train",), ("digits",)),
        saes=[(facts, sae)],
        created={},
        gallery=GalleryFiles(contents, [EXTRACTED[version]]),
    )


def read_checkpoint(folder):
    try:
        found = Checkpoint.load(folder / "store" / "mine")
    except CheckpointNotFound:
        assert not (folder / "store" / "mine").exists()
        return None
    found.verify()
    version = int(found.sites[0].mean[0])
    assert (found.open_gallery().activations[SITE][:] == version).all()
    return version


def write_images(folder, version):
    numbers = np.arange(500 * version) % 7
    share = np.full(len(numbers), 0.5)
    Images(
        digest=numbers, target=numbers, prediction=numbers, rank=numbers, confidence=share, target_probability=share
    ).write(folder / "x.images.npz")


def read_images(folder):
    path = folder / "x.images.npz"
    return len(Images.read(path).digest) // 500 if path.exists() else None


def run_of(folder, version):
    metrics = {"acc1": version / 2, "note": text(version)}
    return Run(folder / "x.json", "wds/x", "vs2:B", "", "zeroshot_classification", "en", metrics)


def read_results(folder):
    path = folder / "x.json"
    return version_of(read_run(path).metrics["note"]) if path.exists() else None


def read_table(folder):
    path = folder / "x.csv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        [row] = csv.DictReader(file)
    return version_of(row["note"])


def embeddings(version):
    return np.random.default_rng(0).normal(size=(40 * version, 8)).astype(np.float32)


def write_index(folder, version):
    faiss = pytest.importorskip("faiss")
    FaissSearch._keep(faiss, INDEXES[version], folder / "clip.faiss")  # alone: FAISS cannot compute after a fork


INDEXES = {}


@pytest.fixture(autouse=True, scope="module")
def indexes():
    faiss = pytest.importorskip("faiss")
    INDEXES.update({version: FaissSearch._build(faiss, embeddings(version)) for version in (1, 2)})


def read_index(folder):
    faiss = pytest.importorskip("faiss")
    path = folder / "clip.faiss"
    return faiss.read_index(str(path)).ntotal // 40 if path.exists() else None


def choice(version):
    scores = Scores(*[np.arange(2.0).tolist()] * len(Scores._fields))
    return Choice([{"alpha": 0.0}, {"alpha": 0.5}], version - 1, scores, 5)


def write_choice(folder, version):
    _kept(folder / "auto", {"version": version}, torch.ones(2, 2), lambda: choice(version))


def read_choice(folder):
    found = [json.loads(path.read_text())["choice"]["index"] + 1 for path in (folder / "auto").glob("[!.]*")]
    return max(found, default=None)


def write_page(folder, version):
    files = {name: b"made by vs2 test\n" + text(version).encode() for name in ("a.html", "b.csv")}
    save(folder / "out", files, "vs2 test")


def read_page(folder):
    """Each file whole; the first that is written is told."""
    paths = [folder / "out" / name for name in ("a.html", "b.csv")]
    first, _ = (version_of(path.read_text().partition("\n")[2]) if path.exists() else None for path in paths)
    return first


def write_measured(folder, version):
    measure.write(Table(folder / "x.yaml", text(version), "source", (), ()), [], folder)


def read_measured(folder):
    """Each file whole; the first that is written is told."""
    if (folder / "x.json").exists():
        version_of(json.loads((folder / "x.json").read_text())["title"])
    found = (folder / "x.md").read_text() if (folder / "x.md").exists() else None
    return None if found is None else found.count("version 2") // 1000 or 1


def write_picture(folder, version):
    save_figure(Figure((1, 1)), folder / "x.png", "vs2 sweep")


def read_picture(folder):
    path = folder / "x.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        image.load()
    return 2  # both are whole


def few_digits(folder):
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.tar").write_text(text(1))
    (folder / "classnames.txt").write_text(text(1))


@pytest.fixture(autouse=True)
def writes_few_digits(monkeypatch):
    monkeypatch.setattr(stand_in, "write_digits", few_digits)
    monkeypatch.setattr(run, "write_digits", few_digits)


def write_workplace(folder, version):
    stand_in.workplace(folder, write=True)


def read_workplace(folder):
    """Both folders whole."""
    there = [(folder / name).exists() for name in (*DIGITS, *CLIP)]
    assert len(set(there[: len(DIGITS)])) == len(set(there[len(DIGITS) :])) == 1
    return 2 if all(there) else None


DIGITS = [f"digits/{name}" for name in ("", "train/0.tar", "test/0.tar", "classnames.txt")]
CLIP = [f"tiny-clip/{name}" for name in ("", "open_clip_config.json", "open_clip_model.safetensors")]


def read_demo(folder):
    """It begins with nothing each time, and so may be half."""
    return 2 if all((folder / "out" / name).exists() for name in (*DIGITS, *CLIP, "results")) else None


def write_classified(folder, version):
    part, paths = Part(folder / "out" / "x.csv"), [f"{number}.png" for number in range(6)]
    (folder / "out").mkdir(exist_ok=True)
    with part.opened():
        done, _ = part.settle({"version": version}, paths, 2)
        for start in range(done, 6, 2):
            part.append({"path": path, "error": text(version)} for path in paths[start : start + 2])
        write_predictions(folder / "out" / "x.csv", columns(2), part.rows())
        part.remove()


def read_classified(folder):
    path = folder / "out" / "x.csv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{number}.png" for number in range(6)]
    [version] = {version_of(row["error"]) for row in rows}
    return version


WRITERS = [
    Writer("file", write_file, read_file),
    Writer("folder", write_folder, read_folder),
    Writer("extraction", extraction, read_extraction),
    Writer("checkpoint", write_checkpoint, read_checkpoint),
    Writer("images", write_images, read_images),
    Writer("results", lambda folder, version: write_run(run_of(folder, version)), read_results),
    Writer("table", lambda folder, version: write_table(folder / "x.csv", [run_of(folder, version)]), read_table),
    Writer("index", write_index, read_index, kept=False),
    Writer("choice", write_choice, read_choice, kept=False),
    Writer("classified", write_classified, read_classified),
    Writer("page", write_page, read_page),
    Writer("measured", write_measured, read_measured),
    Writer("picture", write_picture, read_picture, over=(None,)),
    Writer("workplace", write_workplace, read_workplace, over=(None,)),
    Writer("demo", lambda folder, version: run.prepare(folder / "out"), read_demo, over=(None,)),
]
#: Faults after which the next writing leaves what a process that died had begun.
LITTERING = {"dies", "dies while it writes"}
CASES = [
    pytest.param(
        writer, fault, before, id=f"{writer.name} {fault} over {'nothing' if before is None else 'an old one'}"
    )
    for writer in WRITERS
    for fault in FAULTS
    for before in writer.over
]  # fmt: skip


@pytest.mark.parametrize(("writer", "fault", "before"), CASES)
def test_a_fault_leaves_old_or_new_and_a_later_writing_works(writer, fault, before, tmp_path):
    found = troubles(writer, fault, tmp_path, before)
    assert [one for one in found if not (fault in LITTERING and LEFT in one)] == []
