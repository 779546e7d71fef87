"""The quantisers of installed libraries, called as they are. libraries.txt says how to install them.

bitsandbytes   nf4 with blocks of 64, and its 8-bit codebook with blocks of 256, both with fp32 scales
hivemind       what its averaging compresses a tensor to; bits are those of its message
torchft        what its quantised all-reduce sends (int8 where there is no GPU with fp8). Its kernels are for GPUs only:
               Triton's interpreter runs them here, a thousandth as fast, so on a few rows and without timing
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rivals import Parts, PerTensor
from torch import Tensor

from nebula.types import Slice
from nebula.wan.codec.measure import Coder, Tensors, quality


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """`kind`: "nf4", or "dynamic", which is the library's name for its 8-bit codebook."""

    functional: Any
    kind: str
    block: int

    def encode(self, x: Tensor) -> Parts:
        if self.kind == "nf4":
            codes, state = self.functional.quantize_4bit(x, blocksize=self.block, quant_type=self.kind)
        else:
            codes, state = self.functional.quantize_blockwise(x, blocksize=self.block)
        return {"codes": codes, "scales": state.absmax}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        f, codes, absmax = self.functional, parts["codes"], parts["scales"]
        if self.kind == "nf4":
            table = f.get_4bit_type(self.kind, device="cpu")
            facts = {"shape": torch.Size(shape), "dtype": torch.float32, "quant_type": self.kind}
            return f.dequantize_4bit(codes, f.QuantState(absmax, code=table, blocksize=self.block, **facts))
        return f.dequantize_blockwise(codes, absmax=absmax, blocksize=self.block).view(shape)


@dataclass(frozen=True, slots=True)
class Hivemind:
    compression: Any
    info: Callable[[Tensor], Any]

    def encode(self, tensors: Tensors) -> dict[Slice, Any]:
        return {where: self.compression.compress(x, self.info(x)) for where, x in tensors.items()}

    def decode(self, sent: Mapping[Slice, Any]) -> dict[Slice, Tensor]:
        return {where: self.compression.extract(message) for where, message in sent.items()}

    def sizes(self, sent: Mapping[Slice, Any]) -> dict[str, int]:
        codes = sum(torch.Size(where.shape).numel() for where in sent)
        return {"codes": codes, "message": sum(message.ByteSize() for message in sent.values()) - codes}


@dataclass(frozen=True, slots=True)
class TorchFT:
    quantization: Any

    def encode(self, x: Tensor) -> Parts:
        return {"codes": self.quantization.fused_quantize_into_fp8([x], 1)}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        x = torch.empty(shape)
        self.quantization.fused_dequantize_from_fp8([x], parts["codes"], 1)
        return x


def bitsandbytes() -> dict[str, Coder]:
    from bitsandbytes import functional

    kinds = {"nf4/64": ("nf4", 64), "8 bit/256": ("dynamic", 256)}
    return {name: PerTensor(BitsAndBytes(functional, *kind)) for name, kind in kinds.items()}


def hivemind() -> dict[str, Coder]:
    from hivemind.compression import CompressionInfo, Quantile8BitQuantization, Uniform8BitQuantization

    kinds = {"uniform u8": Uniform8BitQuantization(), "quantile u8": Quantile8BitQuantization()}
    return {name: Hivemind(kind, CompressionInfo.from_tensor) for name, kind in kinds.items()}


def torchft() -> dict[str, Coder]:
    from torchft import quantization

    return {"int8 per row": PerTensor(TorchFT(quantization))}


LIBRARIES: Mapping[str, tuple[str, Callable[[], dict[str, Coder]]]] = {
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "hivemind": ("hivemind", hivemind),
    "torchft": ("torchft-nightly", torchft),
}
"""Import name: distribution, and how to call it."""

SLOW = "torchft"


def present() -> tuple[dict[str, Coder], dict[str, str]]:
    """Coders by "library: format", of the libraries that can read what they wrote; and of every library its version, or
    why it is left out."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first of them imports Triton
    coders: dict[str, Coder] = {}
    notes = {}
    tiny = {Slice("w", (0, 0), (4, 256)): torch.linspace(-1, 1, 1024).view(4, 256)}
    for name, (distribution, make) in LIBRARIES.items():
        try:
            made = make()
            for coder in made.values():
                quality(coder, tiny)
        except Exception as error:  # whatever another one's library raises
            notes[name] = f"not run: {type(error).__name__}: {error}"
            continue
        coders |= {f"{name}: {form}": coder for form, coder in made.items()}
        notes[name] = version(distribution)
    return coders, notes
