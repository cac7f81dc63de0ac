"""How a run is trained: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..checks import Checked, Inside, Limit, NonNegative, NonNegativeInt, Positive, PositiveInt

Seed = Annotated[int, Limit("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)]


@dataclass(frozen=True)
class Settings(Checked):
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
        teacher_precision: same, or bf16 for a frozen teacher alone, faster where the processor has bf16.
        device: auto, cpu or cuda.
        compile: compile the objective.
        channels_last: keep images and kernels in that memory format. By default where results need not be the same
            bits anyway and it is faster: compiled or bf16, with convolutions; the run says so.
        recompute: let the backward pass quantize again what is otherwise kept until then (--no-recompute): up to half
            the memory for 5 to 10 % of the time, the same results. A compiled objective always does what costs it no
            time; on a GPU it casts to bf16 again, too, on a processor it never does.
        checkpoint_blocks: run each residual block again in the backward pass instead of keeping what is inside: less
            memory, more time, the same results. Not with compile, which decides what it keeps.
        shard: split weights, gradients and momentum among the processes (FSDP) instead of keeping all in each (DDP).
        processes: processes that must take part; fewer is an error. None takes what the launcher started.
        seed: of the data order, augmentation and dropout.
        deterministic: ask PyTorch for deterministic algorithms.
        checkpoint_seconds: time between checkpoints; the end of an epoch makes one too.
        evaluate_every: epochs between evaluations; the last one always ends with one.
        gradient_shares: steps in each phase that measure the share of every loss term in the gradient; 0 is none.
        max_bad_steps: steps in a row with a non-finite loss or gradient that end the run.
        tensorboard: write TensorBoard events beside the metrics; --no-tensorboard does not.
    """

    epochs: Positive = 3
    batch_size: PositiveInt = 128
    lr: Positive = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: NonNegative = 1e-4
    quantizer_lr: NonNegative = 1.0
    helper_lr: NonNegative | None = None
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[Inside, ...] = (0.5, 0.75)
    warmup_steps: NonNegativeInt = 100
    clip_grad: Positive | None = None
    accumulate: PositiveInt = 1
    ema: Annotated[Inside, "0.999 is usual"] | None = None
    bn_batches: NonNegativeInt = 50
    precision: Literal["fp32", "bf16"] = "fp32"
    teacher_precision: Literal["same", "bf16"] = "same"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    channels_last: bool | None = None
    recompute: bool = True
    checkpoint_blocks: bool = False
    shard: bool = False
    processes: PositiveInt | None = None
    seed: Seed = 0
    deterministic: bool = False
    checkpoint_seconds: NonNegative = 60.0
    evaluate_every: PositiveInt = 1
    gradient_shares: NonNegativeInt = 0
    max_bad_steps: PositiveInt = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_blocks and self.compile:
            raise ValueError(
                "checkpoint_blocks is for steps that are not compiled, got checkpoint_blocks=True and compile=True: a "
                "compiled graph decides what it keeps; leave out one of the two"
            )
        for name, given in (("ema", self.ema is not None), ("gradient_shares", self.gradient_shares > 0)):
            if self.shard and given:
                raise ValueError(
                    f"{name} looks at whole weights in every step, which shard does not have, got "
                    f"{name}={getattr(self, name)!r} and shard=True; leave out one of the two"
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}"
            )
