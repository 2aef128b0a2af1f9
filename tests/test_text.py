"""How texts for people are written."""

import pytest

from vs2_plugin.text import counted, gigabytes, one_line, reason_of


@pytest.mark.parametrize(
    "text, length, line",
    [
        ("two\nlines\t and  tabs", 300, "two lines and tabs"),
        ("please check your connection", 20, "please check ..."),
        ("see " + "x" * 40, 20, "see xxxxxxxxxxxx ..."),
    ],
)
def test_one_line_cuts_between_words_and_long_words_anywhere(text, length, line):
    assert one_line(text, length) == line
    assert len(line) <= length


def test_a_reason_names_the_type_of_the_exception():
    assert reason_of(KeyError("a\nb")) == "KeyError: 'a\\nb'"
    assert reason_of(ValueError("a\nb")) == "ValueError: a b"


def test_numbers():
    assert [counted(count, "image") for count in (0, 1, 1797)] == ["0 images", "1 image", "1,797 images"]
    assert [gigabytes(size) for size in (0, 999_900_000, 1e9)] == ["0.0 MB", "999.9 MB", "1.0 GB"]
