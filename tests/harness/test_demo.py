"""The demo, and its accuracy computed again without this package."""

import csv
import io
import json
import tarfile

import pytest
import torch

from .conftest import DIGITS, TINY, metrics, run_script

CHECKPOINT = "store/checkpoints/local-dir-tiny-clip_wds-digits"


def test_demo_prints_the_accuracies_of_its_results(demo):
    plain, steered = (metrics(demo.folder / "results" / f"{name}.json") for name in (TINY, f"vs2:{TINY}"))
    assert f"| zero-shot CLIP | {100 * plain['acc1']:.2f} |" in demo.output
    assert f"| VS2 | {100 * steered['acc1']:.2f} |" in demo.output
    assert f"{100 * (steered['acc1'] - plain['acc1']):+.2f} |" in demo.output
    for command in ("$ vs2-train-sae ", "$ clip_benchmark eval ", "$ clip_benchmark build "):
        assert command in demo.output


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


def test_build_carries_them_into_the_csv(demo):
    rows = {row["model"]: row for row in csv.DictReader((demo.folder / "benchmark.csv").open())}
    assert rows[f"vs2:{TINY}"]["vs2_gamma"] == "1.5"
    assert rows[TINY]["vs2_gamma"] == ""


@pytest.mark.parametrize("steer", [False, True], ids=["plain", "vs2"])
def test_accuracy_equals_plain_torch(demo, steer):
    """VS2 from METHOD's formulas and the files on disk alone; nothing of vs2_plugin is used here."""
    import open_clip
    from PIL import Image
    from safetensors.torch import load_file

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{demo.folder}/tiny-clip")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{demo.folder}/tiny-clip")
    classes = (demo.folder / "digits/classnames.txt").read_text().split()
    images, targets = [], []
    for shard in range(4):
        with tarfile.open(demo.folder / f"digits/test/{shard}.tar") as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    images.append(transform(Image.open(io.BytesIO(data)).convert("RGB")))
                else:
                    targets.append(int(data))

    sae_folder = demo.folder / CHECKPOINT / "visual.transformer.resblocks.3"
    k = json.loads((sae_folder / "cfg.json").read_text())["k"]
    w = load_file(sae_folder / "sae.safetensors")
    alpha = 2.1 * (1.5 - 1)

    def steered(x):
        pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
        threshold = pre.topk(k).values[:, -1:]
        code = torch.where(pre >= threshold, pre, torch.zeros_like(pre)).clamp_min(0)
        moved = x + alpha * (code @ w["W_dec"])
        return moved * x.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)

    right = 0
    with torch.no_grad(), torch.autocast("cpu"):
        # In the harness's own steps, class by class: in bfloat16 logits tie, and the order of rounding decides.
        text = []
        for name in classes:
            one = torch.nn.functional.normalize(
                model.encode_text(tokenizer([f"a photo of the digit {name}"])), dim=-1
            ).mean(0)
            text.append(one / one.norm())
        text = torch.stack(text, dim=1)
        for start in range(0, len(images), 64):
            visual = model.visual
            cls = visual.transformer(visual._embeds(torch.stack(images[start : start + 64])))[:, 0]
            if steer:
                with torch.autocast("cpu", enabled=False):
                    cls = steered(cls.float()).to(cls.dtype)
            features = torch.nn.functional.normalize(visual.ln_post(cls) @ visual.proj, dim=-1)
            predicted = (100.0 * features @ text).float().topk(5).indices[:, 0]
            right += predicted.eq(torch.tensor(targets[start : start + 64])).sum().item()
    name = f"vs2:{TINY}" if steer else TINY
    assert right / len(targets) == metrics(demo.folder / "results" / f"{name}.json")["acc1"]


def test_the_same_seed_gives_the_same_numbers(demo, in_demo):
    for output in ("again-1.json", "again-2.json"):
        done = run_script(
            "clip_benchmark",
            "eval",
            "--model",
            f"vs2:{TINY}",
            "--pretrained",
            "",
            *DIGITS,
            "--output",
            output,
            cwd=in_demo,
            VS2_STORE="store",
        )
        assert done.returncode == 0, done.stderr
    first = (in_demo / "again-1.json").read_text()
    assert first == (in_demo / "again-2.json").read_text()
    assert json.loads(first)["metrics"] == metrics(in_demo / "results" / f"vs2:{TINY}.json")


def test_demo_leaves_strangers_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    done = run_script("vs2", "demo", "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and "thesis.tex" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "thesis.tex").read_text() == "precious"
