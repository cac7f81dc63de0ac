"""Pure functions of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits_NC: Tensor, labels_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with the true labels.

    Args:
        logits_NC: scores of C classes.
        labels_N: int64, 0 to C - 1.
        label_smoothing: 0 to 1.

    Raises:
        TypeError: labels that are no whole numbers.
        ValueError: a label outside 0 .. C - 1 (not checked in a compiled graph, where it would wait for the device).
    """
    if labels_N.ndim == 1 and labels_N.is_floating_point():
        raise TypeError(f"labels must be int64, 0 to C - 1, got {labels_N.dtype}; convert them with labels.long()")
    if not torch.compiler.is_compiling() and labels_N.device.type == "cpu" and labels_N.numel():
        least, most = int(labels_N.min()), int(labels_N.max())
        if least < 0 or most >= logits_NC.shape[1]:
            raise ValueError(
                f"labels must lie in 0..{logits_NC.shape[1] - 1}, the network has {logits_NC.shape[1]} outputs, "
                f"got {least if least < 0 else most}"
            )
    return F.cross_entropy(logits_NC.float(), labels_N, label_smoothing=label_smoothing)


def kl_divergence(teacher_NC: Tensor, student_NC: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the batch.

    The factor T^2 keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        teacher_NC: logits of the fixed side.
        student_NC: logits of the side that learns, of the same shape.
        temperature: T, positive.

    Raises:
        ValueError: the temperature is not positive.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 0.0]])).item()
    0.0
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; 1 leaves the probabilities as they are")
    log_p = F.log_softmax(teacher_NC.float() / temperature, 1)
    log_q = F.log_softmax(student_NC.float() / temperature, 1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
