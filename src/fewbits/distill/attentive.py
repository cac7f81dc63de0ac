"""Attentive feature alignment of DTQ (Xie et al., ECCV 2020, section 3.2, with the factor of the authors' code).

Shape suffixes: N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn


def attended_distance(student_NCHW: Tensor, teacher_NCHW: Tensor, attention: Tensor | None = None) -> Tensor:
    """Squared distance of two maps, channel by channel, each channel with its own weight; mean over the batch.

    Forward:  (C / 2) (1 / N) sum_n sum_c a_nc ||F_s,nc - F_t,nc||^2, the inner norm over all H x W pixels
    Backward: d/dF_s = (C / N) a (F_s - F_t);  d/da_nc = (C / 2) (1 / N) ||F_s,nc - F_t,nc||^2

    Uniform attention a = 1 / C gives 0.5 ||F_s - F_t||^2 / N: the factor C / 2 of the authors' code, which Eq. 4 of the
    paper does not print. A weight on this loss means nothing without the factor and the division by N.

    Args:
        student_NCHW: maps that learn.
        teacher_NCHW: their targets, of the same shape.
        attention: N x C, or C for weights that all samples share; rows add up to 1. None is uniform.

    >>> maps = torch.ones(2, 3, 4, 4)
    >>> attended_distance(maps, torch.zeros_like(maps)).item()
    24.0
    >>> attended_distance(maps, torch.zeros_like(maps), torch.tensor([1.0, 0.0, 0.0])).item()
    24.0
    """
    distances_NC = (student_NCHW.float() - teacher_NCHW.float()).square().flatten(2).sum(2)
    if attention is None:
        return 0.5 * distances_NC.sum(1).mean()
    return 0.5 * distances_NC.shape[1] * (attention.float() * distances_NC).sum(1).mean()


class AttentiveTransfer(nn.Module):
    """Which channels of one tap matter, for each image: attention from the full-precision map (Eq. 3).

    Forward:  a = softmax over channels of w2 relu(w1 f_c) + b_c, f_c the H W pixels of channel c

    ``w1`` (H W -> H) and ``w2`` (H -> 1) have no bias and serve all channels of the tap; ``b``, one number a channel,
    starts at 0. Softmax runs over the channels: the authors' call without ``dim`` means dimension 1 there.

    It is trained to make the distance that it weights small, so nothing keeps it from looking at channels that agree
    already; the buffer ``entropy`` tells: of the last batch, 1 for uniform attention, 0 for a single channel.

    Args:
        num_channels: C.
        height: H; also the width of the hidden layer. Reconstruction where maps are not square: the authors' are.
        width: W.
    """

    entropy: Tensor
    reported: ClassVar[tuple[str, ...]] = ("entropy",)

    def __init__(self, num_channels: int, height: int, width: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.hidden = nn.Linear(height * width, height, bias=False)
        self.score = nn.Linear(height, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("entropy", torch.tensor(1.0))

    def forward(self, teacher_NCHW: Tensor) -> Tensor:
        """N x C, positive, rows add up to 1."""
        pixels_NCP = torch.flatten(teacher_NCHW.float(), 2)
        scores_NC = self.score(torch.relu(self.hidden(pixels_NCP))).squeeze(2).float() + self.bias
        log_attention_NC = torch.log_softmax(scores_NC, 1)
        attention_NC = log_attention_NC.exp()
        with torch.no_grad():
            entropy = -(attention_NC * log_attention_NC).sum(1).mean()
            self.entropy.copy_(entropy / math.log(max(self.num_channels, 2)))
        return attention_NC
