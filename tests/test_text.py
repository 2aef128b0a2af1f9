"""How texts for people are written."""

import pytest

from vs2_plugin.errors import DataError
from vs2_plugin.text import counted, gigabytes, one_line, printable, reason_of, said_by


@pytest.mark.parametrize("message", ["1.tar: a.png: no image", "it gives tensor([0.,\n        1.]): too many\nfor one"])
def test_what_a_worker_of_a_loader_said_is_the_end_of_its_traceback(message):
    from torch._utils import ExceptionWrapper

    try:
        raise DataError(message)
    except DataError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataError, match="Traceback") as error:
        wrapped.reraise()
    assert said_by(error.value) == message == said_by(DataError(message))


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


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J\x07\r\n\t\x7f\x9b", r"\x1b[2J\x07\r\n\t\x7f\x9b"),
        ("a\u202eb\u2066c\u200e\u061c", r"a\u202eb\u2066c\u200e\u061c"),  # marks that turn the reading order
        ("line\u2028paragraph\u2029\ufeff\udcff", r"line\u2028paragraph\u2029\ufeff\udcff"),
        *((plain, plain) for plain in ("", "caf\u00e9", "\u732b \U0001f469\u200d\U0001f52c", "\u3000x\xa0y\u200cz")),
        (r"c:\new", r"c:\new"), (3, "3"),
    ],
)  # fmt: skip
def test_what_could_tell_a_terminal_something_is_escaped_and_the_rest_is_left(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_numbers():
    assert [counted(count, "image") for count in (0, 1, 1797)] == ["0 images", "1 image", "1,797 images"]
    assert [gigabytes(size) for size in (0, 999_900_000, 1e9)] == ["0.0 MB", "999.9 MB", "1.0 GB"]
