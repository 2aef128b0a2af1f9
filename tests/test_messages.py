"""Log messages become lines on stderr."""

import io
import logging
import sys

import pytest

from vs2_plugin import messages


@pytest.fixture
def logger():
    """The package's logger, with the handlers that it had before."""
    found = logging.getLogger("vs2_plugin")
    before, level = list(found.handlers), found.level
    found.handlers = [handler for handler in before if handler is not messages._HANDLER]
    yield found
    found.handlers, found.level = before, level


def test_what_was_closed_is_not_written_to(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    messages.say("said")
    messages.complain("told")


def test_a_message_is_one_line_however_often_they_are_shown(logger, capsys):
    messages.show()
    messages.show()
    logging.getLogger("vs2_plugin.some.module").info("%d SAEs", 3)
    logging.getLogger("vs2_plugin.some.module").warning("slow")
    logging.getLogger("vs2_plugin.some.module").debug("too much")
    assert capsys.readouterr() == ("", "vs2: 3 SAEs\nvs2: warning: slow\n")


def test_a_message_cannot_rewrite_the_terminal_or_begin_another_line(logger, capsys):
    messages.show()
    logging.getLogger("vs2_plugin.some.module").warning("plugin %s", "a\x1b[2K\nvs2: error: b\u202e")
    messages.say("  name\x1b]0;title\x07\n")
    messages.say("\udcff")  # of a file name that is no UTF-8
    out, err = capsys.readouterr()
    assert err == "vs2: warning: plugin a\\x1b[2K vs2: error: b\\u202e\n"
    assert out == "  name\\x1b]0;title\\x07\\n\n\\udcff\n"


def test_what_a_terminal_cannot_write_is_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    messages.say("\u732b cat")
    assert out.buffer.getvalue() == b"? cat\n"


def test_without_being_asked_nothing_is_added_to_the_callers_logging(logger, capsys):
    logging.getLogger("vs2_plugin.some.module").info("3 SAEs")
    assert capsys.readouterr() == ("", "") and messages._HANDLER not in logger.handlers
