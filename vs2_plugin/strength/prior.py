"""Shares of the classes, where they are known: a prior for the choice of a strength."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vs2_plugin.errors import ModelStringError

__all__ = ["read_prior"]


def read_prior(path: str, classes: Sequence[str] | None = None, count: int | None = None) -> Tensor:
    """Read shares of the classes ``[classes]``, float64 with sum 1, from a JSON file: {class: share}, or a list.

    Args:
        path: the JSON file.
        classes: names of the classes in order, if they are known.
        count: number of classes, if it is known.

    Raises:
        ModelStringError: the file cannot be read, or does not fit the classes.
    """

    def wrong(problem: str) -> ModelStringError:
        return ModelStringError(
            f'option prior={path!r}: {problem}; expected a JSON file such as {{"cat": 0.9, "dog": 0.1}}, or a list of '
            "shares in the order of the classes"
        )

    try:
        content = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(" ".join(str(error).split())) from None
    by_name = isinstance(content, dict)
    shares = list(content.values()) if by_name else content
    if not isinstance(shares, list) or not all(map(_is_share, shares)) or sum(shares) <= 0:
        raise wrong("shares must be numbers of at least 0, not all of them 0")
    if by_name and classes is not None:
        unknown = sorted(set(content) - set(classes))
        if unknown:
            raise wrong(f"{', '.join(map(repr, unknown[:3]))} is not a class of the data set")
        shares = [content.get(name, 0) for name in classes]
    if count is not None and (len(shares) != count or (by_name and classes is None)):
        raise wrong(f"{len(shares)} shares for {count} classes, whose names are {'' if classes else 'not '}known")
    prior = torch.tensor(shares, dtype=torch.float64)
    return prior / prior.sum()


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2.0**63
