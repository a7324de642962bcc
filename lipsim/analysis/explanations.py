"""Whether explanations of colliding images agree: integrated gradients and Grad-CAM by captum, ``lipsim[explain]``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipsim.analysis.collisions import output_of, step_of_length
from lipsim.attacks.projections import sample_norm
from lipsim.utils.errors import LipsimError
from lipsim.utils.sampling import sample_normal


@dataclass(frozen=True)
class Agreement:
    """How much an explanation changes between colliding images.

    Attributes:
        explanation: which.
        change: ``(N,)``, ℓ2, relative to the explanation of the image.
        noise: ``(N,)``, the same for noise of the length of the collision.
    """

    explanation: str
    change: Tensor
    noise: Tensor


def last_spatial_layer(module: nn.Module, x: Tensor) -> str:
    """The last layer called whose output is a map ``(N, C, H, W)``, where Grad-CAM looks; of ViTs their patches.

    Raises:
        ValueError: there is none.
    """
    found: list[str] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[-2:]) > 1:
                found.append(name)

        return hook

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            module(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise LipsimError("Grad-CAM needs a convolution whose output has a height and a width, and there is none")
    return found[-1]


def explanations_agree(
    module: nn.Module, x: Tensor, x_adv: Tensor, *, steps: int = 32, patch: int = 16, seed: int = 0
) -> list[Agreement]:
    """Compare explanations of the class of each image, or of the largest feature, between colliding images.

    Four: the gradients averaged on the way from black; integrated gradients, which are these times the image; the same
    summed over patches; Grad-CAM at :func:`last_spatial_layer`. Where the first operator does not see the change, the
    gradients are the same, since they come back through it; times the image they are not, but their sums are wherever
    the change in one window has no part in the range of the adjoint.

    Args:
        module: images in [0, 1] to scores ``(N, C)``.
        x: images.
        x_adv: what collides with them.
        steps: of the integral.
        patch: side of the patches.
        seed: of the noise to compare with.

    Raises:
        ImportError: captum is not there.
        ValueError: no layer for Grad-CAM.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's import and its hooks
        from captum.attr import IntegratedGradients, LayerGradCam

        scores = output_of(module)
        with torch.no_grad():
            label = scores(x).argmax(1)
        layer = dict(module.named_modules())[last_spatial_layer(module, x)]
        gradients = IntegratedGradients(scores, multiply_by_inputs=False)
        cam = LayerGradCam(scores, layer)

        def explain(images: Tensor) -> dict[str, Tensor]:
            averaged = gradients.attribute(images, target=label, n_steps=steps, internal_batch_size=8).detach()
            integrated = averaged * images
            sums = torch.nn.functional.avg_pool2d(integrated.sum(1, keepdim=True), patch) * patch**2
            map_ = cam.attribute(images.clone().requires_grad_(True), target=label).detach()
            return {
                "averaged gradients": averaged,
                "integrated gradients": integrated,
                f"the same, summed over {patch} × {patch}": sums,
                "Grad-CAM": map_,
            }

        before, after = explain(x), explain(x_adv)
        noisy = explain(step_of_length(x, sample_normal(x, seed=seed), sample_norm(x_adv - x)))
    return [Agreement(name, _change(before[name], after[name]), _change(before[name], noisy[name])) for name in before]


def _change(before: Tensor, after: Tensor) -> Tensor:
    return sample_norm(after - before) / sample_norm(before).clamp(min=torch.finfo(before.dtype).tiny)
