"""The unmodified clip_benchmark command with steered models: spellings, parity with the stock models, mistakes."""

import json
import os
import shutil
import tarfile
import traceback

import pytest

from vs2_plugin.cli import train_sae
from vs2_plugin.results.runs import digest_of, read_run

from .conftest import DIGITS, TINY, few_digits, metrics, rewrite, run_script

PROMPTS = "zeroshot_classification_templates.txt"


@pytest.mark.parametrize(
    "words",
    [
        ("--model", f"vs2:{TINY}", "--pretrained", ""),
        ("--model_type", "vs2", "--model", TINY, "--pretrained", ""),
        ("--pretrained_model", f"vs2:{TINY},"),
        ("--pretrained_model", "models.txt"),
        ("--model", f"vs2:{TINY}@local-dir-tiny-clip_wds-digits@gamma=1.5@lam=2.1", "--pretrained", ""),
        ("--model", f"vs2:{TINY}@alpha=1.05", "--pretrained", ""),
    ],
)
def test_every_spelling_gives_the_same_accuracy(words, in_demo, clip_benchmark):
    (in_demo / "models.txt").write_text(f"vs2:{TINY},\n")
    code, error = clip_benchmark("eval", *words, *DIGITS, "--output", "spelling.json")
    assert code == 0, error
    found = json.loads((in_demo / "spelling.json").read_text())
    assert found["model"].startswith(f"vs2:{TINY}")  # the name says the method, whatever the spelling
    assert found["metrics"]["acc1"] == metrics(in_demo / f"results/vs2:{TINY}.json")["acc1"]


def test_results_of_steered_models_tell_their_digest(in_demo, clip_benchmark, monkeypatch):
    few_digits(in_demo, "few", 0, count=20)
    data = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few", *DIGITS[4:])
    data += ("--output", "d-{model}.json")
    model = f"vs2:{TINY}@local-dir-tiny-clip_wds-digits"
    files = [in_demo / f"d-{name}.json" for name in (TINY, model)]
    assert clip_benchmark("eval", "--model", TINY, model, *data)[0] == 0
    plain, steered = (json.loads(file.read_text()) for file in files)
    assert "vs2_results_digest" not in plain["metrics"]
    assert steered["metrics"]["vs2_results_digest"] == digest_of(steered) and not read_run(files[1]).changed
    # What is there already is not evaluated again, and not signed again.
    steered["metrics"]["acc1"] = 1.0
    files[1].write_text(json.dumps(steered))
    assert clip_benchmark("eval", "--model", TINY, model, *data, "--skip_existing")[0] == 0
    assert read_run(files[1]).changed
    monkeypatch.setenv("VS2_PER_IMAGE", "1")
    assert clip_benchmark("eval", "--model", TINY, model, *data)[0] == 0
    for file in files:
        found = json.loads(file.read_text())
        assert found["metrics"]["vs2_results_digest"] == digest_of(found)


def test_no_steering_is_the_stock_model_bit_for_bit(in_demo, clip_benchmark):
    clip_benchmark(
        "eval",
        "--model",
        f"vs2:{TINY}@alpha=0",
        f"vs2:{TINY}@gamma=1",
        "--pretrained",
        "",
        *DIGITS,
        "--output",
        "noop-{model}.json",
    )
    stock = metrics(in_demo / f"results/{TINY}.json")
    for name in ("alpha=0", "gamma=1"):
        found = metrics(in_demo / f"noop-vs2:{TINY}@{name}.json")
        assert {key: found[key] for key in stock} == stock


def test_results_of_another_split_name_it_and_say_that_the_sae_was_trained_on_it(in_demo, clip_benchmark):
    for split in ("train", "test"):
        words = ("--model", TINY, f"vs2:{TINY}", "--pretrained", "", *DIGITS, "--split", split)
        code, error = clip_benchmark("eval", *words, "--output", f"{split} {{model}}.json")
        assert code == 0, error
    plain, steered = (metrics(in_demo / f"train {model}.json") for model in (TINY, f"vs2:{TINY}"))
    assert plain["vs2_split"] == steered["vs2_split"] == "train"
    assert (steered["vs2_transductive"], steered["vs2_protocol"]) == (True, "transductive")
    plain, steered = (metrics(in_demo / f"test {model}.json") for model in (TINY, f"vs2:{TINY}"))
    assert not any(name.startswith("vs2_") for name in plain) and "vs2_split" not in steered
    assert (steered["vs2_transductive"], steered["vs2_protocol"]) == (False, "unlabeled")


