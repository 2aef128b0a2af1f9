"""The gradients of one training step, from the active latents alone.

Of n latents only k are active in an activation. So of the five matrix products of a dense training step only the
encoder's is needed, to find the active latents. The others become sums over k rows instead of n, which
``embedding_bag`` computes. The result is that of the dense step.
"""

from __future__ import annotations

import functools
import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.devices import add_at
from vs2_plugin.distributed import mean_row, total
from vs2_plugin.sae.product import FLOAT32, Precision, Room, pre_activations
from vs2_plugin.sae.topk import Latents, TopKSAE, by_latent, combine, sum_by_latent
from vs2_plugin.selection import largest_above_zero

__all__ = ["ClassMeans", "gradient_of", "set_gradients"]


class ClassMeans:
    """PASS (arXiv 2506.01247): pulls each code towards the mean code of its class.

    The term is ``weight · Σ‖c_i - m(class i)‖² / V``, with V as in the loss. The means m are those of the batch, or,
    for batches with few images per class, running means, of which a tenth is replaced by each batch that has the class.
    A batch mean depends on the codes, but since ``Σ (c - m) = 0`` within a class, that adds nothing to the derivative.
    """

    def __init__(self, weight: float, num_classes: int, running: bool) -> None:
        self.weight, self.num_classes, self.running = weight, num_classes, running
        #: Running means ``[classes, n]``, and which classes have one, bool ``[classes, 1]``.
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, latents: Latents, labels: Tensor, num_latents: int) -> tuple[Tensor, Tensor]:
        """Return the term times V, and its derivative by the active latents' values ``[batch, k]``."""
        values, indices = latents
        means = self._update(values, indices, labels, num_latents)
        own = means.view(-1)[labels[:, None] * num_latents + indices]
        # Σ over all latents: where c is 0, (c - m)² is m².
        total = (values * (values - 2 * own)).sum() + means.pow(2).sum(1)[labels].sum()
        return self.weight * total, 2 * self.weight * (values - own)

    def _update(self, values: Tensor, indices: Tensor, labels: Tensor, num_latents: int) -> Tensor:
        sums = values.new_zeros(self.num_classes * num_latents)
        add_at(sums, (labels[:, None] * num_latents + indices).flatten(), values.flatten())
        sums, counts = total(sums), total(torch.bincount(labels, minlength=self.num_classes))[:, None]
        batch_means = sums.view(self.num_classes, num_latents) / counts.clamp_min(1)
        if not self.running:
            return batch_means
        means, seen = self.kept or (batch_means.clone(), counts > 0)
        means.lerp_(batch_means, torch.where(seen, 0.1, 1.0) * (counts > 0))
        self.kept = means, seen | (counts > 0)
        return means


@torch.no_grad()
def set_gradients(
    sae: TopKSAE,
    x: Tensor,
    dead: Tensor | None = None,
    auxk: float = 0.0,
    precision: Precision = FLOAT32,
    classes: ClassMeans | None = None,
    labels: Tensor | None = None,
    room: Room | None = None,
) -> tuple[Tensor, Latents]:
    """Set ``.grad`` of every parameter of ``sae`` to the gradient of the loss on a batch.

    The loss is ``Σ‖x - x̃‖² / V`` with ``V = Σ‖x - batch mean‖²``, plus AuxK for dead latents (arXiv 2406.04093,
    appendix A.2): ``auxk · min(1, dead / (d/2)) · Σ‖(x - x̃) - W_decᵀ z‖² / V``, where z holds the d/2 largest dead
    latents, for ``abs`` in magnitude, and ``x - x̃`` is taken as constant. The part of the decoder's gradient that is
    parallel to the decoder's rows is removed, since it would only change their norms, which are fixed at 1.

    Where several processes share a batch, x is the share of this one: V, the batch mean and the class means are those
    of the whole batch, and the gradients are summed, as by DistributedDataParallel with autograd's gradients.

    Args:
        x: the batch, ``[batch, d]``, float32; this process's share of it.
        dead: which latents count as dead, bool ``[n]``.
        auxk: weight of AuxK; 0 switches it off.
        precision: the types of the encoder's product and of sums over rows.
        classes: adds the term of PASS; needs ``labels``.
        labels: the batch's classes, int64 ``[batch]``.
        room: memory that the caller keeps from step to step.

    Returns:
        This process's share of the loss, and the sparse code of its activations.
    """
    room = room or Room()
    rows = precision.rows or x.dtype
    centered = torch.sub(x, sae.b_dec, out=room.like(x, "centered"))
    rounded = room.cast(centered, "rounded", rows)
    pre = pre_activations(sae, rounded if precision.product == rows else centered, precision.product, room)
    values, indices = sae.select(pre)
    latents = Latents(values.to(x.dtype), indices)
    residual = room.like(x, "residual").copy_(combine(latents, room.cast(sae.W_dec, "decoder", rows)))
    torch.sub(centered, residual, out=residual)
    apart = torch.sub(x, mean_row(x), out=room.like(x, "apart")).square_()
    variance = total(apart.sum())
    loss = torch.linalg.vector_norm(residual).square() / variance

    to_output = torch.mul(residual, -2 / variance, out=apart)  # d loss / d x̃
    to_values = _products(to_output, latents.indices, sae.W_dec)
    if classes is not None and labels is not None:
        term, by_values = classes(latents, labels, sae.config.num_latents)
        loss, to_values = loss + term / variance, to_values + by_values / variance
    if sae.config.activation == "relu":
        to_values *= latents.values > 0
    _sum_up(sae, latents, to_values, rounded, to_output, room.cast(to_output, "to output", rows))
    if auxk and dead is not None and dead.any():
        loss = loss + _add_auxk(sae, pre, centered, residual, variance, dead.nonzero().squeeze(1), auxk)
    _join_and_project(sae)
    return loss, latents


