"""Log messages become lines on stderr."""

import logging

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


def test_a_message_is_one_line_however_often_they_are_shown(logger, capsys):
    messages.show()
    messages.show()
    logging.getLogger("vs2_plugin.some.module").info("%d SAEs", 3)
    logging.getLogger("vs2_plugin.some.module").warning("slow")
    logging.getLogger("vs2_plugin.some.module").debug("too much")
    assert capsys.readouterr() == ("", "vs2: 3 SAEs\nvs2: warning: slow\n")


def test_without_being_asked_nothing_is_added_to_the_callers_logging(logger, capsys):
    logging.getLogger("vs2_plugin.some.module").info("3 SAEs")
    assert capsys.readouterr() == ("", "") and messages._HANDLER not in logger.handlers
