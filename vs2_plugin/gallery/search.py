"""Cosine search in embeddings that may be larger than memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.arrays import Array, Stack, check_all, check_file, sums_of, trust_all
from vs2_plugin.errors import SettingError
from vs2_plugin.files import atomic_file, file_digest
from vs2_plugin.selection import largest
from vs2_plugin.text import sentence_of

__all__ = ["ExactSearch", "FaissSearch", "ScreenedSearch", "Search", "blocks", "open_search"]

_LOG = logging.getLogger(__name__)
#: Galleries of up to this many images are always searched exactly: that takes about 2 % of the time of a ViT-B-32,
#: whereas FAISS builds its index for 20 s and finds 78 % (3,000 images) to 98 % (50,000) of the 50 nearest neighbours.
_SMALL = 50_000
_BLOCK = 1 << 16
#: Embeddings of up to this many bytes (as float32) are kept in main memory; larger ones are read block by block.
_RESIDENT = 2 << 30
_PADDED = 512
_QUERIES = 256  # at a time: their products then take no more memory than embeddings of 512 numbers


class Search(Protocol):
    """A function that finds the n embeddings of largest cosine with each query ``[batch, e]`` (float32, unit norm). It
    returns cosines and row numbers, ``[batch, n]`` each, best first."""

    def __call__(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]: ...


#: Function of queries ``[batch, e]`` (float32, unit norm) and ``wanted``; returns float32 cosines and row numbers,
#: ``[batch, m]`` each, of the ``wanted`` largest rounded cosines and maybe others. The cosine of padding is -inf.
Candidates = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def blocks(embeddings: Array | Stack, device: str | torch.device) -> Iterator[Tensor]:
    """Yield the embeddings ``[count, e]`` in blocks: float32, unit norm, on ``device``."""
    for start in range(0, len(embeddings), _BLOCK):
        rows = np.asarray(embeddings[start : start + _BLOCK])
        yield F.normalize(torch.from_numpy(rows.copy()).to(device).float(), dim=-1)


class ExactSearch:
    """Exact search: every query against every embedding, in blocks, in float32."""

    def __init__(self, embeddings: Array | Stack, device: str | torch.device) -> None:
        self._embeddings, self._device = embeddings, torch.device(device)
        limit = torch.cuda.mem_get_info(device)[0] // 4 if self._device.type == "cuda" else _RESIDENT
        fits = 4 * len(embeddings) * embeddings.shape[1] <= limit
        self._resident = list(blocks(embeddings, device)) if fits else None

    def __call__(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`."""
        best: list[Tensor] = []  # cosines and rows of the blocks so far; empty before the first
        start = 0
        for block in self._resident or blocks(self._embeddings, self._device):
            cosines, rows = largest(queries @ block.T, min(n, len(block)))
            rows = rows + start
            start += len(block)
            if best:
                cosines, rows = torch.cat([best[0], cosines], dim=1), torch.cat([best[1], rows], dim=1)
            cosines, order = cosines.topk(min(n, cosines.shape[1]), dim=1)
            best = [cosines, rows.gather(1, order)]
        return best[0], best[1]


