"""Names of rows: from method, options and strength, and from k, size and seed of the SAE, but without the digest in a
checkpoint's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vs2_plugin.names import Parts
from vs2_plugin.results.runs import Run
from vs2_plugin.text import printable

__all__ = ["base_of", "facts_of", "label_of", "same_but_for_the_seed", "seed_of", "written"]

#: The part of a checkpoint's name by which ``vs2-train-sae`` tells several seeds apart.
_SEED = re.compile(r"-seed(\d{1,10})(?=-pass|\Z)")
#: A checkpoint's name that ends with a digest of its settings.
_DIGEST = re.compile(r".*-[0-9a-f]{8}\Z", re.DOTALL)


def seed_of(run: Run) -> int | None:
    """Return the seed of the run's SAE: from the results file, else from the checkpoint's name."""
    number = run.number("vs2_seed")
    if number is not None:
        return int(number)
    match = _SEED.search(str(run.fact("checkpoint") or ""))
    return int(match[1]) if match else None


def base_of(run: Run) -> str:
    """Return the name of the run's checkpoint without the seed; empty for a run without one."""
    name = run.fact("checkpoint")
    return _SEED.sub("", printable(name)) if isinstance(name, str) else ""


def same_but_for_the_seed(run: Run) -> tuple[str, ...]:
    """Return a key that is equal for results that differ in the seed of the SAE only."""
    facts = (run.fact(name) for name in ("k", "latents", "pass_weight", "site", "split"))
    return (str(run.method), base_of(run), *map(str, facts), *_options(run))


def label_of(run: Run, checkpoint: str = "", without: Iterable[str] = ()) -> str:
    """Return a label of method, ``checkpoint`` (its name, or empty) and options, but for the options ``without``."""
    named = [checkpoint] if checkpoint and "checkpoint" not in without else []
    options = (word for word in _options(run) if word.partition("=")[0] not in without)
    return Parts(run.method, "", (*named, *options)).label


def _options(run: Run) -> list[str]:
    return [word for word in run.parts.words if "=" in word]


def facts_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return fact -> text for the SAE and the strength of a row; ``runs`` are its seeds."""
    first = runs[0]
    base = base_of(first)
    facts = {} if not base or _DIGEST.match(base) else {"checkpoint": base}
    size = "latents" if first.number("vs2_expansion") is None else "expansion"  # older results have latents only
    for name in ("k", size, "pass_weight"):
        value = first.number(f"vs2_{name}")
        if value is not None and name not in first.parts.given:
            facts[name] = f"{value:g}"
    if first.fact("split") is not None:
        facts["split"] = printable(first.fact("split"))
    seeds = [seed for run in runs if (seed := seed_of(run)) is not None]
    if seeds and "k" in facts:  # a method without an SAE does not depend on the seed
        facts["seed"] = ", ".join(map(str, seeds))
    if strength := _strength(runs):
        facts["alpha"] = strength
    return facts


def _strength(runs: Sequence[Run]) -> str:
    """Return alpha, or its range over the runs, as text; empty where the options give it."""
    option = runs[0].parts.given.get("alpha")
    values = [value for run in runs if (value := run.number("vs2_alpha")) is not None]
    if not values or option not in (None, "auto"):
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def written(facts: Mapping[str, str]) -> str:
    """Return facts as text.

    >>> written({"k": "16", "expansion": "4", "seed": "0, 1", "alpha": "1.05"})
    'alpha 1.05, k 16, expansion 4, seeds 0, 1'
    """
    several = "s" if "," in facts.get("seed", "") else ""
    forms = {
        "checkpoint": "checkpoint {}", "alpha": "alpha {}", "k": "k {}", "expansion": "expansion {}",
        "latents": "{} latents", "pass_weight": "PASS weight {}", "split": "split {}", "seed": f"seed{several} {{}}",
    }  # fmt: skip
    return ", ".join(form.format(facts[name]) for name, form in forms.items() if name in facts)
