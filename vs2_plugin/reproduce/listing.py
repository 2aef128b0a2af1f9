"""Lists tables in words, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vs2_plugin.reproduce.cells import Cell, Table
from vs2_plugin.reproduce.reading import PAPER

__all__ = ["listing"]


def listing(tables: Sequence[Table]) -> Iterator[str]:
    """Yield a line per table and cell. Settings that are the same in a whole table are listed once."""
    for table in tables:
        name = table.path.stem if table.path.parent == PAPER else table.path
        yield f"{name}: {table.title}, {len(table.cells)} cells"
        settings = [_settings(cell) for cell in table.cells]
        common = _common(table.cells, settings)
        if common:
            yield f"  everywhere: {'; '.join(common.values())}"
        for cell, mine in zip(table.cells, settings, strict=True):
            own = [text for name, text in mine.items() if name not in common]
            published = [f"published {' to '.join(map(str, cell.ends))}"] if cell.ends else []
            yield f"  {cell.title}: {'; '.join([_what(cell), *own, *published])}"


def _common(cells: Sequence[Cell], settings: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the settings that are equal wherever they apply: prompts in all cells, others in all cells with an SAE."""
    common = {}
    trained = sum(cell.sae is not None for cell in cells)
    for name in dict.fromkeys(name for mine in settings for name in mine):
        texts = [mine[name] for mine in settings if name in mine]
        if len(set(texts)) == 1 and (name == "prompts" or len(texts) == trained):
            common[name] = texts[0]
    return common


def _what(cell: Cell) -> str:
    """Return a description of the number in a cell."""
    if cell.best_of:
        return f"the best {cell.metric} of the rows {', '.join(map(repr, cell.best_of))}"
    if cell.model is None:
        return "not run"
    by_class = "largest gain in any class by" if cell.of_class is None else f"gain in class {cell.of_class!r} by"
    number = {"fvu": "FVU of the SAE of", "gain": by_class}.get(cell.metric, f"{cell.metric} of")
    return f"{number} {cell.model} ({cell.weights or 'own weights'}) on {cell.dataset}"


def _settings(cell: Cell) -> dict[str, str]:
    """Return setting -> text for the settings of a cell besides its model."""
    if cell.model is None:
        return {}
    prompts = ", ".join(map(repr, cell.prompts)) or "those of clip_benchmark"
    words = {} if cell.metric == "fvu" else {"prompts": f"prompts: {prompts}"}
    if cell.sae is not None:
        for name, value in cell.sae.flags:
            words[name] = f"SAE {name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        if cell.sae.datasets != (cell.dataset,):
            words["trained on"] = f"SAE trained on {' '.join(cell.sae.datasets)}"
        words["seeds"] = f"seeds of the SAE {' '.join(map(str, cell.seeds))}"
    return words
