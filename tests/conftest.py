"""Fixtures that several test modules share: tiny random models, SAEs, images and shards. No test uses a network.

torch is imported by the fixtures, and not here: the process that hands tests out has no use for it."""

import os
import signal

# Read when torch is loaded: threads that sleep while they wait do not slow each other down on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # these processes, and commands that they start, share the cores
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background, which tests of Ctrl-C are to be as any
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A developer's own wish for per-image results, which add to every results file, is none of the tests'; nor are methods.
os.environ.pop("VS2_PER_IMAGE", None)
os.environ.pop("VS2_PLUGINS", None)

import io
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# The same cases every time; by "nightly" (--hypothesis-profile) a hundred times as many, and others each time.
settings.register_profile("quick", deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", deadline=None, max_examples=10_000, print_blob=True)
settings.load_profile("quick")

#: Files that take longest, longest first: they begin, so that no process is left with one of them at the end.
LONGEST = ["gpu/test_demo", "gpu/test_commands", "gpu/test_steering"]
LONGEST += ["test_faults", "harness/test_demo", "harness/test_patches", "model/test_automatic", "reproduce/test_run"]
LONGEST += ["sweep/test_evaluate", "harness/test_recorder", "reproduce/test_paper", "training/test_resume"]
LONGEST += ["harness/test_gallery", "test_strength_study", "model/test_places", "harness/test_autoload"]
LONGEST += ["test_distributed", "performance/test_suite", "steering/test_reference", "model/test_readout"]
LONGEST += ["harness/test_towers", "sae/test_gpu", "test_architecture", "checkpoint/test_mutations"]


def pytest_addoption(parser):
    parser.addoption("--replayed", action="store_true", help="replay models as on a GPU; see tests/tape.py")


@pytest.fixture(autouse=True, scope="session")
def replayed(request):
    """With ``--replayed``, have all models replayed."""
    if not request.config.getoption("--replayed"):
        yield
        return
    from .tape import replay_all

    with pytest.MonkeyPatch.context() as patch:
        replay_all(patch)
        yield


def pytest_collection_modifyitems(items):
    order = {f"{Path(__file__).parent / name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


@pytest.fixture(autouse=True, scope="session")
def one_vocabulary():
    """Let open_clip read the 49,408 words of its tokenizer once, and not for every model: models are made by the
    hundred here."""
    factory = sys.modules.get("open_clip.factory")
    if factory is None:  # a run of a few tests
        yield
        return
    tokenizer, known = factory.SimpleTokenizer, {}

    def same(**settings):
        key = repr(settings)
        if key not in known:
            known[key] = tokenizer(**settings)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "SimpleTokenizer", same)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function that gives a copy, this process's own, of a folder that ``fill`` makes once for all processes of a
    run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # that of all of them

    def copy(name, fill):
        made, done = root / f"once-{name}", root / f"once-{name}.done"
        with FileLock(root / f"once-{name}.lock"):
            if not done.exists():
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                fill(made)
                done.touch()
        return shutil.copytree(made, tmp_path_factory.mktemp(name), dirs_exist_ok=True)

    return copy


#: How many of the demo's digits most tests train on, and as many they evaluate: a third.
IMAGES = 300


@pytest.fixture(scope="session")
def prepare():
    """A function that writes the demo's digits, the first ``IMAGES`` of either split, and its tiny CLIP into a
    folder."""
    from vs2_plugin.demo import run

    def fill(folder):
        run.prepare(folder)
        for split in ("train", "test"):
            shards = sorted((folder / "digits" / split).glob("*.tar"))
            for shard in shards:
                with tarfile.open(shard) as tar:
                    files = [(member, tar.extractfile(member)) for member in tar]
                    with tarfile.open(shard.with_suffix(".few"), "w") as few:
                        for member, file in files[: 2 * IMAGES // len(shards)]:  # an image and its label each
                            few.addfile(member, file)
                shard.with_suffix(".few").replace(shard)

    return fill


@pytest.fixture(scope="session")
def workplace(once, prepare):
    """A folder with some of the demo's digits and its tiny CLIP, to be copied."""
    return once("workplace", prepare)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Leave files to the system's memory: what becomes of them where the power fails, no test can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def at(folder, patch):
    """Work inside a folder, with the store in it."""
    patch.chdir(folder)
    patch.setenv("VS2_STORE", "store")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Keep every test away from the user's own store."""
    monkeypatch.setenv("VS2_STORE", str(tmp_path / "default-store"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that connects to anything but this machine."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"the test connected to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def elsewhere():
    """A function that runs Python code in another process and gives what it prints."""

    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    return run


@pytest.fixture(scope="session")
def make_clip():
    """A function that builds a tiny random CLIP of open_clip; keywords change its vision tower."""
    import torch
    from open_clip.model import CLIP

    def make(seed=0, quick_gelu=False, **vision):
        torch.manual_seed(seed)
        vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3, **vision}
        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        return CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval()

    return make


@pytest.fixture(scope="session")
def make_sae():
    """A function that builds a random SAE with every parameter away from its initial value."""
    import torch

    from vs2_plugin import SaeConfig, TopKSAE

    def make(d_in=32, num_latents=64, k=8, seed=0, **config):
        torch.manual_seed(seed)
        sae = TopKSAE(SaeConfig(d_in, num_latents, k, **config))
        with torch.no_grad():
            sae.b_dec.normal_()
            sae.encoder.bias.normal_(std=0.1)
        return sae.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def batch():
    """Four random images ``[4, 3, 32, 32]``."""
    import torch

    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def picture():
    """A function that gives the bytes of an 8 × 8 image of one grey value."""
    from PIL import Image

    def encode(grey, format="png"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_shards():
    """A function that writes webdataset shards, each given as ``{member name: bytes}``, and their ``nshards.txt``."""

    def write(folder, shards, mode="w"):
        folder.mkdir(parents=True, exist_ok=True)
        for number, members in enumerate(shards):
            with tarfile.open(folder / f"{number}.tar", mode) as tar:
                for name, data in members.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / "nshards.txt").write_text(f"{len(shards)}\n")

    return write


@pytest.fixture
def again(monkeypatch):
    """What stands for a CUDA graph."""
    from .tape import Tape, stand_in

    stand_in(monkeypatch)
    return Tape


@pytest.fixture(scope="session")
def interpreted():
    """A context in which modules of Triton kernels, whose names are given, are imported anew, to be interpreted."""
    import importlib
    from contextlib import contextmanager

    def of_triton():
        return [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]

    @contextmanager
    def within(*names):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")  # which counts when Triton is imported
            for name in of_triton():
                patch.delitem(sys.modules, name)
            for name in names:
                package, _, own = name.rpartition(".")
                patch.delitem(sys.modules, name, raising=False)
                patch.delattr(importlib.import_module(package), own, raising=False)
            yield importlib.import_module(names[-1])
            for name in names:
                package, _, own = name.rpartition(".")
                sys.modules.pop(name, None)
                vars(importlib.import_module(package)).pop(own, None)
            for name in of_triton():  # those of before come back as a whole, or it is imported anew
                del sys.modules[name]

    return within


@pytest.fixture
def sparsify(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it would ask for a GPU
    try:
        import sparsify
    except ImportError as error:  # it is not there, or its own packages do not fit each other
        pytest.skip(f"sparsify cannot be imported: {error}")
    return sparsify


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model hub on this machine, which the hub's own client uses, with an empty cache."""
    from huggingface_hub import constants

    from .hub_server import listening

    with listening() as (served, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield served
