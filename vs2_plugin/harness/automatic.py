"""The word ``auto`` in a model string: options chosen from a checkpoint's gallery once the classes are known.

Needed are the gallery's activations at the tower's last site, the plain embeddings and the class embeddings; no labels,
and no image of the data set under evaluation. A choice is kept in the checkpoint's folder:

<name>/auto/<key>.json     the evidence; the key is a digest of checkpoint, method, options and class embeddings
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vs2_plugin.arrays import digest_of, spread
from vs2_plugin.clip.sites import Site, embedding_from, in_float32
from vs2_plugin.errors import HarnessError, ModelStringError
from vs2_plugin.files import atomic_file
from vs2_plugin.method import Option, Scalar
from vs2_plugin.gallery.gallery import CLIP, Gallery
from vs2_plugin.gallery.retriever import Retriever
from vs2_plugin.steering.neighbours import Activations
from vs2_plugin.strength import Choice, choose, neighbour_graph

__all__ = ["Automatic", "gallery_classes", "kept", "read_prior", "settle"]

#: Images that are looked at, evenly spread over a larger gallery, and how many at a time.
_IMAGES, _BATCH = 10_000, 2048


class Automatic(nn.Module):
    """A steering that is built with values of its automatic options: with each candidate, and then to stay."""

    def __init__(
        self,
        build: Callable[[Mapping[str, Scalar | None]], Callable[[Tensor], Tensor]],
        given: Mapping[str, Scalar | None],
        options: Sequence[Option],
        device: torch.device,
    ) -> None:
        """``build`` makes the steering of all options, of which ``options`` are automatic and the others ``given``."""
        super().__init__()
        self._build, self._given, self._device = build, given, device
        #: Every combination of values; the first leaves activations as they are.
        self.candidates = [
            dict(zip([option.name for option in options], values, strict=True))
            for values in product(*(option.auto for option in options))
        ]
        self.choice: Choice | None = None
        self.steering: Callable[[Tensor], Tensor] | None = None

    def use(self, values: Mapping[str, Scalar]) -> None:
        """Steer with these values."""
        steering = self._build({**self._given, **values})
        self._modules.pop("steering", None)  # torch would refuse a function where a module was
        self.steering = steering.to(self._device).eval() if isinstance(steering, nn.Module) else steering

    def settle(self, choice: Choice, classifier: Tensor | None = None) -> None:
        """Steer with the values that were chosen (for these classes) from now on."""
        self.use(choice.values)
        self.choice, self._classes = choice, None if classifier is None else digest_of({"": classifier})

    def is_settled(self, classifier: Tensor) -> bool:
        """Whether the choice is made for these classes."""
        return self.choice is not None and self._classes == digest_of({"": classifier})

    @property
    def facts(self) -> dict[str, Scalar]:
        """Those of the steering, and of the choice."""
        return {**getattr(self.steering, "facts", {}), **({} if self.choice is None else self.choice.facts)}

    def reset(self) -> None:
        """Forget the images seen so far."""
        if hasattr(self.steering, "reset"):
            self.steering.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Steer ``[batch, d]``. Raises HarnessError while the classes are not known."""
        if self.steering is None:
            raise HarnessError(
                "auto needs the classes of the data set, and none are known; in Python, call "
                "model.set_classifier(classifier) with the zero-shot classifier [embed_dim, classes] first"
            )
        return self.steering(x)


@torch.no_grad()
def gallery_classes(
    steer: Callable[[Tensor], Tensor],
    model: nn.Module,
    site: Site,
    gallery: Gallery,
    rows: Tensor,
    classifier: Tensor,
    retriever: Retriever | None = None,
) -> Tensor:
    """The zero-shot classes of images of the gallery, steered: int64 ``[len(rows)]``.

    Args:
        steer: activations ``[batch, d]`` to the same.
        model: the open_clip model.
        site: its last site, or the output.
        gallery: the images.
        rows: which of them.
        classifier: ``[embed_dim, classes]``, as clip_benchmark makes it.
        retriever: what the steering asks about the images at hand.
    """
    stored = gallery.activations.get(site.hookpoint, gallery.embeddings[CLIP])
    activations, classifier = Activations(stored, classifier.device), classifier.float()
    found = []
    with torch.autocast(classifier.device.type, enabled=False):
        for batch in rows.split(_BATCH):
            if retriever is not None:
                retriever.begin_own(batch)
            try:
                steered = in_float32(steer, activations[batch])
            finally:
                if retriever is not None:
                    retriever.end()
            embedding = nn.functional.normalize(embedding_from(model, site, steered), dim=-1)
            found.append((embedding @ classifier).argmax(1))
    return torch.cat(found)


