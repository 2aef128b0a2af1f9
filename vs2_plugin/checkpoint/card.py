"""The model card of a checkpoint on a hub: ``README.md``, whose head holds the metadata that hubs index."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from vs2_plugin.checkpoint.records import GIVEN, SiteSAE, TrainingData
from vs2_plugin.files import json_digest
from vs2_plugin.gallery.contents import GalleryContents
from vs2_plugin.names import LOCAL, library_place, with_weights
from vs2_plugin.text import printable

__all__ = ["CARD", "card", "is_by_hand", "license_of"]

CARD = "README.md"
#: The hub's value for a licence that nobody has stated.
_LICENSE = "unknown"
_TAGS = ["vs2-plugin", "sparse-autoencoder", "clip", "steering", "interpretability"]


def card(
    name: str,
    backbone: str,
    pretrained: str,
    data: TrainingData,
    sites: Sequence[SiteSAE],
    gallery: GalleryContents | None,
    license: str | None = None,
) -> str:
    """Return the model card of a checkpoint, in Markdown.

    Args:
        name: the checkpoint's name in a model string: ``hf:owner/name``, or its name in a store.
        backbone: the model's name; empty if the tower is not known.
        pretrained: its weights.
        data: the training data of the SAEs.
        sites: the SAEs.
        gallery: the contents of the gallery, if it is published with the SAEs.
        license: the SAEs' licence, by the hub's name of it.
    """
    import yaml

    head: dict[str, Any] = {"license": license or _LICENSE, "library_name": "vs2-plugin", "tags": _TAGS}
    from vs2_plugin.clip.backbone import weights_repository

    base = weights_repository(backbone, pretrained) if backbone else None
    if base is not None:
        head["base_model"] = base
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", ""]
    lines += [f"# {_plain(name.removeprefix('hf:'))}", "", *_about(backbone, pretrained, data, sites[0])]
    lines += ["", *_saes(sites), "", *_use(name, backbone, pretrained, data, sites, gallery)]
    return _signed("\n".join(lines) + "\n")


def is_by_hand(text: str) -> bool:
    """Return whether somebody wrote or changed a card, as its last line tells: a digest of the rest."""
    return text != _signed(text.rpartition("\n<!-- ")[0])


def license_of(text: str) -> str | None:
    """Return the licence that a card's head names; None without one."""
    found = re.search(r"^license: (.+)$", text, re.MULTILINE)
    return found[1] if found else None


def _signed(text: str) -> str:
    return f"{text}\n<!-- card by vs2-plugin: {json_digest(text)[:16]} -->\n"


def _about(backbone: str, pretrained: str, data: TrainingData, site: SiteSAE) -> Iterator[str]:
    what = f"the image activations of {_code(with_weights(backbone, pretrained))}" if backbone else "activations"
    by = site.training.get("library") or "vs2-plugin"
    yield (
        f"Sparse autoencoders (SAEs) on {what}, trained by {_code(by)}. They steer a CLIP at test time, as in Visual "
        "Sparse Steering ([arXiv 2506.01247](https://arxiv.org/abs/2506.01247)); no weight of the model changes."
    )
    yield ""
    split = "" if GIVEN in data.splits else f" ({', '.join(map(_code, dict.fromkeys(data.splits)))})"
    trained = site.trained[0].upper() + site.trained[1:]
    yield f"- {trained} {_plain(data)}{split if data.splits else ''}, without labels unless the table says so"
    if data.transductive:
        yield "- Transductive: it was trained on images that are evaluated"


