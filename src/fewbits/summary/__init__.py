"""What a network is made of: bits, shapes, costs and bytes by layer, and what stayed float and why."""

from .rows import Grid, LayerRow, OtherRow, ProductRow, StreamRow, Summary, Totals
from .summarize import summarize

__all__ = ["Grid", "LayerRow", "OtherRow", "ProductRow", "StreamRow", "Summary", "Totals", "summarize"]