def _sum_up(
    sae: TopKSAE, latents: Latents, to_values: Tensor, centered: Tensor, to_output: Tensor, rows: Tensor
) -> None:
    """Set the gradients from ``to_values``, the derivatives by the code, and ``to_output``, those by the output.

    ``rows`` is ``to_output`` in the dtype of ``centered``, which is ``x - b_dec``.
    """
    places = by_latent(latents.indices, sae.config.num_latents)
    _set_gradient(sae.W_dec, sum_by_latent(places, latents.values, rows))
    _set_gradient(sae.encoder.weight, sum_by_latent(places, to_values, centered))
    to_bias = F.embedding_bag(places.order, to_values.reshape(-1, 1), places.starts, mode="sum")
    sae.encoder.bias.grad = to_bias.squeeze(1)
    # The bias is added to the output and subtracted from the encoder's input.
    sae.b_dec.grad = to_output.sum(0) - sae.encoder.bias.grad @ sae.encoder.weight


def _join_and_project(sae: TopKSAE) -> None:
    """Sum the gradients over all processes, and remove the part parallel to the decoder's rows."""
    for parameter in sae.parameters():
        total(gradient_of(parameter))
    to_decoder = gradient_of(sae.W_dec)
    own = torch.arange(len(to_decoder), device=to_decoder.device)[:, None]
    to_decoder.addcmul_(_products(to_decoder, own, sae.W_dec), sae.W_dec, value=-1)


def _products(vectors: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Return the inner products ``[batch, k]`` of each vector ``[batch, d]`` with the k rows of ``table`` ``[n, d]``
    at its ``indices`` ``[batch, k]``."""
    batch, k = indices.shape
    listed, starts = indices.flatten(), torch.arange(0, batch * k + 1, k, device=indices.device)
    products: Tensor
    if vectors.device.type == "cpu":  # a matrix product, at the places of a sparse matrix only
        _expect_beta()
        own = torch.sparse_csr_tensor(
            starts, listed, vectors.new_zeros(batch * k), (batch, len(table)), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(own, vectors, table.T, beta=0).values()
    else:  # the derivative of embedding_bag by its weights is this product
        bags = torch.arange(batch, device=indices.device).repeat_interleave(k)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors, table, listed, starts[:-1], bags, 0
        )
    return products.view(batch, k)


@functools.cache
def _expect_beta() -> None:
    """Suppress torch's warning that its sparse matrices are in beta, which it shows once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def _add_auxk(
    sae: TopKSAE, pre: Tensor, centered: Tensor, residual: Tensor, variance: Tensor, dead: Tensor, auxk: float
) -> Tensor:
    """Add the gradients of AuxK and return its share of the loss.

    The computation is dense over the dead latents, in the dtype of the pre-activations ``pre`` ``[batch, n]``.
    ``centered`` is ``x - b_dec``, ``residual`` is ``x - x̃``, ``dead`` int64 ``[count]``.
    """
    codes = pre.gather(1, dead.expand(len(pre), -1))  # several times as fast as index_select
    decoder, half_width = sae.W_dec[dead].to(pre.dtype), centered.shape[1] // 2
    if sae.config.activation == "relu":
        codes.relu_()
    if half_width < len(dead):
        chosen = largest_above_zero(codes.abs() if sae.config.activation == "abs" else codes, half_width)[1]
        codes = torch.zeros_like(codes).scatter_(1, chosen, codes.gather(1, chosen))
    error = (codes @ decoder).to(residual.dtype).sub_(residual)
    scale = auxk * min(1.0, len(dead) / half_width) / variance
    loss: Tensor = scale * torch.linalg.vector_norm(error).square()

    to_guess = error.mul_(2 * scale).to(pre.dtype)
    to_codes = (to_guess @ decoder.T).mul_(codes != 0)
    to_bias = to_codes.sum(0, dtype=residual.dtype)
    for parameter, gradient in (
        (sae.encoder.weight, to_codes.T @ centered.to(pre.dtype)),
        (sae.encoder.bias, to_bias),
        (sae.W_dec, codes.T @ to_guess),
    ):
        gradient_of(parameter).index_add_(0, dead, gradient.to(residual.dtype))
    gradient_of(sae.b_dec).sub_(to_bias @ sae.encoder.weight[dead])
    return loss


def _set_gradient(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:  # allocating memory takes longer than copying
        parameter.grad.copy_(gradient)


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter, typed as a Tensor: it must be set."""
    return cast("Tensor", parameter.grad)
