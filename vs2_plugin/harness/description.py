"""How a model is steered, in words."""

from __future__ import annotations

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.harness.automatic import Automatic
from vs2_plugin.harness.places import Place, Places
from vs2_plugin.harness.predictions import Classifier
from vs2_plugin.modelstring import ModelString
from vs2_plugin.steering.builtin import STRENGTH, strength
from vs2_plugin.text import counted

__all__ = ["describe"]


def describe(spec: ModelString, places: Places | None, classifier: Classifier | None) -> str:
    """Return a line per fact: what is steered where, along which checkpoint, how strongly and why, for which classes.

    Args:
        spec: the model string.
        places: where it is steered; None while that is not known.
        classifier: the classes, if they are known.
    """
    lines = [f"SteeredCLIP {str(spec)!r}: {spec.method.summary}"]
    if places is None:
        return f"{lines[0]}\n  not steered yet: it does not know its data set"
    lines.append(f"steers at {' and '.join(str(place.site) for place in places)}")
    if places.checkpoint is not None:
        lines.append(_checkpoint(places.checkpoint, places))
    lines.append(_strength(spec, places))
    if classifier is not None:
        shown = ", ".join(classifier.names[:5]) + (", ..." if len(classifier.names) > 5 else "")
        by = f", by {counted(len(classifier.prompts), 'prompt')}" if len(classifier.prompts) > 1 else ""
        by = f", by the prompt {classifier.prompts[0]!r}" if len(classifier.prompts) == 1 else by
        lines.append(f"{len(classifier.names)} classes: {shown}{by}")
    else:
        lines.append("no classes: classify() needs them")
    return "\n  ".join(lines)


def _checkpoint(checkpoint: Checkpoint, places: Places) -> str:
    data = checkpoint.data
    how = ", transductive" if places.transductive else ""
    trained = f"trained on {data}{how}"
    saes = {(gate.sae.config.k, gate.sae.config.num_latents) for gate in places.gates}
    active = "".join(f"; {k} of {latents:,} latents are active" for k, latents in sorted(saes))
    return f"checkpoint {checkpoint.name!r} of {checkpoint.model}, {trained}{active}"


def _strength(spec: ModelString, places: Places) -> str:
    """Say the options, and what was chosen of those that are automatic."""
    options = {name: value for name, value in spec.options.items() if value is not None}
    told = ", ".join(f"{name} = {_word(value)}" for name, value in options.items()) or "no options"
    if all(spec.method.option(one.name) is one and one.name in options for one in STRENGTH[:2]):
        told += f", which is alpha = {strength(float(options['gamma']), float(options['lam']), None):g}"
    last: Place = places[-1]
    if isinstance(last.steering, Automatic):
        choice = last.steering.choice
        told += "; chosen: " + ("nothing yet, the classes are not known" if choice is None else str(choice))
    return told


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
