"""How a run is trained: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Everything about training that is neither the network, the recipe nor the data.

    Args:
        epochs: passes over the training data, all phases of the recipe together.
        batch_size: images of one optimizer step, over all processes and micro-batches.
        lr: peak learning rate of the weights.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        weight_decay: L2 penalty on kernels and matrices only.
        quantizer_lr: factor on lr for steps, ranges and thresholds.
        helper_lr: learning rate of helpers; by default lr.
        schedule: cosine to zero, step (a tenth at each milestone) or constant; anew in each phase.
        milestones: of step, as fractions of a phase.
        warmup_steps: steps of linear warm-up in each phase; at most a tenth of it is used.
        clip_grad: largest gradient norm of the trained parameters; None does not clip.
        accumulate: micro-batches that make one optimizer step.
        ema: decay of an exponential moving average of weights and steps, kept apart; None keeps none.
        bn_batches: training batches that re-estimate batch norm at the end; 0 keeps the running averages.
        precision: fp32, or bf16 for automatic mixed precision.
        device: auto, cpu or cuda.
        compile: compile the objective.
        channels_last: keep images and kernels in that memory format.
        processes: processes that must take part; fewer is an error. None takes what the launcher started.
        seed: of the data order, augmentation and dropout.
        deterministic: ask PyTorch for deterministic algorithms.
        checkpoint_seconds: time between checkpoints; the end of an epoch makes one too.
        evaluate_every: epochs between evaluations; the last one always ends with one.
        gradient_shares: steps in each phase that measure the share of every loss term in the gradient; 0 is none.
        max_bad_steps: steps in a row with a non-finite loss or gradient that end the run.
        tensorboard: write TensorBoard events beside the metrics; --no-tensorboard does not.
    """

    epochs: float = 3
    batch_size: int = 128
    lr: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    quantizer_lr: float = 1.0
    helper_lr: float | None = None
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_steps: int = 100
    clip_grad: float | None = None
    accumulate: int = 1
    ema: float | None = None
    bn_batches: int = 50
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    channels_last: bool = False
    processes: int | None = None
    seed: int = 0
    deterministic: bool = False
    checkpoint_seconds: float = 60.0
    evaluate_every: int = 1
    gradient_shares: int = 0
    max_bad_steps: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "max_bad_steps", "evaluate_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in (
            *("weight_decay", "warmup_steps", "bn_batches", "checkpoint_seconds", "quantizer_lr", "helper_lr"),
            "gradient_shares",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:  # NaN included
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be positive or None, got {self.processes}")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "step", "constant")),
            ("precision", ("fp32", "bf16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, got {self.ema}; 0.999 is usual")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ValueError(f"clip_grad must be positive or None, got {self.clip_grad}")
        if any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones must be fractions of a phase between 0 and 1, got {self.milestones}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}"
            )
