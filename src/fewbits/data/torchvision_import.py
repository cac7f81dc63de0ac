"""Importing torchvision where its C++ operators were built for another torch than the one that is installed."""

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def define_missing_operators() -> torch.library.Library:
    """The two schemas without which such a torchvision does not import; they have no implementation.

    The library is kept by the cache: its operators live as long as it does.
    """
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    logger.warning(
        "torchvision does not match torch %s, so its C++ operators (nms, roi_align) are missing; classification "
        "works. A matching pair of wheels ends this warning",
        torch.__version__,
    )
    return library


def import_torchvision() -> ModuleType:
    """Returns torchvision, with its classification models and data sets usable.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        define_missing_operators()
        import torchvision
    return torchvision
