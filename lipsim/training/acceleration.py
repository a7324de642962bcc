"""How a stage runs its encoder in training. Evaluation and certification never change with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from lipsim.layers import ExplicitConv2d, ExplicitLinear
from lipsim.layers.encoder import CheckpointingEncoder
from lipsim.utils.errors import LipsimError


@dataclass(frozen=True)
class Acceleration:
    """Options that change speed and memory of a training step, not what it computes.

    ``benchmarks/README.md`` tells what each is worth. Half precision is the trainer's: ``--trainer.precision
    bf16-mixed`` trains under autocast, and is off wherever something is certified.

    Attributes:
        channels_last: store images with their channels innermost; convolutions on CPUs and tensor cores prefer that.
        checkpoint: keep the activations of about √n of n layers, or of teachers the input of each block, and compute
            the others again in the backward pass.
        compile: ``torch.compile`` the encoder; the first steps of each batch shape are slow.
    """

    channels_last: bool = False
    checkpoint: bool = False
    compile: bool = False

    def wrap(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        """A function that runs the encoder in this way; it shares the parameters.

        Raises:
            ValueError: activation checkpointing of an encoder that is no sequence of layers, or has layers of other
                packages, whose weights iterate a step further each time they are derived.
        """
        keeps_its_own = isinstance(encoder, CheckpointingEncoder)
        if isinstance(encoder, CheckpointingEncoder):
            encoder.set_grad_checkpointing(self.checkpoint)
        in_segments = self.checkpoint and not keeps_its_own
        layers = list(_leaves(encoder))
        if in_segments and len(layers) == 1:
            raise LipsimError(f"expected a sequence of layers to checkpoint, got one {type(layers[0]).__name__}")
        foreign = [type(m).__name__ for m in encoder.modules() if isinstance(m, (ExplicitConv2d, ExplicitLinear))]
        if in_segments and foreign:
            raise LipsimError(f"cannot checkpoint {foreign[0]}: its weight would not be derived a second time alike")
        segments = max(1, round(math.sqrt(len(layers))))

        def run(x: Tensor) -> Tensor:
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            features: Tensor = (
                checkpoint_sequential(layers, segments, x, use_reentrant=False) if in_segments else encoder(x)
            )
            return features

        return torch.compile(run) if self.compile else run


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested sequences, in order."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child in module._modules.values():
            assert child is not None
            yield from _leaves(child)
    else:
        yield module
