"""Deltas to packets and back. `pipeline` is the entrance; see design.md §6."""

from __future__ import annotations

from nebula.wan.codec.pipeline import Encoder, Pipeline, decode

__all__ = ["Encoder", "Pipeline", "decode"]
