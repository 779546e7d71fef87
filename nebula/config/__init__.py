"""Every knob a user may turn, as frozen keyword-only models. Imports neither torch nor ray.

`Run` is what a recipe returns (a program), `Federation` is what a cluster file states (facts), `Agreement` is what both
resolve to: canonical JSON with a digest, the only form that crosses a process boundary.
"""

from __future__ import annotations

from nebula.config.agreement import Agreement, Member, agree
from nebula.config.base import Config, Name, Positive, Share
from nebula.config.federation import Cluster, Endpoint, Federation, Link, Ray
from nebula.config.run import LM, SGD, AdamW, Data, Membership, Model, Run
from nebula.config.wan import (
    Adaptive,
    Blockwise,
    Codec,
    CodecStep,
    LowRank,
    Minifloat,
    Nesterov,
    OuterSGD,
    RandomK,
    TopK,
    Wan,
    Zstd,
    proposed_feedback,
    proposed_outer,
)

__all__ = [
    "LM",
    "SGD",
    "AdamW",
    "Adaptive",
    "Agreement",
    "Blockwise",
    "Cluster",
    "Codec",
    "CodecStep",
    "Config",
    "Data",
    "Endpoint",
    "Federation",
    "Link",
    "LowRank",
    "Member",
    "Membership",
    "Minifloat",
    "Model",
    "Name",
    "Nesterov",
    "OuterSGD",
    "Positive",
    "RandomK",
    "Ray",
    "Run",
    "Share",
    "TopK",
    "Wan",
    "Zstd",
    "agree",
    "proposed_feedback",
    "proposed_outer",
]
