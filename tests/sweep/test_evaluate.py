"""``vs2 sweep`` beside the real ``clip_benchmark eval``: equal results, and how much work they took."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

from vs2_plugin.cli import train_sae
from vs2_plugin.demo.digits import read_digits
from vs2_plugin.gallery.search import ExactSearch
from vs2_plugin.method import LABELS, Method, Option
from vs2_plugin.plugins import registry
from vs2_plugin.results.runs import DIGEST
from vs2_plugin.sae.topk import TopKSAE
from vs2_plugin.steering.neighbours import Codes
from vs2_plugin.sweep import evaluate
from vs2_plugin.sweep.grid import read_grids

from .conftest import AUTOCAST, BATCHES, DATA, TINY, at, both_commands, harness, interrupt_write, result, sweep

STRINGS = [
    f"vs2:{TINY}@gamma=1:2:0.5@lam=2,4",  # two points of α = 0, and two of α = 2
    f"vs2:{TINY}@alpha=0,2,-1",
    f"vs2:{TINY}@gate=0.9,0.99",
    f"vs2:{TINY}@blocks=0,2+3,all@gate=0.95",
    f"vs2:{TINY}@other@lam=1",
    f"pass:{TINY}",
    f"rec:{TINY}@blocks=3,all",
    f"amp:{TINY}@gamma=-1,1.5",
    f"vs2pp:{TINY}@n=10,50@rule=majority,query@lam=1,3",
    f"vs2pp:{TINY}@labels=oracle@gate=0.9",
    f"vs2pp:{TINY}@blocks=1+2@rule=query",
    f"clipsteer:{TINY}@labels=pseudo,oracle@alpha=0.5,1",
    f"clipsteer:{TINY}@blocks=2",
    f"rag:{TINY}@mix=0.3,1@labels=none,oracle",
    f"rag:{TINY}@n=5@labels=pseudo",
    f"knn:{TINY}@n=1,50",
    f"proto:{TINY}@lam=1,2",
    f"proto:{TINY}@blocks=1",
]
POINTS = [point.model for grid in read_grids(STRINGS) for point in grid.points]


@pytest.fixture(scope="module")
def both(laboratory):
    """All points by both commands, in float32: the folder of ``harness`` and ``sweep``."""
    both_commands(laboratory, STRINGS, POINTS)
    return laboratory


@pytest.mark.parametrize("model", [TINY, *POINTS])
def test_results_equal_the_harness(both, model):
    expected = result(both / "harness" / f"{model}.json")
    assert result(both / "sweep" / f"{model}.json") == expected
    assert set(expected) == {"dataset", "model", "pretrained", "task", "metrics", "language"}


def test_results_equal_the_harness_under_autocast(both, monkeypatch):
    """A point of each way to steer: at the end of the tower, in its middle, by neighbours and at the output."""
    strings = [f"vs2:{TINY}@gate=0.9", f"vs2:{TINY}@blocks=2+3", f"vs2pp:{TINY}@n=10", f"rag:{TINY}", f"knn:{TINY}"]
    both_commands(both, strings, strings, prefix="amp-", data=AUTOCAST)
    for model in (TINY, *strings):
        assert result(both / "amp-sweep" / f"{model}.json") == result(both / "amp-harness" / f"{model}.json")
    # Equal results with autocast and without are not the same thing twice.
    at(both, monkeypatch)
    assert sweep(strings[0], output="no-amp/{model}.json", data=(*AUTOCAST, "--no_amp")) == 0
    fvu = [result(both / name / f"{strings[0]}.json")["metrics"]["vs2_mean_fvu"] for name in ("no-amp", "amp-sweep")]
    assert fvu[0] != fvu[1]


@pytest.mark.parametrize("model", [f"vs2:{TINY}@alpha=0", f"vs2:{TINY}@gamma=1@lam=4"])
def test_no_strength_is_the_plain_model(both, model):
    plain, found = (result(both / "sweep" / f"{name}.json")["metrics"] for name in (TINY, model))
    assert {key: found[key] for key in plain} == plain


def test_the_table_is_that_of_clip_benchmark_build(both):
    rows = {row["model"]: row for row in csv.DictReader((both / "sweep/sweep.csv").open())}
    assert set(rows) == {TINY, *POINTS}
    one = result(both / f"sweep/knn:{TINY}@n=50.json")
    row = rows[f"knn:{TINY}@n=50"]
    assert row["acc1"] == str(one["metrics"]["acc1"]) and row["acc5"] == "" and row["vs2_n"] == "50"
    assert row["model_fullname"] == f"knn:{TINY}@n=50 " and row["task"] == "zeroshot_classification"


def test_there_is_a_picture_for_each_string_with_several_values(both):
    pictures = {path.name: path.read_bytes()[:8] for path in (both / "sweep").glob("*.png")}
    several = {grid.text for grid in read_grids(STRINGS) if grid.axes}
    # Two numeric axes and a third: one heat map for each of its values.
    halves = {f"vs2pp:{TINY}@n=10,50@rule=majority,query@lam=1,3@rule={rule}" for rule in ("majority", "query")}
    assert set(pictures) == {f"{text}.png" for text in several - {STRINGS[8]} | halves}
    assert set(pictures.values()) == {b"\x89PNG\r\n\x1a\n"}


# ---- work


@pytest.fixture
def counted(monkeypatch):
    """How often things were done."""
    counts = SimpleNamespace(tower=0, blocks=0, encode=0, search=0, codes=0)

    def count(owner, method, name, which=lambda *args: True):
        inner = getattr(owner, method)

        def counting(self, *args, **kwargs):
            setattr(counts, name, getattr(counts, name) + which(self, *args))
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    count(VisionTransformer, "forward", "tower")
    count(ResidualAttentionBlock, "forward", "blocks", lambda block, x, *_: x.shape[-1] == 128)  # not the text tower's
    count(TopKSAE, "encode", "encode")
    count(ExactSearch, "__call__", "search")
    count(Codes, "_encode_all", "codes")
    return counts


def test_the_tower_runs_once_and_codes_are_computed_once(here, counted):
    assert sweep(f"vs2:{TINY}@gamma=1:2:0.2@lam=0:4:1", f"vs2:{TINY}@gate=0.9,0.99", output="c1/{model}.json") == 0
    assert len(list((here / "c1").glob("vs2*.json"))) == 32
    assert (counted.tower, counted.blocks, counted.encode) == (BATCHES, 4 * BATCHES, BATCHES)


def test_neighbours_are_looked_up_once_for_each_n(here, counted):
    strings = [f"vs2pp:{TINY}@n=10,20@rule=majority,query@lam=1:3:1", f"clipsteer:{TINY}@n=10@lam=1:3:1"]
    assert sweep(*strings, f"proto:{TINY}@lam=1:3:1", output="c2/{model}.json") == 0
    assert (counted.tower, counted.search, counted.codes) == (BATCHES, 2 * BATCHES, 1)
    assert counted.encode == BATCHES + 1  # the batches, for their FVU, and the gallery


def test_before_the_last_block_only_the_rest_runs_again(here, counted):
    assert sweep(f"vs2:{TINY}@blocks=2@lam=1,2", f"vs2:{TINY}@blocks=0+3", output="c3/{model}.json") == 0
    assert counted.blocks == (4 + 1 + 1 + 3) * BATCHES


def test_points_of_one_alpha_are_evaluated_once(here, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification

    seen, inner = [], zeroshot_classification.run_classification
    monkeypatch.setattr(
        zeroshot_classification, "run_classification", lambda *args, **kw: seen.append(1) or inner(*args, **kw)
    )
    assert sweep(f"vs2:{TINY}@gamma=1,2,3@lam=0,1,2", output="c4/{model}.json") == 0
    assert len(seen) == 1 + len({0, 1, 2, 4})
    assert len(list((here / "c4").glob("*.json"))) == 10


# ---- where the shortcut to the tower's end does not hold, and plugins of all manners


def test_features_that_differ_send_points_through_the_tower(both, monkeypatch):
    at(both, monkeypatch)
    monkeypatch.setattr(evaluate, "finish", lambda model, site, x: x.new_zeros(len(x), 64))
    strings = [STRINGS[0], STRINGS[2], STRINGS[8], STRINGS[13], STRINGS[15], STRINGS[16]]
    assert sweep(*strings, output="through/{model}.json") == 0
    for point in (point for grid in read_grids(strings) for point in grid.points):
        name = f"{point.model}.json"
        assert result(both / "through" / name) == result(both / "harness" / name)


def _in_place(context, strength):
    def steer(x):
        code = context.sae.encode(x)
        code.values.mul_(strength)
        x += context.sae.combine(code).neg_()
        return x

    return steer


def _untracked(context, strength):
    return torch.inference_mode()(lambda x: x + strength * context.sae.combine(context.sae.encode(x)))


class _Counting(torch.nn.Module):
    """A steering whose facts change with the images."""

    def __init__(self, strength):
        super().__init__()
        self.strength, self.seen = strength, 0

    @property
    def facts(self):
        return {"seen": self.seen}

    def forward(self, x):
        self.seen += len(x)
        return x * self.strength


STRENGTH = [Option("strength", float, 1.0)]
OTHERS = [
    Method("inplace", _in_place, STRENGTH),
    Method("untracked", _untracked, STRENGTH),
    Method("counting", lambda context, strength: _Counting(strength), STRENGTH),
    Method("free", lambda context, strength: lambda x: x + strength, STRENGTH, needs_checkpoint=False),
    Method("labelled", lambda context, labels: lambda x: x, [LABELS], needs_checkpoint=False),
]


def test_methods_of_plugins(here, monkeypatch):
    """None of them disturbs another, nor what comes after it."""
    strings = [f"vs2:{TINY}@lam=2"]
    for method in OTHERS:
        monkeypatch.setitem(registry().methods, method.name, method)
        monkeypatch.setitem(registry().owners, method.name, "a test")
        values = "labels=pseudo,oracle" if method.name == "labelled" else "strength=0.5,1.5"
        strings += [f"{method.name}:{TINY}@{values}"]
    strings += [f"vs2:{TINY}@lam=3"]
    models = [point.model for grid in read_grids(strings) for point in grid.points]
    (here / "plugin-harness").mkdir()
    harness(*models, output="plugin-harness/{model}.json")
    assert sweep(*strings, output="plugin-sweep/{model}.json") == 0
    for model in models:
        assert result(f"plugin-sweep/{model}.json") == result(f"plugin-harness/{model}.json")


@pytest.mark.parametrize("blocks", ["", "@blocks=1"])  # at the tower's end, and within
def test_a_point_that_fails_is_named(blocks, here, monkeypatch, capsys):
    build = lambda context, strength: lambda x: x / 0 if strength == 2 else x  # noqa: E731
    monkeypatch.setitem(registry().methods, "fails", Method("fails", build, STRENGTH))
    monkeypatch.setitem(registry().owners, "fails", "a test")
    assert sweep(f"fails:{TINY}@strength=1,2,3{blocks}", output="fails/{model}.json") == 2
    point = f"fails:{TINY}@strength=2{blocks}"
    assert f"model {point!r}: method 'fails' of a test steered to NaN or infinity at " in capsys.readouterr().err


# ---- several checkpoints, models and formats


def test_lists_of_checkpoints(here, capsys):
    name = f"{TINY.replace(':', '-')}_wds-few"
    assert sweep(f"vs2:{TINY}@{name},other@lam=1,2", output="k/{model}.json") == 0
    harness(f"vs2:{TINY}@other@lam=2", output="k-harness.json")
    assert result(f"k/vs2:{TINY}@other@lam=2.json") == result("k-harness.json")
    output = capsys.readouterr().out
    assert "tuning on test data" in output and "best of 4:" in output and f"zero-shot {TINY}:" in output


def test_an_oracle_is_not_the_best_of_a_sweep(here, capsys):
    name = f"{TINY.replace(':', '-')}_wds-few"
    assert sweep(f"vs2:{TINY}@{name}", f"proto:{TINY}@{name}", output="o/{model}.json") == 0
    assert f"by vs2:{TINY}@{name}" in capsys.readouterr().out


def test_names_with_slashes(here):
    assert sweep(f"vs2:local-dir:./tiny-clip@{TINY.replace(':', '-')}_wds-few@lam=1,2", output="s/{model}.json") == 0
    files = sorted(path.name for path in (here / "s").glob("*.json"))
    assert len(files) == 3 and files[0] == "local-dir:.-tiny-clip.json"
    assert result(here / "s" / files[0])["model"] == "local-dir:./tiny-clip"


def test_images_with_several_labels(here, monkeypatch, capsys):
    """clip_benchmark then reports the mean average precision."""
    from clip_benchmark.datasets import builder

    class Several(torch.utils.data.Dataset):
        classes, templates = ["one", "two", "three"], ["a photo of a {c}"]

        def __len__(self):
            return 40

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            return torch.randn(3, 32, 32, generator=generator), torch.randint(2, (3,), generator=generator)

    monkeypatch.setattr(builder, "build_dataset", lambda **settings: Several())
    data = ("--pretrained", "", "--dataset", "several", "--num_workers", "0", "--no_amp", "--batch_size", "4")
    assert sweep(f"vs2:{TINY}@other@lam=0,2", output="m/{model}.json", data=data) == 0
    assert " % mean average precision\n" in capsys.readouterr().out
    plain, same, other = (
        result(f"m/{name}.json")["metrics"]["mean_average_precision"]
        for name in (TINY, f"vs2:{TINY}@other@lam=0", f"vs2:{TINY}@other@lam=2")
    )
    assert plain == same != other


# ---- going on, and what is refused


def test_existing_results_are_kept(here, monkeypatch):
    strings = (f"vs2:{TINY}@lam=1:3:1",)
    assert sweep(*strings, output="e/{model}.json") == 0
    gone = here / f"e/vs2:{TINY}@lam=2.json"
    before, table = result(gone), (here / "e/sweep.csv").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in (here / "e").glob("*.json") if path != gone}
    gone.unlink()
    assert sweep(*strings, output="e/{model}.json", words=("--skip_existing",)) == 0
    assert result(gone) == before and (here / "e/sweep.csv").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("nothing was left to do"))
    assert sweep(*strings, output="e/{model}.json", words=("--skip_existing",)) == 0


def test_a_file_that_is_no_result_is_named(here, capsys):
    (here / "n").mkdir()
    (here / f"n/vs2:{TINY}.json").write_text('{"metrics": {}}')
    assert sweep(f"vs2:{TINY}", output="n/{model}.json", words=("--skip_existing",)) == 2
    assert "is not a results file of clip_benchmark" in capsys.readouterr().err


def test_results_of_something_else_are_not_taken_for_those_of_a_sweep(here, capsys, monkeypatch):
    point, name = here / f"o/vs2:{TINY}@alpha=0.5.json", f"vs2:{TINY}@alpha=0.5"
    words = ("--skip_existing",)
    assert sweep(name, output="o/{model}.json") == 0
    first = point.read_text()
    assert sweep(name, output="o/{model}.json", words=words) == 0
    assert sweep(name, output="o/{model}.json", words=(*words, "--split", "train")) == 2
    said = capsys.readouterr().err
    assert "holds results of the split 'test', or of an earlier version, which named no split for plain" in said
    assert "expected 'train'; remove it, give another --output" in said
    assert sweep(name, output="o/{model}.json", words=(*words, "--language", "de")) == 2
    assert "and not of this sweep; remove it, give another --output" in capsys.readouterr().err
    content = json.loads(first)
    point.write_text(json.dumps({**content, "metrics": {**content["metrics"], "acc1": 0.99}}))
    assert sweep(name, output="o/{model}.json", words=words) == 2
    assert "was changed after it was written, according to the digest in it; remove it" in capsys.readouterr().err
    del content["metrics"][DIGEST]
    for key, value, problem in [
        ("vs2_checkpoint_digest", "0" * 16, "holds results of another SAE than local-dir-tiny-clip_wds-few is now"),
        ("vs2_split", "train", "holds results of the split 'train'; expected 'test'"),
    ]:
        point.write_text(json.dumps({**content, "metrics": {**content["metrics"], key: value}}))
        assert sweep(name, output="o/{model}.json", words=words) == 2
        assert problem in capsys.readouterr().err
    assert sweep(name, output="t/{model}.json", words=("--split", "train")) == 0
    assert result(here / f"t/{name}.json")["metrics"]["vs2_split"] == "train"
    assert "vs2_split" not in content["metrics"]
    # The plain model's result says its split too.
    assert sweep(f"vs2:{TINY}@alpha=2", output="t/{model}.json", words=words) == 2
    assert f"{TINY}.json holds results of the split 'train'; expected 'test'" in capsys.readouterr().err


NAMES = [f"number {digit}" for digit in range(10)]
OTHER = {
    "class names": ("--custom_classname_file", {"wds/few": NAMES, "few": NAMES}),
    "prompts": ("--custom_template_file", {"wds/few": ["{c}"], "few": ["{c}"]}),
}


@pytest.mark.parametrize("what", OTHER)
def test_results_of_other_settings_are_not_mixed_in(what, here, capsys):
    flag, content = OTHER[what]
    (here / "other.json").write_text(json.dumps(content))
    words = (flag, "other.json")
    output = f"m-{what.replace(' ', '-')}/{{model}}.json"
    assert sweep(f"centre:{TINY}@alpha=1", output=output) == 0
    assert sweep(f"centre:{TINY}@alpha=1,2", output=output, words=("--skip_existing", *words)) == 2
    refusal = f".json is of other {what}; remove it, give another --output, or omit --skip_existing"
    assert refusal in capsys.readouterr().err
    assert sweep(f"centre:{TINY}@alpha=2", output=output, words=words) == 0  # of the new settings
    assert sweep(f"centre:{TINY}@alpha=1,3", output=output, words=("--skip_existing", *words)) == 2
    assert f"alpha=1{refusal}" in capsys.readouterr().err  # the one that is still of the old ones
    assert sweep(f"centre:{TINY}@alpha=1,2", output=output, words=words) == 0  # without results that are kept
    assert sweep(f"centre:{TINY}@alpha=1,3", output=output, words=("--skip_existing", *words)) == 0


def test_per_image_results_that_a_sweep_replaces_are_named(here, caplog, monkeypatch):
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    (here / "z").mkdir()
    harness(f"centre:{TINY}@alpha=1", output="z/{model}.json")
    assert (here / f"z/centre:{TINY}@alpha=1.images.npz").is_file()
    assert sweep(f"centre:{TINY}@alpha=1", output="z/{model}.json") == 0
    assert "1 result with per-image results will be replaced by results without" in caplog.text


def test_a_kept_result_of_an_earlier_sae_is_told(here, caplog):
    (here / "y").mkdir()
    harness(f"vs2:{TINY}", output="y/{model}.json")
    file = here / f"y/vs2:{TINY}.json"
    content = json.loads(file.read_text())
    for digest, told in ((content["metrics"]["vs2_checkpoint_digest"], 0), ("0" * 16, 1)):
        file.write_text(json.dumps({**content, "metrics": {**content["metrics"], "vs2_checkpoint_digest": digest}}))
        harness(f"vs2:{TINY}", output="y/{model}.json", data=(*DATA, "--skip_existing"))
        assert caplog.text.count("holds results of another SAE than local-dir-tiny-clip_wds-few is now") == told


def test_results_of_another_precision_are_not_mixed_in(here, capsys):
    assert sweep(f"centre:{TINY}@alpha=1", output="a/{model}.json") == 0
    data = tuple(word for word in DATA if word != "--no_amp")
    words = ("--skip_existing",)
    assert sweep(f"centre:{TINY}@alpha=1,2", output="a/{model}.json", words=words, data=data) == 2
    assert f"{TINY}.json is of other precision; remove it" in capsys.readouterr().err


def test_results_of_another_folder_of_the_same_name_are_not_mixed_in(here, capsys):
    for number, place in enumerate(("first", "second")):
        for name in ("zero", "one"):
            (here / place / "pictures/test" / name).mkdir(parents=True)
            read_digits("test")[0][number].save(here / place / "pictures/test" / name / "x.png")
    words = ("--dataset_root", "root", "--dataset")
    assert sweep(f"tda:{TINY}", output="p/{model}.json", words=(*words, "first/pictures")) == 0
    more = (f"tda:{TINY}", f"tda:{TINY}@positive=1")
    words = ("--skip_existing", *words)
    assert sweep(*more, output="p/{model}.json", words=(*words, "second/pictures")) == 2
    assert f"{TINY}.json is of other images; remove it" in capsys.readouterr().err
    assert sweep(*more, output="p/{model}.json", words=(*words, "first/pictures")) == 0


def test_results_of_another_sae_of_a_folder_are_not_taken_whatever_its_path_holds(here, capsys):
    folder = here / "shots {1}" / "digits"
    for split in ("train", "test"):
        pictures, labels = read_digits(split)
        for number in range(40):
            place = folder / split / str(labels[number])
            place.mkdir(parents=True, exist_ok=True)
            pictures[number].save(place / f"{number}.png")
    train = ["--model", TINY, "--dataset", f"{folder}/", "--no_amp", "--num_workers", "0", "--quiet", "--samples"]
    data = ("--pretrained", "", "--dataset", f"{folder}/", "--num_workers", "0", "--no_amp")
    assert train_sae.main([*train, "1000"]) == sweep(f"vs2:{TINY}", output="f/{model}.json", data=data) == 0
    assert sweep(f"vs2:{TINY}", output="f/{model}.json", data=data, words=("--skip_existing",)) == 0
    assert train_sae.main([*train, "2000", "--overwrite"]) == 0
    capsys.readouterr()
    assert sweep(f"vs2:{TINY}", output="f/{model}.json", data=data, words=("--skip_existing",)) == 2
    assert "holds results of another SAE than local-dir-tiny-clip_folder-digits is now" in capsys.readouterr().err


def test_a_changed_file_of_latents_is_another_result(here, capsys):
    (here / "edits.json").write_text('{"1": 0}')
    name = f"latents:{TINY}@edits=edits.json"
    assert sweep(name, output="e/{model}.json") == sweep(name, output="e/{model}.json", words=["--skip_existing"]) == 0
    (here / "edits.json").write_text('{"1": 2}')
    assert sweep(name, output="e/{model}.json", words=["--skip_existing"]) == 2
    assert "holds results with another content of a file that latents:" in capsys.readouterr().err


def test_an_interruption_leaves_whole_files_and_says_how_to_go_on(here, monkeypatch, capsys):
    interrupt_write(monkeypatch, 3)
    assert sweep(f"vs2:{TINY}@lam=1:4:1", output="i/{model}.json") == 130
    assert "interrupted; 2 of 5 results are in i; to continue, run the same command with --skip_existing\n" in (
        capsys.readouterr().err
    )
    names = {path.name for path in (here / "i").iterdir()}
    assert names == {f"{TINY}.json", f"vs2:{TINY}@lam=1.json", "sweep.settings"}
    assert sweep(f"vs2:{TINY}@lam=1:4:1", output="i/{model}.json", words=("--skip_existing",)) == 0
    assert len(list((here / "i").glob("*.json"))) == 5


REFUSED = [
    ((f"vs2:{TINY}@gamma=1:3",), (), "expected three numbers START:STOP:STEP"),
    ((f"vs2:{TINY}@gama=1:3:1",), (), "did you mean 'gamma'"),
    ((TINY,), (), "names no steered model"),
    (("vs2:ViT-B-23@lam=1,2",), (), "open_clip has no model 'ViT-B-23'"),
    ((f"vs2:{TINY}@lam=1,2", "ViT-B-23"), (), "open_clip has no model 'ViT-B-23'"),
    ((f"vs2:{TINY}@none,such@lam=1,2",), (), "no SAE checkpoint 'none'"),
    ((f"vs2:{TINY}@blocks=3,7",), (), "has no SAE at block 7"),
    ((f"vs2pp:{TINY}@n=5,5000",), (), "n is 5000, but the gallery"),
    ((f"vs2:{TINY}@lam=1,2",), ("--output", "x.json"), "put {model} into its name"),
    ((f"vs2:{TINY}@lam=1,2",), ("--output", "{model}/x.json"), "in the file's name, not in its folder's"),
    ((f"vs2:{TINY}@lam=1,2",), ("--output", "{modell}.json"), "cannot be filled in"),
    ((f"vs2:{TINY}@lam=1,2",), ("--output", "few/classnames.txt/{model}.json"), "could not be written"),
    ((f"vs2:{TINY}@lam=1,2",), ("--dataset", "flickr30k"), "the task of flickr30k is zeroshot_retrieval"),
]


@pytest.mark.parametrize(("models", "words", "message"), REFUSED)
def test_mistakes_are_found_before_anything_is_loaded(here, monkeypatch, capsys, models, words, message):
    monkeypatch.setattr(evaluate, "load_backbone", lambda *args: pytest.fail("loaded"))
    assert sweep(*models, output="r/{model}.json", words=words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vs2: error: ") and error.count("\n") == 1


def test_a_method_that_looks_at_several_views_is_refused(here, capsys):
    assert sweep(f"zero:{TINY}", output="v/{model}.json") == 2
    assert "looks at several views of each image, which is encoded once here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--dataset", "wds/nowhere", "--dataset_root", "nowhere"),
            "no readable file nowhere/test/nshards.txt",
        ),
        (("--split", "tests"), "no readable file few/tests/nshards.txt"),
        (("--dataset_root", "{nope}"), "can be filled in"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_line(here, capsys, words, message):
    assert sweep(f"vs2:{TINY}@other", output="d/{model}.json", words=words) == 2
    assert message in capsys.readouterr().err


def test_a_switched_off_hook_is_named(here, monkeypatch, capsys):
    from clip_benchmark.metrics import zeroshot_classification as module

    monkeypatch.setattr(module, "evaluate", module.evaluate.__wrapped__)
    assert sweep(f"vs2:{TINY}", output="o/{model}.json") == 2
    assert "VS2_PLUGIN_DISABLE" in capsys.readouterr().err


def test_help_says_what_choosing_by_test_accuracy_is(capsys):
    from vs2_plugin.cli.main import main

    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "tuning on test data" in " ".join(capsys.readouterr().out.split())