def test_several_data_sets_in_one_call_each_with_its_own_checkpoint(in_demo, clip_benchmark):
    data = ("--dataset", "wds/first", "wds/second", "--dataset_root", "{dataset}", *DIGITS[4:])
    words = ("--model", TINY, f"vs2:{TINY}", "--pretrained", "", *data, "--output", "s-{dataset}-{model}.json")
    for shard, name in enumerate(("first", "second")):
        few_digits(in_demo, name, shard, count=60)
    # One checkpoint is missing: nothing is evaluated, not even what could be.
    few = ("--dataset_root", "{dataset}", "--samples", "2000", *DIGITS[4:], "--overwrite")
    assert train_sae.main(["--model", TINY, "--dataset", "wds/first", *few]) == 0
    code, error = clip_benchmark("eval", *words)
    assert code == 2 and f"vs2-train-sae --model {TINY} --dataset wds/second --dataset_root '{{dataset}}'" in error
    assert not list(in_demo.glob("s-*.json"))
    assert train_sae.main(["--model", TINY, "--dataset", "wds/second", *few]) == 0
    code, error = clip_benchmark("eval", *words)
    assert code == 0, error
    for name in ("first", "second"):
        assert metrics(in_demo / f"s-{name}-vs2:{TINY}.json")["vs2_checkpoint"] == f"local-dir-tiny-clip_wds-{name}"
        assert "vs2_checkpoint" not in metrics(in_demo / f"s-{name}-{TINY}.json")


def test_stock_models_do_not_notice_the_plugin(in_demo, clip_benchmark, monkeypatch):
    """Random weights, several models in one call, in this process and in one without the hook."""
    few_digits(in_demo, "few", 0, count=20)  # a ViT-S-32 takes its time
    data = ("--dataset", "wds/few", "--dataset_root", "few", *DIGITS[4:])
    words = ("eval", "--pretrained", "", *data)
    alone = ("--model", "ViT-S-32-alt", "--output", "off.json")
    stock = run_script("clip_benchmark", *words, *alone, cwd=in_demo, VS2_PLUGIN_DISABLE="1")
    assert stock.returncode == 0, stock.stderr
    monkeypatch.setenv("VS2_STORE", "random-store")
    train = ("--model", "ViT-S-32-alt", "--pretrained", "", *data, "--samples", "500")
    assert train_sae.main(train) == 0
    models = ("ViT-S-32-alt", "vs2:ViT-S-32-alt", "vs2:ViT-S-32-alt@alpha=0")
    code, error = clip_benchmark(*words, "--model", *models, "--output", "on-{model}.json")
    assert code == 0, error
    off, on = (in_demo / "off.json").read_text(), (in_demo / "on-ViT-S-32-alt.json").read_text()
    assert off == on
    unsteered = metrics(in_demo / "on-vs2:ViT-S-32-alt@alpha=0.json")
    assert {key: unsteered[key] for key in json.loads(off)["metrics"]} == json.loads(off)["metrics"]
    assert metrics(in_demo / "on-vs2:ViT-S-32-alt.json")["vs2_checkpoint"] == "ViT-S-32-alt_random_wds-few"


