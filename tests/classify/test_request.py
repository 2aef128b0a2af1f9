"""What a classification is asked for."""

from pathlib import Path

import pytest

from vs2_plugin.classify.request import ClassifyRequest
from vs2_plugin.errors import SettingError
from vs2_plugin.settings import flags_of


def test_photos_are_no_flag_and_one_alone_will_do():
    request = ClassifyRequest(photos=Path("photos"), model="vs2:B", train_images="more", out=Path("x.JSONL"))
    assert request.photos == ("photos",) and request.train_images == ("more",) and request.out == "x.JSONL"
    assert "photos" not in flags_of(ClassifyRequest) and {"amp", "no_amp", "overwrite"} < set(flags_of(ClassifyRequest))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"out": "x.xlsx"}, r"--out 'x.xlsx': expected a name that ends in .csv, .jsonl or .parquet"),
        ({"out": "predictions"}, "expected a name that ends in"),
        ({"page": "page.pdf"}, r"--page 'page.pdf': expected a name that ends in .html"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_is_told(settings, problem):
    with pytest.raises(SettingError, match=problem):
        ClassifyRequest(photos=("photos",), model="vs2:B", **settings)
