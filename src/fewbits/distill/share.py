"""How much each loss term says in the gradient: a term that says nothing proves nothing, whatever the accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .base import NetworkName
from .objective import Objective
from .terms import CrossEntropy


def gradient_shares(objective: Objective, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Norm of each term's gradient beside that of the cross-entropy, on one batch.

    share(k) = ||w_k dL_k/dθ|| / ||w_CE dL_CE/dθ||

    θ are the trainable parameters of the network that term k teaches, outside its head, which terms on features do not
    reach. The cross-entropy's own share is 1; the sum of its terms counts where there are several. Nothing changes: no
    ``.grad``, no buffer (batch norm's averages), no random state.

    Args:
        objective: of the phase at work, in the mode and at the precision that it trains in.
        images: N x C x H x W, normalised.
        labels: int64, N.

    Returns:
        The shares by the terms' names, 0 or more. A network that is not trained, or not by a cross-entropy with a
        gradient, has nothing to compare with: its terms are left out.
    """
    shares: dict[str, float] = {}
    with _as_it_was(objective):
        values, _ = objective.terms(images, labels)
        for network in sorted(objective._trained):
            parameters = _shared_parameters(objective, network)
            taught = {name: term for name, term in objective._names.items() if term.teaches == network}
            weighted = {name: term.weight * values[name] for name, term in taught.items()}
            labelled = [weighted[name] for name, term in taught.items() if isinstance(term, CrossEntropy)]
            whole = _gradient_norm(torch.stack(labelled).sum(), parameters) if labelled else 0.0
            if whole > 0:
                shares |= {name: _gradient_norm(value, parameters) / whole for name, value in weighted.items()}
    return shares


def _shared_parameters(objective: Objective, network: NetworkName) -> list[nn.Parameter]:
    head = objective.networks.anatomy(network).head
    named = objective.networks.network(network).named_parameters()
    return [p for name, p in named if p.requires_grad and not name.startswith(f"{head}.")]


def _gradient_norm(value: Tensor, parameters: list[nn.Parameter]) -> float:
    if not value.requires_grad:
        return 0.0
    # Typed as tensors, but None where a term does not reach a parameter.
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@contextlib.contextmanager
def _as_it_was(objective: Objective) -> Iterator[None]:
    """Put back what a forward pass in training mode changes: buffers and the random state."""
    buffers = list(objective.networks.buffers())
    kept = [buffer.detach().clone() for buffer in buffers]
    device = objective.networks.example.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        objective.forget_features()
