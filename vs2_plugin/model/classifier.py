"""The zero-shot classifier: names of classes and prompts, checked, and the class embeddings made of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vs2_plugin.data.labels import PROMPT, has_place
from vs2_plugin.documented import documented
from vs2_plugin.errors import SettingError
from vs2_plugin.host import zero_shot_classification

__all__ = ["Classifier", "class_names", "prompts_of", "warn_of_equals"]

_LOG = logging.getLogger(__name__)
#: Names that a warning shows.
_NAMED = 3
#: Accepted distance of a class embedding's norm from 1: bfloat16 has three digits.
_UNIT = 0.05


def class_names(names: Sequence[str], what: str = "classes") -> tuple[str, ...]:
    """Return the names of classes, checked and without surrounding spaces.

    Args:
        names: the names.
        what: the option or argument that the names come from, for the error message.

    Raises:
        SettingError: not a list of at least two names, an empty name, or a name that is given twice.
    """
    listed = _listed(names)
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise SettingError(f"{what} is {names!r:.80}; expected a list of names, such as ['cat', 'dog']")
    stripped = tuple(name.strip() for name in listed)
    if "" in stripped:
        raise SettingError(f"{what}: name number {stripped.index('') + 1} is empty; expected one name per class")
    if len(set(stripped)) < len(stripped):
        twice = next(name for name, count in Counter(stripped).items() if count > 1)
        raise SettingError(f"{what}: {twice!r} is given twice; expected each class once")
    if len(stripped) < 2:
        problem = f"{stripped[0]!r} alone" if stripped else "none"
        raise SettingError(f"{what}: {problem}; expected at least two, since probabilities compare classes")
    return stripped


def _listed(values: object) -> list[Any] | None:
    """Return values that have an order as a list, which a generator yields once; None for anything else."""
    unordered = isinstance(values, (str, bytes, set, frozenset, Mapping))
    return list(values) if isinstance(values, Iterable) and not unordered else None


def prompts_of(prompts: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return prompts with ``{c}`` for the class name, as clip_benchmark fills them in.

    Args:
        prompts: one or several prompts, each with ``{}`` or ``{c}``; None stands for CLIP's usual prompt.

    Raises:
        SettingError: no list, an empty one, or a prompt without a place for the class name.

    >>> prompts_of(["a sketch of a {}"])
    ('a sketch of a {c}',)
    """
    templates = [PROMPT] if prompts is None else [prompts] if isinstance(prompts, str) else _listed(prompts)
    if templates is None:
        raise SettingError(f"prompts is {prompts!r:.80}; expected a list of prompts, such as ['a photo of a {{c}}']")
    if not templates:
        raise SettingError("prompts: none; expected at least one, such as 'a photo of a {c}'")
    return tuple(map(_prompt, templates))


def _prompt(text: object) -> str:
    prompt = str(text).strip().replace("{}", "{c}")
    if not has_place(prompt):
        raise SettingError(
            f"prompt {text!r:.80}: expected one {{c}} where the class name goes, such as 'a photo of a {{c}}'"
        )
    return prompt


@documented
@dataclass(frozen=True, eq=False)
class Classifier:
    """A zero-shot classifier."""

    names: tuple[str, ...]
    """Names of the classes."""
    weights: Tensor
    """Class embeddings ``[embed_dim, classes]``, on the model's device."""
    prompts: tuple[str, ...] = ()
    """The prompts, with ``{c}`` for the class name; empty where they are not known."""
    amp: bool = True
    """Whether images are classified under autocast, as the classes were embedded."""

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, names: Sequence[str], prompts: Sequence[str] | str | None, amp: bool
    ) -> Classifier:
        """Build a classifier from class names and prompts, by clip_benchmark's own function.

        Raises:
            SettingError: class names or prompts that cannot be used.
        """
        classes, templates = class_names(names), prompts_of(prompts)
        device = str(next(model.parameters()).device)  # with its number: 'cuda' is the current GPU
        with zero_shot_classification() as harness:
            weights = harness.zero_shot_classifier(model, tokenizer, list(classes), list(templates), device, amp)
        warn_of_equals(classes, weights)
        return cls(classes, weights, templates, amp)

    @classmethod
    def unnamed(cls, weights: Tensor, amp: bool = True) -> Classifier:
        """Build a classifier from class embeddings; its classes are named by their numbers."""
        if ((weights.float().norm(dim=0) - 1).abs() > _UNIT).any():
            _LOG.warning(
                "class embeddings are not of unit norm (--load_clfs with several files averages them): methods that "
                "use the classes take them at unit norm, plain CLIP as they are, so accuracies differ"
            )
        return cls(tuple(map(str, range(weights.shape[-1]))), weights, (), amp)


def warn_of_equals(names: Sequence[str], weights: Tensor) -> None:
    """Warn of classes whose embeddings are equal, such as names that differ only in capital letters, or words that the
    tokenizer does not know."""
    equals: dict[bytes, list[str]] = {}
    for name, column in zip(names, weights.T.float().cpu().numpy(), strict=True):
        equals.setdefault(column.tobytes(), []).append(name)
    for same in (same for same in equals.values() if len(same) > 1):
        more = f" and {len(same) - _NAMED:,} more" if len(same) > _NAMED else ""
        _LOG.warning(
            "the classes %s%s have the same embedding, so the model cannot tell them apart; give them "
            "names that it knows", ", ".join(map(repr, same[:_NAMED])), more,
        )  # fmt: skip