MISTAKES = [
    (("--model", "vs3:ViT-B-32"), ["unknown method 'vs3'", "vs2"]),
    (("--model", "vs2:"), ["no backbone"]),
    (("--model", "ViT-B-32@gamma=2"), ["no steering method", "vs2:ViT-B-32@gamma=2"]),
    (("--model", "ViT-B-32", "vs2:ViT-B-32@gama=2"), ["unknown option 'gama'", "gamma, lam, alpha"]),
    (("--model", f"vs2:{TINY}@lam=-1"), ["lam='-1'", "0 to 1000"]),
    (("--model", f"vs2:{TINY}@gamma=two"), ["gamma='two'", "a number"]),
    (("--model", f"vs2:{TINY}@alpha=1@lam=2"), ["'alpha' and 'lam' exclude each other"]),
    (("--model", "vs2:ViT-B-33"), ["no model 'ViT-B-33'", "ViT-B-32"]),
    (("--model", "vs2:ViT-B-32", "--pretrained", "opnai"), ["no weights 'opnai'", "openai"]),
    (("--model", "vs2:local-dir:nowhere"), ["nowhere/open_clip_config.json"]),
    (("--model", "ViT-B-33", f"vs2:{TINY}"), ["no model 'ViT-B-33'", "ViT-B-32"]),
    (("--model", "ViT-B-32", f"vs2:{TINY}", "--pretrained", "opnai"), ["ViT-B-32 has no weights 'opnai'", "openai"]),
    (("--model", "local-dir:nowhere", f"vs2:{TINY}"), ["nowhere/open_clip_config.json"]),
    (("--pretrained_model", f"vs2:{TINY},", "ViT-B-33,openai"), ["no model 'ViT-B-33'", "ViT-B-32"]),
    (
        ("--model", "vs2:ViT-B-32"),
        [
            "no SAE checkpoint for ViT-B-32 (random weights) on wds/digits",
            "vs2-train-sae --model ViT-B-32 --pretrained '' --dataset wds/digits --dataset_root digits",
        ],
    ),
    (("--model", f"vs2:{TINY}@other"), ["no SAE checkpoint 'other'", "local-dir-tiny-clip_wds-digits"]),
    (("--model", f"vs2:{TINY}", "--output", "no/such/folder.json"), ["no folder 'no/such'", "mkdir -p no/such"]),
    (("--pretrained_model", "vs2:ViT-B-32"), ["expected MODEL,WEIGHTS", "vs2:ViT-B-32,openai"]),
    (("--model_type", "vs2", "--model", "ViT-B-32@x=1"), ["unknown option 'x'"]),
    (
        ("--model", TINY, f"vs2:{TINY}", "--output", "x.json"),
        [
            f"the results of {TINY} and of vs2:{TINY} into one file, 'x.json'",
            "{model}, {pretrained_full_path}, {dataset}",
        ],
    ),
    (
        ("--pretrained_model", "vs2:RN50,digits/train/0.tar", "vs2:RN50,digits/test/0.tar"),  # two files of one name
        ["the results of vs2:RN50 and of vs2:RN50 into one file, 'digits_0.tar_vs2:RN50", "{pretrained_full_path}"],
    ),
    (("--model", f"{TINY}@alpha=1"), ["no steering method", f"for example vs2:{TINY}@alpha=1"]),
    (("--model", "hf-hub:org/name@sae"), ["no steering method", "for example vs2:hf-hub:org/name@sae"]),
    (("--model", f"vs2:{TINY}@alpha"), ["no SAE checkpoint 'alpha'", "(as an option: @alpha=VALUE)"]),
]


