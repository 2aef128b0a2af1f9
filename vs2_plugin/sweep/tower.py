"""What is left of a vision tower after a site: it need not be run from the start for every point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vs2_plugin.clip.sites import ClipModel, Output, Site

__all__ = ["resumed"]


@contextmanager
def resumed(model: ClipModel, site: Site, output: Output) -> Iterator[None]:
    """Within the ``with`` block, forward passes start at ``site``, whose module puts out ``output``.

    Blocks before it hand on what they get. Hooks run as ever.
    """
    module = site.module(model)
    before = [] if site.block is None else model.visual.transformer.resblocks[: site.block]
    for block in before:
        block.forward = lambda x, *args, **kwargs: x
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for replaced in (*before, module):
            del replaced.forward
