"""Describes in words how a model is steered."""

from __future__ import annotations

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.model.automatic import Automatic
from vs2_plugin.model.classifier import Classifier
from vs2_plugin.model.place import Place
from vs2_plugin.model.places import Places
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.builtin import STRENGTH, strength

__all__ = ["describe", "told"]

#: Protocol of a method on logits -> the images that it sees, in words.
_SEES = {
    "image": "each image by itself",
    "unlabeled": "unlabeled images of the domain",
    "stream": "the images before it",
    "transductive": "all test images at once",
}


def describe(spec: ModelString, places: Places | None, classifier: Classifier | None) -> str:
    """Return a description of how a model is steered, one line per fact.

    Args:
        spec: the model string.
        places: the sites where the model is steered; None while they are not known.
        classifier: the classes, if they are known.
    """
    summaries = [method.summary for method, _ in reversed(spec.methods)]
    head = f"SteeredCLIP {str(spec)!r}: {'; after '.join(summaries)}"
    facts = [] if places is None else told(spec, places, classifier)
    lines = [f"{name}: {value}" for name, value in facts] or ["not steered yet: it does not know its data set"]
    return "\n  ".join([head, *lines])


def told(spec: ModelString, places: Places, classifier: Classifier | None) -> list[tuple[str, str]]:
    """Return the description's facts as names and values: sites, checkpoint and SAE, options and choice, classes."""
    where = "no activations" if spec.method.site == "logits" else " and ".join(str(place.site) for place in places)
    facts = [("steered", where)]
    if spec.reading is not None:
        facts.append(("classes read by", f"{spec.reading.method.name}, which sees {_SEES[spec.protocol]}"))
    if places.checkpoint is not None:
        facts.append(("checkpoint", _checkpoint(places.checkpoint, places)))
    return [*facts, ("options", _options(spec, places)), ("classes", _classes(classifier))]


def _classes(classifier: Classifier | None) -> str:
    if classifier is None:
        return "none, but classify() needs them"
    names, prompts = classifier.names, classifier.prompts
    shown = f"{len(names)}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    by = f", by the prompt {prompts[0]!r}" if len(prompts) == 1 else f", by {len(prompts)} prompts" if prompts else ""
    return shown + by


def _checkpoint(checkpoint: Checkpoint, places: Places) -> str:
    data = checkpoint.data
    how = ", transductive" if places.transductive else ""
    trained = f"{checkpoint.sites[0].trained} {data}{how}"
    saes = {(gate.sae.config.k, gate.sae.config.num_latents) for gate in places.gates}
    active = "".join(f", {k} of {latents:,} latents active" for k, latents in sorted(saes))
    return f"{checkpoint.name} of {checkpoint.model}{active}, {trained}"


def _options(spec: ModelString, places: Places) -> str:
    """Return the options with their values, and the values chosen for automatic ones, in words."""
    options = {name: value for name, value in spec.all_options.items() if value is not None}
    text = ", ".join(f"{name} = {_word(value)}" for name, value in options.items()) or "none"
    if all(spec.method.option(option.name) is option and option.name in options for option in STRENGTH[:2]):
        text += f", which is alpha = {strength(float(options['gamma']), float(options['lam']), None):g}"
    last: Place = places[-1]
    if isinstance(last.steering, Automatic):
        choice = last.steering.choice
        text += "; chosen: " + ("nothing yet, the classes are not known" if choice is None else str(choice))
    return text


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
