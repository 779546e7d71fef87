"""A small mixture of experts that learns Python, on two clusters joined by a slow link.

    nebula run trainers/code_moe.py --clusters clusters/laptop.yaml

Data: the Python standard library of this interpreter, so nothing is downloaded. Each cluster trains on its own
modules; what it learned crosses the link once a round, in two bits per parameter each way.
Change anything from the command line: `--set rounds=4 --set optimizer.lr=1e-3`.
"""

from __future__ import annotations

from nebula.config import AdamW, Adaptive, Codec, Data, Model, Nesterov, Run, Wan


def recipe() -> Run:
    two_bits = Codec(steps=(Adaptive(bits=2.0),))
    return Run(
        name="code-moe",
        model=Model(
            vocab=2048, layers=4, dim=128, heads=4, kv_heads=4, ffn_dim=192, experts=8, top_k=2, dense_layers=1
        ),
        data=Data(path="stdlib", partition="documents", seq_len=256),
        optimizer=AdamW(lr=4e-3, warmup=20),
        outer=Nesterov(lr=0.9, momentum=0.6),  # 0.9 of momentum needs more rounds than these to pay
        rounds=12,
        inner_steps=20,
        fragments=2,
        wan=Wan(up=two_bits, down=two_bits),
        prompt="def ",
    )
