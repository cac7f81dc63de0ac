"""Binary residual blocks: a shortcut around every 3x3 convolution, and a small float branch beside it.

The block is Bi-Real Net's (Liu et al., ECCV 2018, arXiv 1811.01335). The branch is the Squeeze-and-Interaction of DGRL
(Ye et al., arXiv 2007.05223): that there is one, and that it is small, is in the abstract; everything else about it is
a reconstruction.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from .streams import INPUT_STREAM, OUTPUT_STREAM

Branch = Literal["bottleneck", "squeeze", "grouped"]
Activation = Literal["none", "prelu"]
GROUPS = 16
"""Of the grouped branch; fewer where fewer than four channels would be left in each."""
LEAST_WIDTH = 4
"""Channels inside a branch where no reduction is asked for: one ReLU alone, as 16/16 gives, may never open."""
_REDUCTION = {"bottleneck": 4, "squeeze": 16}
_EXTRAS = ("aa", "se", "drop_block", "drop_path")


class FloatConv2d(nn.Conv2d):
    """A convolution that stays in full precision: ``quantize`` leaves subclasses alone."""


class BiRealBlock(nn.Module):
    """Two 3x3 convolutions, each with a shortcut around it.

    x' = act( BN(conv1(x)) + S(x) + SI1(x) )          act: PReLU, or nothing
    y  = act( BN(conv2(x')) + x' + SI2(x') )

    A quantized convolution takes the sign of its input and of its weight itself, and pads zeros after the sign, as the
    public Bi-Real and ReActNet networks do. The names are those of the residual block that it replaces.

    Args:
        conv1, bn1, conv2, bn2: of the block that it replaces, quantized or not.
        shortcut: S, the identity or what brings ``x`` to the shape of ``x'``.
        activation: behind each addition.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        bn1: nn.Module,
        conv2: nn.Conv2d,
        bn2: nn.Module,
        shortcut: nn.Module,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.shortcut = conv1, bn1, shortcut
        self.branch1: nn.Module | None = None
        self.act1 = _activation(activation, conv1.out_channels)
        self.conv2, self.bn2 = conv2, bn2
        self.branch2: nn.Module | None = None
        self.act2 = _activation(activation, conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W to N x C_out x H/stride x W/stride."""
        y = self.bn1(self.conv1(x)) + self.shortcut(x)
        x = self.act1(y if self.branch1 is None else y + self.branch1(x))
        y = self.bn2(self.conv2(x)) + x
        return cast(Tensor, self.act2(y if self.branch2 is None else y + self.branch2(x)))


class _Shuffle(nn.Module):
    """ShuffleNet's channel shuffle: what ``groups`` kept apart meets behind it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def bireal(
    model: nn.Module,
    activation: Activation = "none",
    branch: Branch | None = None,
    reduction: int | None = None,
    float_shortcut: bool = True,
) -> nn.Module:
    """A copy of a residual network with a shortcut around every 3x3 convolution, weights kept; see ``rewrite``.

    Made before ``quantize``, it is a network like any other, which every recipe trains:
    ``quantize(bireal(teacher), 1, 1)``. Down-sampling shortcuts and branches stay float, as in the papers. The
    shortcuts are a quarter of a binary ResNet-18's file; with 8 bits they take a quarter of that:
    ``quantize(bireal(teacher, float_shortcut=False), 1, 1, rules=[Rule("*.shortcut.conv", 8, 8, "lsq")])``.

    Args:
        model: with ResNet's basic blocks (ours, timm's, torchvision's); float or quantized.
        activation: behind each addition and behind the stem, ``"prelu"`` (slope 0.25 for each channel) or ``"none"``.
        branch: see ``make_branch``; None adds none.
        reduction: of the branch's channels.
        float_shortcut: whether the 1x1 convolutions of down-sampling shortcuts stay float; False makes them layers like
            any other, which want a rule of their own in a network of one bit.

    Raises:
        ValueError: there is no basic block, or one that holds more than two convolutions and a shortcut.

    >>> from fewbits.models import build
    >>> [type(part).__name__ for part in bireal(build("resnet20", num_classes=10)).layer2[0].shortcut]
    ['AvgPool2d', 'FloatConv2d', 'BatchNorm2d']
    """
    model = copy.deepcopy(model)
    rewrite(model, activation, branch, reduction, float_shortcut)
    return model


def rewrite(
    model: nn.Module,
    activation: Activation | None = None,
    branch: Branch | None = None,
    reduction: int | None = None,
    float_shortcut: bool = True,
) -> None:
    """Turn each basic block of ``model`` into a ``BiRealBlock``, in place.

    Convolutions (with their quantizers) and batch norms move over. Down-sampling becomes AvgPool2, a float 1x1
    convolution and BN: a projection keeps its weights; option A's zero-padding becomes the convolution that does the
    same, its new channels repeat the old ones with a BN gain of zero. The stem loses its ReLU too, behind which every
    sign is +1: ``activation`` takes its place.

    Args:
        model: see ``bireal``. One that has these blocks already keeps them, and gets the branch that it lacks.
        activation: see ``bireal``; None means "none", or what is there already.
        branch: see ``make_branch``.
        reduction: of the branch's channels.
        float_shortcut: see ``bireal``; not read where the blocks are there already.

    Raises:
        ValueError: see ``bireal``; or the blocks are there already, with another activation or another branch.
    """
    for name, value, kind in (("activation", activation, Activation), ("branch", branch, Branch)):
        if value is not None and value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    if binary_blocks(model):
        _check_activation(model, activation)
    else:
        _replace_blocks(model, activation or "none", FloatConv2d if float_shortcut else nn.Conv2d)
    if branch is not None:
        for block in binary_blocks(model):
            if block.branch1 is not None or block.branch2 is not None:
                raise ValueError(f"branch={branch!r}: the blocks have a branch already; leave one of the two out")
            place = block.conv1.weight.device
            conv = block.conv1
            stride = int(conv.stride[0])
            block.branch1 = make_branch(branch, conv.in_channels, conv.out_channels, stride, reduction).to(place)
            conv = block.conv2
            block.branch2 = make_branch(branch, conv.in_channels, conv.out_channels, 1, reduction).to(place)


def binary_blocks(model: nn.Module) -> list[BiRealBlock]:
    """The double-shortcut blocks of ``model``, in order."""
    return [module for module in model.modules() if isinstance(module, BiRealBlock)]


def make_branch(
    kind: Branch, in_channels: int, out_channels: int, stride: int = 1, reduction: int | None = None
) -> nn.Module:
    """A Squeeze-and-Interaction branch (reconstruction), float; it gives zero at the start.

    * ``"bottleneck"`` (A): 1x1 to C/r, BN, ReLU ("squeeze"); 3x3 with the stride, BN, ReLU ("interaction"); 1x1, BN;
      r = 4. About 10 % of a binary ResNet-18's parameters, and more bits than the whole network without it.
    * ``"squeeze"`` (B): mean over the image, C/r, ReLU, C_out, the same at every pixel, added (no gate); r = 16. About
      14 % of the bits (7 % with r = 32).
    * ``"grouped"`` (C): 1x1 in 16 groups, BN, ReLU, channel shuffle, depthwise 3x3 with the stride, BN. About 11 % of
      the bits.

    Args:
        kind: which.
        in_channels: C.
        out_channels: C_out.
        stride: of the convolution that it stands beside.
        reduction: r, for the first two; by default as above, at least four channels staying.
    """
    if kind not in get_args(Branch):
        raise ValueError(f"branch must be one of {', '.join(get_args(Branch))}, got {kind!r}")
    if reduction is not None and (kind == "grouped" or reduction < 1):
        raise ValueError(f"reduction must be at least 1, and is there for bottleneck and squeeze; got {reduction}")
    if kind == "grouped":
        groups = max(1, min(GROUPS, in_channels // 4, out_channels // 4))
        layers: dict[str, nn.Module] = {
            "squeeze": FloatConv2d(in_channels, out_channels, 1, groups=groups, bias=False),
            "bn1": nn.BatchNorm2d(out_channels),
            "relu1": nn.ReLU(),
            "shuffle": _Shuffle(groups),
            "expand": FloatConv2d(out_channels, out_channels, 3, stride, 1, groups=out_channels, bias=False),
            "bn2": nn.BatchNorm2d(out_channels),
        }
    else:
        inner = max(1, in_channels // reduction) if reduction else max(LEAST_WIDTH, in_channels // _REDUCTION[kind])
        if kind == "squeeze":
            layers = {
                "pool": nn.AdaptiveAvgPool2d(1),
                "squeeze": FloatConv2d(in_channels, inner, 1),
                "relu1": nn.ReLU(),
                "expand": FloatConv2d(inner, out_channels, 1),
            }
        else:
            layers = {
                "squeeze": FloatConv2d(in_channels, inner, 1, bias=False),
                "bn1": nn.BatchNorm2d(inner),
                "relu1": nn.ReLU(),
                "interact": FloatConv2d(inner, inner, 3, stride, 1, bias=False),
                "bn2": nn.BatchNorm2d(inner),
                "relu2": nn.ReLU(),
                "expand": FloatConv2d(inner, out_channels, 1, bias=False),
                "bn3": nn.BatchNorm2d(out_channels),
            }
    branch = nn.Sequential(OrderedDict(layers))
    last = branch[-1]
    assert isinstance(last, nn.BatchNorm2d | nn.Conv2d)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return branch


def _activation(kind: Activation, channels: int) -> nn.Module:
    return nn.PReLU(channels) if kind == "prelu" else nn.Identity()


def _check_activation(model: nn.Module, activation: Activation | None) -> None:
    there = "prelu" if isinstance(binary_blocks(model)[0].act1, nn.PReLU) else "none"
    if activation not in (None, there):
        raise ValueError(f"activation={activation!r}: the blocks are there already, with {there!r}; leave it out")


def _replace_blocks(model: nn.Module, activation: Activation, shortcut: type[nn.Conv2d]) -> None:
    blocks = list(_basic_blocks(model))
    if not blocks:
        raise ValueError(
            f"model {type(model).__name__} has no residual block of two 3x3 convolutions (conv1, bn1, conv2, bn2); "
            "double shortcuts are there for ResNets with basic blocks, such as resnet20, resnet18 or timm:resnet18"
        )
    if any(part in (INPUT_STREAM, OUTPUT_STREAM) for name, _ in model.named_modules() for part in name.split(".")):
        raise ValueError(
            "the student's residual streams are quantized, and its blocks are to be rewritten; quantize with "
            "residual=None (--residual none; the default at 1/1), or rewrite before: quantize(bireal(model), ...)"
        )
    for name, block in blocks:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _binary_block(name, block, activation, shortcut))
    for name, module in list(model.named_children()):
        if isinstance(module, nn.ReLU):
            channels = cast(nn.Conv2d, blocks[0][1].get_submodule("conv1")).in_channels
            setattr(model, name, _activation(activation, channels).to(next(model.parameters()).device))
    model.train(model.training)


def _basic_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        convs = [parts.get("conv1"), parts.get("conv2")]
        if (
            all(isinstance(c, nn.Conv2d) and c.kernel_size == (3, 3) and c.groups == 1 for c in convs)
            and {"bn1", "bn2"} <= parts.keys()
            and "conv3" not in parts
            and (hasattr(module, "shortcut") or hasattr(module, "downsample"))
        ):
            yield name, module


def _binary_block(name: str, block: nn.Module, activation: Activation, shortcut: type[nn.Conv2d]) -> BiRealBlock:
    for extra in _EXTRAS:
        if not isinstance(getattr(block, extra, None), nn.Identity | None):
            raise ValueError(f"block {name} has {extra!r}, which a block with double shortcuts has no place for")
    conv1, bn1, conv2, bn2 = (block.get_submodule(part) for part in ("conv1", "bn1", "conv2", "bn2"))
    assert isinstance(conv1, nn.Conv2d)
    assert isinstance(conv2, nn.Conv2d)
    old = getattr(block, "shortcut", getattr(block, "downsample", None))
    rewritten = BiRealBlock(conv1, bn1, conv2, bn2, _shortcut(conv1, old, shortcut), activation)
    return rewritten.to(conv1.weight.device)


@torch.no_grad()
def _shortcut(conv1: nn.Conv2d, old: nn.Module | None, kind: type[nn.Conv2d]) -> nn.Module:
    """AvgPool2, a 1x1 convolution and BN, where the shape changes."""
    stride, num_in, num_out = int(conv1.stride[0]), conv1.in_channels, conv1.out_channels
    if stride == 1 and num_in == num_out:
        return nn.Identity()
    conv, bn = kind(num_in, num_out, 1, bias=False), nn.BatchNorm2d(num_out)
    learned = [m for m in old.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)] if old is not None else []
    if learned:
        conv.weight.copy_(cast(nn.Conv2d, learned[0]).weight)
        bn.load_state_dict(learned[1].state_dict())
    else:
        pad = (num_out - num_in) // 2
        kept = torch.arange(num_out)
        conv.weight.zero_()
        conv.weight[kept, (kept - pad) % num_in] = 1.0
        bn.weight[:pad] = bn.weight[pad + num_in :] = 0.0
    layers: dict[str, nn.Module] = {"conv": conv, "bn": bn}
    if stride > 1:
        # An odd map is rounded up, as the 3x3 convolution beside it does.
        is_odd = {"ceil_mode": True, "count_include_pad": False}
        layers = {"pool": nn.AvgPool2d(stride, stride, **is_odd), **layers}
    return nn.Sequential(OrderedDict(layers))
