"""Checks for the author of a method: ``check("mine")`` in a test, ``vs2 methods --check mine`` in a shell."""

from __future__ import annotations

from vs2_plugin.testing.checks import Finding, findings

__all__ = ["Finding", "check", "findings"]


def check(method: str) -> None:
    """Check an installed method on the tiny CLIP and the handwritten digits of this package.

    Args:
        method: the method's name, also with options as in a model string: ``"mine@strength=2"``.

    Raises:
        AssertionError: some checks failed; the message has a line for each of them.
        ModelStringError, PluginError: there is no such method, or no such option.

    Example::

        >>> from vs2_plugin.testing import check
        >>> check("centre")
    """
    failed = [finding for finding in findings(method) if finding.problem]
    if failed:
        lines = (f"  {finding.check}: {finding.problem}" for finding in failed)
        raise AssertionError("\n".join([f"method {method!r} fails {len(failed)} of its checks:", *lines]))