class ScreenedSearch:
    """Search of every query against every embedding, on a GPU with room for them: cosines of rounded embeddings choose
    2 n + 32 candidates for n results, and the candidates' cosines in float32 decide.

    Triton kernels round to 8 bits: cosines of real CLIP embeddings are off by 3e-4, at most by 2e-3. Without Triton,
    cosines are in half precision, off by less than 1e-4. A neighbour is missed if n + 32 others are that close to it.
    """

    def __init__(self, embeddings: Array | Stack, device: str | torch.device) -> None:
        stored = torch.from_numpy(np.asarray(embeddings[:1]).copy()).dtype
        rows = torch.empty(embeddings.shape, dtype=stored, device=device)
        for start in range(0, len(rows), _BLOCK):
            block = np.asarray(embeddings[start : start + _BLOCK])
            rows[start : start + len(block)] = torch.from_numpy(block.copy())
        self._count = len(rows)
        self._candidates: Candidates = self._rounded(rows) or _Halves(rows)

    @staticmethod
    def _rounded(rows: Tensor) -> Candidates | None:
        """Return the search for candidates by Triton kernels; None where they fail on a first query, or on a GPU before
        the generation of the A100, for which Triton cannot compile products of 8-bit integers and prints pages."""
        if not rows.is_cuda or torch.cuda.get_device_capability(rows.device) < (8, 0):
            return None
        try:
            from vs2_plugin.gallery.kernels import Rounded

            rounded = Rounded(rows)
            rounded(rows[:1].float(), 1)
        except Exception as error:  # whatever a missing compiler, or an older torch or GPU, raises
            _LOG.info("the gallery is searched by torch's own operators: %s", sentence_of(error))
            return None
        return rounded

    @staticmethod
    def fits(embeddings: Array | Stack, device: torch.device) -> bool:
        """Return whether ``device`` is a GPU whose free memory is over four times the search's need."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
            return False
        count, width = embeddings.shape
        size = count * width * (2 + np.dtype(embeddings.dtype).itemsize)
        return 4 * size < torch.cuda.mem_get_info(device)[0]

    def __call__(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`."""
        if len(queries) <= _QUERIES:
            return self._find(queries, n)
        cosines, rows = zip(*(self._find(part, n) for part in queries.split(_QUERIES)), strict=True)
        return torch.cat(cosines), torch.cat(rows)

    def _find(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        cosines, rows = self._candidates(queries, min(2 * n + 32, self._count))
        cosines, order = cosines.topk(min(n, self._count), dim=1)
        return cosines, rows.gather(1, order)


class _Halves:
    """Search for candidates by torch's own operators: products of half-precision numbers, summed in float32.

    Args:
        rows: the embeddings, ``[count, e]``.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        padded = -(-len(rows) // _PADDED) * _PADDED  # since the top-k works on groups
        self._half = torch.zeros(padded, rows.shape[1], dtype=torch.float16, device=rows.device)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            self._half[start : start + len(block)] = F.normalize(block.float(), dim=-1)

    def __call__(self, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """See :data:`Candidates`."""
        products = _products(queries.half(), self._half.T)
        products[:, len(self._rows) :] = -torch.inf
        chosen = largest(products, wanted)[1]
        embeddings = F.normalize(self._rows[chosen].float(), dim=-1)
        return torch.bmm(embeddings, queries[:, :, None])[..., 0], chosen


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of two half-precision matrices in float32; on a CPU, or by an older torch, in rounded form."""
    try:
        return torch.mm(one, other, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return (one @ other).float()


class FaissSearch:
    """Approximate search by FAISS, for millions of images: an inverted file over half-precision vectors.

    The index is built once and kept beside the embeddings, if their folder can be written.

    Raises:
        SettingError: FAISS is not installed.
    """

    def __init__(self, embeddings: Array | Stack, file: Path, device: str | torch.device) -> None:
        try:
            import faiss
        except ImportError:
            raise SettingError("@search=faiss needs FAISS; install it with: pip install 'vs2-plugin[faiss]'") from None
        self._device = device
        index = self._read(faiss, file)
        if index is None or (index.ntotal, index.d) != embeddings.shape:
            index = self._build(faiss, embeddings)
            self._keep(faiss, index, file)
        lists = faiss.extract_index_ivf(index)
        lists.nprobe = max(1, lists.nlist // 16)
        self._index = index

    @staticmethod
    def _read(faiss: Any, file: Path) -> Any:
        try:
            check_all(file.parent, {file.name: sums_of(file).read_text()}, compare=check_file)
            return faiss.read_index(os.fspath(file))
        except (OSError, ValueError, RuntimeError):  # missing or damaged: the index is built again
            return None

    @staticmethod
    def _build(faiss: Any, embeddings: Array | Stack) -> Any:
        count, width = embeddings.shape
        # As many lists as FAISS advises (4 to 16 times the root of the count), if each can be learned from 39 images.
        lists = max(1, min(int(4 * count**0.5), count // 39))
        index = faiss.index_factory(width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        sample = np.sort(np.random.default_rng(0).permutation(count)[: 64 * lists])
        index.train(np.concatenate([block.numpy() for block in blocks(embeddings[sample], "cpu")]))
        for block in blocks(embeddings, "cpu"):
            index.add(block.numpy())
        return index

    @staticmethod
    def _keep(faiss: Any, index: Any, file: Path) -> None:
        # In a folder that cannot be written, the index serves this run only.
        with suppress(OSError, RuntimeError), atomic_file(file) as scratch, open(scratch, "wb") as out:
            # By Python's file: if FAISS cannot close a file of its own, as on a full disk, it only prints that.
            faiss.write_index(index, faiss.PyCallbackIOWriter(out.write))
        with suppress(OSError):
            digest = file_digest(file)
            with atomic_file(sums_of(file)) as scratch:
                scratch.write_text(digest)
            trust_all(file.parent, {file.name: digest})

    def __call__(self, queries: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """See :class:`Search`. If FAISS finds fewer than n, the remaining row numbers are -1."""
        cosines, rows = self._index.search(queries.detach().cpu().numpy(), n)
        return torch.from_numpy(cosines).to(self._device), torch.from_numpy(rows).to(self._device)


def open_search(kind: str, embeddings: Array | Stack, file: Path, device: str | torch.device) -> Search:
    """Return the search of this ``kind``: ``exact``, or ``faiss`` (whose index is kept in ``file``). A small gallery is
    always searched exactly."""
    if kind == "faiss":
        if len(embeddings) > _SMALL:
            return FaissSearch(embeddings, file, device)
        count = f"{len(embeddings):,}"
        _LOG.info("the gallery's %s images are searched exactly; FAISS is for more than %s", count, f"{_SMALL:,}")
    if ScreenedSearch.fits(embeddings, torch.device(device)):
        return ScreenedSearch(embeddings, device)
    return ExactSearch(embeddings, device)