def _saes(sites: Sequence[SiteSAE]) -> Iterator[str]:
    shares = {"dead": "dead latents", "dense": "dense latents"}
    by_hand = {"recovered": "accuracy recovered", "agreement": "predictions kept"}  # measured by vs2 sae
    shares |= {name: words for name, words in by_hand.items() if any(name in site.training for site in sites)}
    head = ["width", "latents", "active (L0, at most)", "explained variance", *shares.values()]
    yield f"| SAE | {' | '.join(head)} | labels used |"
    yield f"|---|{'---:|' * len(head)}---|"
    for site in sites:
        training = site.training
        latents = training.get("num_latents")
        if latents is None and isinstance(training.get("expansion_factor"), int):
            latents = int(training["expansion_factor"] or 0) * site.width
        cells = [f"{share:.1%}" if isinstance(share, float) else "?" for share in map(training.get, shares)]
        yield (
            f"| {_code(site.folder)} | {site.width} | {_number(latents)} | {_number(training.get('k'))} | "
            f"{1 - site.fvu:.1%} | {' | '.join(cells)} | {site.labels} |"
        )
    yield ""
    yield (
        "The explained variance is 1 - FVU, over activations that were held out; a latent is dead if no training "
        "activation activates it, and dense if more than a tenth of them do."
    )
    yield from _zero_shot(sites)
    yield from (f"\nUseless at {_code(site.folder)}: {_plain(site.warning)}." for site in sites if site.warning)
    listed = ("lr", "samples", "steps", "sae_batch_size", "seed", "recipe", "library")
    settings = [f"{name} {_code(sites[0].training[name])}" for name in listed if name in sites[0].training]
    if settings:
        yield ""
        yield f"Settings: {', '.join(settings)}; all of them are in `vs2.json`."


def _zero_shot(sites: Sequence[SiteSAE]) -> Iterator[str]:
    """Yield the lines on what ``vs2 sae`` measured of predictions and on which images and classes, if it was run."""
    measured = dict.fromkeys(site.training["recovered_on"] for site in sites if "recovered_on" in site.training)
    if not measured:
        return
    definition = "accuracy recovered is the share left of the zero-shot accuracy above that of one constant activation "
    definition += "(labels were read for it), and "
    first = definition if any("recovered" in site.training for site in sites) else ""
    yield (
        f"\nWhen the reconstruction replaces the activation, {first}predictions kept is the share of images whose "
        f"zero-shot class stays the same: of {'; of '.join(map(_plain, measured))}."
    )


def _use(
    name: str,
    backbone: str,
    pretrained: str,
    data: TrainingData,
    sites: Sequence[SiteSAE],
    gallery: GalleryContents | None,
) -> Iterator[str]:
    yield "## Use"
    yield ""
    if not backbone:
        yield "These SAEs belong to no named tower and cannot steer one. `sparsify.SparseCoder.load_many` loads them."
        return
    model = f"vs2:{backbone}@{name}"
    variants = {site.variant for site in sites}
    weights = f" --pretrained {_word(pretrained)}" if pretrained else ""
    dataset = "cifar100" if GIVEN in data.splits else data.datasets[0]
    # Where the data lie is not told: it concerns the machine of the training.
    root = " --dataset_root DIR" if dataset.startswith(("folder/", "wds/")) else ""
    yield "```sh"
    yield f"clip_benchmark eval --model {_word(backbone)} {_word(model)}{weights} --dataset {_word(dataset)}{root}"
    yield "```"
    yield ""
    yield "```python"
    yield "import vs2_plugin"
    yield ""
    yield f"model, *_ = vs2_plugin.load({model!r}, {pretrained!r}, classes=['cat', 'dog'])"
    yield "model.classify('photo.jpg')"
    yield "```"
    yield ""
    yield "The tower must be exactly the one that they were trained on; any other is refused. No code is executed."
    if "pass" in variants:
        yield "The SAE trained by PASS, with labels, is for `pass:`."
    if gallery is None:
        yield "Methods that use a gallery of training images (`vs2s`, `auto`, `vs2pp`, ...) find none here."
    else:
        contents = "activations, embeddings and labels" if gallery.labels else "activations and embeddings"
        yield (
            f"A gallery of {gallery.count:,} training images ({contents}, no pictures) is included, for methods "
            "that use one (`vs2s`, `auto`, `vs2pp`, ...)."
        )
    if backbone.startswith(LOCAL) or isinstance(library_place(backbone), str):
        yield f"{_code(backbone)} was a folder on the machine where they were trained."


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _plain(value: object) -> str:
    """Return ``value`` as text, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(value))


def _code(value: object) -> str:
    return f"`{printable(value).replace('`', '').replace('|', '/')}`"


def _word(text: str) -> str:
    return shlex.quote(printable(text))