def settle(
    automatic: Automatic,
    steer: Callable[[Tensor], Tensor],
    model: nn.Module,
    site: Site,
    gallery: Gallery,
    classifier: Tensor,
    retriever: Retriever | None = None,
    prior: Tensor | None = None,
    name: str | None = None,
) -> Choice:
    """Choose among the candidates.

    Args:
        automatic: the candidates.
        steer: it, with whatever is around it (a gate).
        prior: shares of the classes, if known.
        name: of the progress bar; None: there is none.

    The others are as for :func:`gallery_classes`.
    """
    rows = spread(len(gallery), _IMAGES)
    if len(rows) < 2:
        raise HarnessError(f"auto is told by images of the gallery, and there is {len(rows)}; expected some hundreds")
    stored = Activations(gallery.embeddings[CLIP], classifier.device)
    graph = neighbour_graph(torch.cat([stored[batch] for batch in rows.split(_BATCH)]))
    ways = []
    for values in tqdm(automatic.candidates, name, unit="candidate", disable=None if name else True, leave=False):
        automatic.use(values)
        ways.append(gallery_classes(steer, model, site, gallery, rows, classifier, retriever))
    return choose(automatic.candidates, ways, graph, classifier.shape[1], prior)


def kept(folder: Path, identity: Mapping[str, Any], classifier: Tensor, make: Callable[[], Choice]) -> Choice:
    """The choice that was made before with the same ``identity`` and classifier; else it is made, and kept if possible.

    Args:
        folder: where choices are kept.
        identity: plain values that the choice depends on.
        classifier: the class embeddings, which hold classes and prompts.
        make: makes the choice.
    """
    text = json.dumps({**identity, "classifier": digest_of({"": classifier})}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        return Choice.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError):  # none yet, or no choice: it is made anew
        choice = make()
    with suppress(OSError):  # in a folder that cannot be written, the choice serves this run only
        folder.mkdir(exist_ok=True)
        with atomic_file(path) as scratch:
            scratch.write_text(json.dumps(choice.to_json()))
    return choice


def read_prior(path: str, classes: Sequence[str] | None = None, count: int | None = None) -> Tensor:
    """Shares of the classes ``[classes]``, float64 with sum 1, from a JSON file: {class: share}, or a list.

    Args:
        path: the file.
        classes: their names in order, as far as they are known.
        count: their number, as far as it is known.

    Raises:
        ModelStringError: the file cannot be read, or does not fit the classes.
    """

    def wrong(problem: str) -> ModelStringError:
        return ModelStringError(
            f'option prior={path!r}: {problem}; expected a JSON file such as {{"cat": 0.9, "dog": 0.1}}, or a list of '
            "shares in the order of the classes"
        )

    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:
        raise wrong(" ".join(str(error).split())) from None
    shares = list(found.values()) if isinstance(found, dict) else found
    good = isinstance(shares, list) and all(
        isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share < float("inf")
        for share in shares
    )
    if not good or sum(shares) <= 0:
        raise wrong("shares are numbers from 0 on, not all of them 0")
    if isinstance(found, dict) and classes is not None:
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise wrong(f"{', '.join(map(repr, unknown[:3]))} is no class of the data set")
        shares = [found.get(name, 0) for name in classes]
    if count is not None and (len(shares) != count or (isinstance(found, dict) and classes is None)):
        raise wrong(f"{len(shares)} shares for {count} classes, whose names are {'' if classes else 'not '}known")
    prior = torch.tensor(shares, dtype=torch.float64)
    return prior / prior.sum()