@pytest.mark.parametrize(("words", "fragments"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_end_at_once_with_one_line(words, fragments, in_demo, clip_benchmark, monkeypatch):
    import open_clip

    def loaded_too_early(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", loaded_too_early)
    pretrained = () if "--pretrained" in words or "--pretrained_model" in words else ("--pretrained", "")
    code, error = clip_benchmark("eval", *words, *pretrained, *DIGITS)
    assert code == 2
    assert error.startswith("vs2: error: ") and error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error


def test_mistakes_look_the_same_from_the_shell(in_demo):
    done = run_script(
        "clip_benchmark", "eval", "--model", "vs2:ViT-B-32@lam=x", "--pretrained", "", *DIGITS, cwd=in_demo
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "vs2: error: model 'vs2:ViT-B-32@lam=x': option lam='x': expected a number from 0 to 1000\n"


def test_a_checkpoint_of_another_tower_is_refused(in_demo, clip_benchmark, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from vs2_plugin.checkpoint.store import Store

    name = "local-dir-tiny-clip_wds-digits"
    for change, words in (("weights", "other parameters"), ("activation", "QuickGELU"), ("size", "interpolation")):
        folder = in_demo / "other-clip"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(in_demo / "tiny-clip", folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        if change == "weights":
            weights = load_file(folder / "open_clip_model.safetensors")
            weights["visual.proj"] = weights["visual.proj"] + torch.tensor(0.01, dtype=torch.half)
            save_file(weights, folder / "open_clip_model.safetensors")
        elif change == "activation":
            config["model_cfg"]["quick_gelu"] = True
        else:
            config["preprocess_cfg"]["interpolation"] = "bilinear"
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        code, error = clip_benchmark(
            "eval", "--model", f"vs2:local-dir:other-clip@{name}", "--pretrained", "", *DIGITS, "--output", "x.json"
        )
        assert code == 2 and error.splitlines()[-1].startswith("vs2: error: ") and words in error.splitlines()[-1]
    assert name in Store.default().names()


def test_a_data_set_that_cannot_be_built_ends_with_one_line(in_demo, clip_benchmark):
    model = f"vs2:{TINY}@local-dir-tiny-clip_wds-digits"
    words = ("--dataset", "mnistt", "--quiet", "--no_amp")
    code, error = clip_benchmark("eval", "--model", model, "--pretrained", "", *words)
    assert code == 2 and "knows no data set 'mnistt'; did you mean 'mnist'" in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("vs2: error: clip_benchmark ")
    # A name like one that is there, first.
    digit = ("--dataset", "wds/digit", "--dataset_root", "digits")
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", "--pretrained", "", *digit)
    assert code == 2 and "on wds/digit in the store store (there is 'local-dir-tiny-clip_wds-digits'); tr" in error
    # Without a checkpoint, a command that trains one for it would be no help.
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", "--pretrained", "", "--dataset", "mnistt")
    assert code == 2 and "did you mean 'mnist'" in error and "vs2-train-sae" not in error


# ---- the data under evaluation


def few(*words: str, models=(TINY, f"vs2:{TINY}@local-dir-tiny-clip_wds-digits"), output="few-{model}.json"):
    """The words of an evaluation of few digits, by the stock model and a steered one."""
    data = ("--dataset", "wds/few", "--dataset_root", "few", "--quiet", "--no_amp", "--output", output)
    return "eval", "--model", *models, "--pretrained", "", *data, *words


BAD_DATA = {
    "no prompts": (lambda few: (few / PROMPTS).unlink(), [PROMPTS, "echo 'a photo of a {c}.' > few/" + PROMPTS]),
    "no names": (lambda few: (few / "classnames.txt").unlink(), ["few/classnames.txt", "one per line"]),
    "no list": (lambda few: (few / "test/nshards.txt").unlink(), ["echo 1 > few/test/nshards.txt"]),
    "no split": (lambda few: shutil.rmtree(few / "test"), ["few/test/nshards.txt", "the splits in few: train"]),
    "no folder": (lambda few: shutil.rmtree(few), ["few/test/nshards.txt (No such file or directory)"]),
    "a label": (lambda few: rewrite(few / "test/0.tar", lambda n, d: b"99" if n.endswith("cls") else d),
                ["few/test/0.tar: ", ".cls: the label is 99; expected a class number from 0 to 9"]),
    "no label": (lambda few: rewrite(few / "test/0.tar", lambda n, d: None if n.endswith("cls") else d),
                 ["few/test/0.tar: the image ", "has no label"]),
    "a cut shard": (lambda few: os.truncate(few / "test/0.tar", 700), ["cannot read shard few/test/0.tar"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_end_before_anything_is_loaded(case, in_demo, clip_benchmark, monkeypatch):
    import open_clip

    few_digits(in_demo, "few", 0, count=5)
    damage, fragments = BAD_DATA[case]
    damage(in_demo / "few")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: pytest.fail("loaded too early"))
    code, error = clip_benchmark(*few())
    assert code == 2 and error.startswith("vs2: error: ") and error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("models", [1, 2], ids=["steered", "plain first"])
def test_an_image_that_cannot_be_read_ends_with_its_name(models, workers, in_demo, clip_benchmark):
    few_digits(in_demo, "few", 0, count=5)
    names = sorted(name for name in tarfile.open(in_demo / "few/test/0.tar").getnames() if name.endswith("png"))
    rewrite(in_demo / "few/test/0.tar", lambda name, data: data[:60] if name == names[3] else data)
    some = (TINY, f"vs2:{TINY}@local-dir-tiny-clip_wds-digits")[2 - models :]
    code, error = clip_benchmark(*few("--num_workers", workers, models=some, output="broken-{model}.json"))
    assert code == 2
    assert error.splitlines()[-1] == f"vs2: error: few/test/0.tar: {names[3]} is not a readable image"
    assert "Traceback" not in error and not list(in_demo.glob("broken-*.json"))


def test_classes_that_cannot_be_told_apart_are_named_once_for_each_data_set(in_demo, clip_benchmark):
    model = f"vs2:{TINY}@local-dir-tiny-clip_wds-digits"
    some = (TINY, model, f"{model}@alpha=0.5")
    for name in ("few", "more"):
        few_digits(in_demo, name, 0, count=5)
    names = (in_demo / "few/classnames.txt").read_text().splitlines()
    (in_demo / "few/classnames.txt").write_text("\n".join([*names[:-1], names[0].upper()]) + "\n")
    words = ("--dataset", "wds/few", "wds/more", "--dataset_root", "{dataset}", "--num_workers", "0")
    code, error = clip_benchmark(*few(*words, models=some, output="equal-{model}-{dataset}.json"))
    assert code == 0, error
    told = f"vs2: warning: the classes {names[0]!r}, {names[0].upper()!r} have the same embedding"
    assert error.count(told) == error.count("the same embedding") == 1
    # Alone, the plain model passes unchanged.
    code, error = clip_benchmark(*few(*words, models=[TINY], output="{model}-{dataset}.json"))
    assert code == 0 and "the same embedding" not in error


def test_fewer_shards_than_workers_are_read_by_fewer(in_demo, clip_benchmark):
    few_digits(in_demo, "few", 0, count=20)
    code, error = clip_benchmark(*few("--num_workers", "1", output="one-{model}.json"))
    assert code == 0 and "loader worker" not in error
    code, error = clip_benchmark(*few(output="four-{model}.json"))
    assert code == 0, error
    assert error.count("vs2: wds/few is read by 1 loader worker, and not 4") == 1
    files = sorted(file.name for file in in_demo.glob("one-*.json"))
    assert len(files) == 2
    for file in files:
        assert metrics(in_demo / file) == metrics(in_demo / file.replace("one", "four"))


def test_a_linear_probe_is_not_trained_on_the_one_list_of_shards_that_it_is_evaluated_on(in_demo, clip_benchmark):
    words = ("--model", TINY, "--pretrained", "", "--dataset", "digits/test/{0..3}.tar", "--task", "linear_probe")
    code, error = clip_benchmark("eval", *words)
    assert code == 2 and "digits/test/{0..3}.tar is one list of shards, so a linear probe would be trained on" in error


def test_plain_models_alone_are_not_looked_after(in_demo, clip_benchmark):
    few_digits(in_demo, "few", 0, count=5)
    with pytest.raises(Exception, match="No samples found") as caught:
        clip_benchmark(*few(models=[TINY]))
    traceback.clear_frames(caught.tb)  # which hold the loader: torch would wait for its processes
    with pytest.raises(RuntimeError, match="Model config for 'ViT-B-33' not found"):
        clip_benchmark(*few(models=["ViT-B-33"]))


def test_a_plain_model_whose_result_is_there_is_not_looked_after(in_demo, clip_benchmark):
    few_digits(in_demo, "few", 0, count=5)
    (in_demo / "few-ViT-B-33.json").write_text("{}")
    code, error = clip_benchmark(*few("--skip_existing", models=["ViT-B-33", f"tda:{TINY}"]))
    assert code == 0, error


@pytest.mark.parametrize("output", ["store", "store/", "new/"])
def test_an_output_that_is_a_folder_is_refused(output, in_demo, clip_benchmark):
    code, error = clip_benchmark(*few(output=output))
    assert code == 2 and error.count("\n") == 1
    assert f"--output {output!r} is a folder; expected a file: --output '{output.rstrip('/')}/{{dataset}}" in error


def test_an_output_that_the_system_refuses_is_refused_at_once(in_demo, clip_benchmark):
    code, error = clip_benchmark(*few(output="x" * 300 + ".json"))
    assert code == 2 and error.count("\n") == 1
    assert "could not be written to 'xxx" in error and "File name too long; give another --output" in error


@pytest.mark.parametrize("models", [(TINY, f"tda:{TINY}"), (f"tda:{TINY}", TINY)], ids=["plain", "steered"])
def test_a_result_that_does_not_fit_on_the_disk_leaves_no_file_to_be_skipped(models, in_demo, clip_benchmark):
    resource = pytest.importorskip("resource")
    few_digits(in_demo, "few", 0, count=5)
    output = f"full-{models[0]}.json"
    (in_demo / output).unlink(missing_ok=True)
    words = few("--num_workers", "0", models=models, output="full-{model}.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        code, error = clip_benchmark(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and error.splitlines()[-1] == f"vs2: error: File too large: {output!r}"
    assert not (in_demo / output).exists()
    code, error = clip_benchmark(*words, "--skip_existing")
    assert code == 0 and metrics(in_demo / output)


def test_damaged_checkpoints_are_refused(in_demo, clip_benchmark):
    original = in_demo / "store/checkpoints/local-dir-tiny-clip_wds-digits"
    broken = in_demo / "store/checkpoints/broken"
    shutil.copytree(original, broken)
    try:
        file = next(broken.glob("*/sae.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        code, error = clip_benchmark(
            "eval", "--model", f"vs2:{TINY}@broken", "--pretrained", "", *DIGITS, "--output", "x.json"
        )
        assert code == 2 and "is not the file that was written" in error
    finally:
        shutil.rmtree(broken)


def test_retrieval_is_steered_too(in_demo, clip_benchmark, captions):
    """The retrieval task needs features of one dtype from both towers, and a data set without classes."""
    words = (*captions, "--task", "zeroshot_retrieval")
    name = "local-dir-tiny-clip_wds-digits"
    code, error = clip_benchmark(
        "eval",
        "--model",
        TINY,
        f"vs2:{TINY}@{name}",
        f"vs2:{TINY}@{name}@alpha=0",
        *words,
        "--output",
        "r-{model}.json",
    )
    assert code == 0, error
    plain, steered, unsteered = (
        metrics(in_demo / f"r-{m}.json") for m in (TINY, f"vs2:{TINY}@{name}", f"vs2:{TINY}@{name}@alpha=0")
    )
    assert {key: unsteered[key] for key in plain} == plain
    assert {key: steered[key] for key in plain} != plain
    assert steered["vs2_alpha"] == pytest.approx(1.05)


def test_that_autocast_is_emulated_is_said_once_with_what_helps(in_demo, clip_benchmark, monkeypatch):
    from vs2_plugin.harness import preflight

    few_digits(in_demo, "few", 0, count=20)
    data = ("--pretrained", "", "--dataset", "wds/few", "--dataset_root", "few", *DIGITS[4:])
    models = [f"vs2:{TINY}@local-dir-tiny-clip_wds-digits@alpha={alpha}" for alpha in (0, 1)]
    cases = [(True, models, data[:-1], 1), (True, models[:1], data, 0), (False, models[:1], data[:-1], 0)]
    for emulates, some, words, told in cases:
        monkeypatch.setattr(preflight, "emulates_bfloat16", lambda emulates=emulates: emulates)
        code, error = clip_benchmark("eval", "--model", *some, *words, "--output", "amp-{model}.json")
        assert code == 0 and error.count("autocast is emulated and slow; --no_amp") == told


class SmokeArguments:
    """What the harness's own test passes to ``cli.run``: a bare class, its ``dummy`` data set, random weights."""

    dataset, split, task = "dummy", "test", "zeroshot_classification"
    pretrained, model_type, seed, language = "", "open_clip", 0, "en"
    amp, verbose, skip_load, skip_existing, distributed = False, True, False, False, False
    num_workers, batch_size, dataset_root, root, output, annotation_file = 0, 64, "root", "root", "smoke.json", ""
    model_cache_dir = save_clf = wds_cache_dir = custom_template_file = custom_classname_file = None
    load_clfs = []
    dump_classnames = dump_templates = False
    which = "eval"


@pytest.mark.parametrize("model", ["ViT-S-32-alt", "vs2:ViT-S-32-alt@smoke"])
def test_smoke_path_of_the_harness(model, in_demo, monkeypatch):
    from clip_benchmark.cli import run

    monkeypatch.setenv("VS2_STORE", "smoke-store")
    if model.startswith("vs2"):
        few = ("--samples", "1000", "--max_images", "64", "--name", "smoke", "--quiet", "--no_amp")
        assert (
            train_sae.main(["--model", "ViT-S-32-alt", "--pretrained", "", *DIGITS[:4], "--num_workers", "1", *few])
            == 0
        )
    assert run(type("Arguments", (SmokeArguments,), {"model": model})) == 0
    found = metrics(in_demo / "smoke.json")
    assert set(found) >= {"acc1", "acc5", "mean_per_class_recall"}
    assert ("vs2_method" in found) == model.startswith("vs2")


def test_python_callers_get_the_exception(in_demo):
    import clip_benchmark.models

    from vs2_plugin.errors import CheckpointNotFound, ModelStringError

    with pytest.raises(ModelStringError, match="unknown option 'x'"):
        clip_benchmark.models.load_clip("open_clip", f"vs2:{TINY}@x=1", "", None, "cpu")
    with pytest.raises(CheckpointNotFound, match="no SAE checkpoint 'nope'"):
        clip_benchmark.models.load_clip("vs2", f"{TINY}@nope", "", None, "cpu")


def test_results_of_a_steered_model_whose_name_holds_slashes_have_a_name_without(in_demo, clip_benchmark):
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}@./store/checkpoints/x", *DIGITS)
    assert code == 2 and "holds '/'" not in error
    shutil.copytree("tiny-clip", "deep/tiny-clip")
    models = ("vs2:local-dir:deep/tiny-clip@local-dir-tiny-clip_wds-digits", "local-dir:deep/tiny-clip")
    for model in models:  # the plain one alone, too
        words = ("--model", model, *DIGITS, "--output", "{dataset}_{model}.json")
        for again in ((), ("--skip_existing",)):
            code, error = clip_benchmark("eval", *words, *again)
            assert code == 0, error
        written = f"digits_{model.replace('/', '-')}.json"
        assert json.loads(open(written).read())["model"] == model


def test_an_interruption_of_steered_models_is_one_line(in_demo, clip_benchmark, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("vs2_plugin.model.steered.SteeredCLIP.encode_image", interrupted)
    code, error = clip_benchmark("eval", "--model", f"vs2:{TINY}", *DIGITS, "--output", "interrupted.json")
    assert code == 130 and "Traceback" not in error
    assert error.endswith("vs2: interrupted; finished results are kept, and --skip_existing skips them\n")


@pytest.mark.parametrize(
    ("flag", "value", "least"), [("batch_size", 0, 1), ("batch_size", -3, 1), ("num_workers", -1, 0)]
)
def test_numbers_below_the_least_are_told(flag, value, least, in_demo, clip_benchmark):
    words = ("--model", f"vs2:{TINY}", *DIGITS, "--output", "x.json", f"--{flag}", str(value))
    code, error = clip_benchmark("eval", *words)
    assert code == 2 and f"vs2: error: --{flag} is {value}; expected a whole number, at least {least}" in error
