"""The digits as webdataset shards are scikit-learn's, each once."""

import io
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from vs2_plugin.demo.digits import CLASSES, TEMPLATES, TRAIN, write_digits


def test_the_shards_hold_every_digit_once_with_its_label(tmp_path):
    write_digits(tmp_path / "digits")
    digits, seen = load_digits(), {}
    for split, count in (("train", TRAIN), ("test", len(digits.images) - TRAIN)):
        folder = tmp_path / "digits" / split
        shards = sorted(folder.glob("*.tar"))
        assert (folder / "nshards.txt").read_text() == f"{len(shards)}\n"
        found = {}
        for shard in shards:
            with tarfile.open(shard) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for name in (name for name in members if name.endswith(".png")):
                label = int(members[name.replace(".png", ".cls")])
                found[int(name[:-4])] = (np.asarray(Image.open(io.BytesIO(members[name]))), label)
        assert len(found) == count and (min(found) < TRAIN) == (split == "train")
        seen |= found
    assert sorted(seen) == list(range(len(digits.images)))
    for row, (pixels, label) in seen.items():
        assert np.array_equal(pixels, (digits.images[row] * 255 / 16).round()) and label == digits.target[row]


def test_the_classes_and_the_prompt_are_what_clip_benchmark_reads(tmp_path):
    write_digits(tmp_path)
    assert (tmp_path / "classnames.txt").read_text().split() == CLASSES and len(CLASSES) == 10
    assert (tmp_path / "zeroshot_classification_templates.txt").read_text().splitlines() == TEMPLATES
