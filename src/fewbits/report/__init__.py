"""Run folders side by side: one table for the terminal, one self-contained HTML page."""

from .headline import DISPENSABLE, comparison
from .page import report

__all__ = ["DISPENSABLE", "comparison", "report"]
