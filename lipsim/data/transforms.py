"""From image files to tensors in [0, 1]."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from lipsim import certificates
from lipsim.certificates.numbers import check_count
from lipsim.data.bit_depth import (
    DECODER_ERRORS,
    FORMATS,
    DeepImage,
    ImageTooLargeError,
    UnsupportedImageError,
    check_pixels,
    decode,
    orientation,
    read_in_full,
    upright,
)
from lipsim.data.framing import FILL, Frame, frame_of
from lipsim.utils.checks import check_range
from lipsim.utils.errors import LipsimError
from lipsim.utils.paths import user_path

RESIZES = ("float", "pil")


class UnreadableImageError(LipsimError):
    """An image file is there, but is damaged or of a kind that cannot be read."""


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image | DeepImage:
    """Read and decode an image file, or decode its ``content`` where that is read already; no digit is dropped.

    Returns:
        A PIL image, or a :class:`lipsim.data.bit_depth.DeepImage` where a file has what that cannot hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, or truncated, its values cannot be read in full, or it has more pixels than the
            limit.
    """
    if content is None and user_path(path).is_dir():
        raise LipsimError(f"expected an image file, got the folder {path}")
    try:
        content = user_path(path).read_bytes() if content is None else content
        if not content:
            raise EOFError("the file is empty")
        return decode(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {path}") from None
    except (UnsupportedImageError, ImageTooLargeError) as error:
        raise UnreadableImageError(f"cannot use the image {path}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"cannot read the image {path} (of none of the formats {', '.join(FORMATS)}); replace the file"
        ) from error
    except DECODER_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableImageError(f"cannot read the image {path} ({reason}); replace the file") from error


def load_image(path: str | Path, preprocess: Callable[..., Tensor], content: bytes | None = None) -> Tensor:
    """Read an image file and turn it into the input of a metric, ``(3, S, S)``; errors name the file.

    Args:
        path: the file.
        preprocess: from the decoded image to a tensor.
        content: the bytes of the file where they are read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or ``preprocess`` refuses it.
    """
    image = read_image(path, content)
    try:
        return preprocess(image)
    except ValueError as error:
        raise UnreadableImageError(f"cannot use the image {path}: {error}") from error
    except Exception as error:
        error.add_note(f"while preparing the image {path}")
        raise


def load_images(paths: Iterable[str | Path], preprocess: Callable[..., Tensor]) -> Tensor:
    """Image files as :func:`load_image` reads them, ``(N, 3, S, S)``; at least one."""
    return torch.stack([load_image(path, preprocess) for path in paths])


def missing_files(root: Path, names: Iterable[str]) -> list[str]:
    """Which of the relative paths ``names`` are not under ``root``, in their order.

    Each folder is listed once: on a network disk far cheaper than to ask for every file, and far cheaper than to learn
    of a missing one after hours of training.
    """
    listed: dict[Path, set[str]] = {}
    missing = []
    for name in names:
        path = root / name
        if path.parent not in listed:
            # No folder, and no link to nothing; of entries that are no links a listing says what they are.
            entries = list(os.scandir(path.parent)) if path.parent.is_dir() else []
            listed[path.parent] = {entry.name for entry in entries if entry.is_file()}
        if path.name not in listed[path.parent]:
            missing.append(name)
    return missing


def to_rgb(image: Image.Image | DeepImage) -> Image.Image:
    """An 8-bit RGB image, upright (EXIF orientation), with transparency composited over white."""
    image = image if isinstance(image, DeepImage) else read_in_full(image)
    if isinstance(image, DeepImage):
        return image.to_pil()
    image = upright(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((_gray16(image) * 255).round().astype(np.uint8))
    elif image.mode == "F":
        raise LipsimError("expected an image of 8 or 16 bits, got a floating-point one, whose range is unknown")
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_tensor(image: Image.Image | DeepImage) -> Tensor:
    """An image of any PIL mode or any depth as RGB ``(3, H, W)``, float32 in [0, 1]; no digit of a file is dropped."""
    image = image if isinstance(image, DeepImage) else read_in_full(image)
    if isinstance(image, DeepImage):
        return torch.from_numpy(image.values().astype(np.float32)).permute(2, 0, 1).expand(3, -1, -1).contiguous()
    if image.mode.startswith("I"):
        return torch.from_numpy(_gray16(upright(image))).expand(3, -1, -1).contiguous()
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float() / 255


def upright_size(image: Image.Image | DeepImage) -> tuple[int, int]:
    """Height and width of an image as :func:`to_tensor` shows it, turned as its EXIF orientation wants it."""
    if isinstance(image, Image.Image):
        image.load()  # as in upright
    turned = isinstance(image, Image.Image) and orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _gray16(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise LipsimError(
            f"expected gray values of 16 bits, got {values.min():g} to {values.max():g}, whose full range is unknown; "
            "convert them to 8 or 16 bits"
        )
    return (values / 65535).astype(np.float32)


def _from_array(array: np.ndarray) -> Image.Image:
    """A uint8 array as an image.

    Raises:
        ValueError: another dtype or shape.
    """
    if (
        not array.size
        or array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
    ):
        raise LipsimError(
            f"expected a uint8 array (H, W), (H, W, 3) or (H, W, 4), got {array.dtype} of shape {array.shape}; "
            "floats in [0, 1] come as a tensor (3, H, W): torch.from_numpy(array).permute(2, 0, 1)"
        )
    return Image.fromarray(array)


def _resized(channel: Tensor, size: tuple[int, int]) -> Tensor:
    """One channel ``(H, W)`` resized (bicubic, antialiased), not clamped."""
    height, width = size
    x = channel[None, None]
    if width > 1:
        return F.interpolate(x, size=size, mode="bicubic", antialias=True)[0, 0]
    # For a result one pixel wide, torch's pass over rows (2.14, CPU) sums up other pixels: a map of another norm.
    column = F.interpolate(x, size=(x.shape[2], 1), mode="bicubic", antialias=True)
    return F.interpolate(column.mT, size=(1, height), mode="bicubic", antialias=True)[0, 0].mT


class Preprocess:
    """An image of any shape to the input of a metric, ``(3, image_size, image_size)`` in [0, 1].

    It takes a PIL image, the path of a file, a uint8 array ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``, or a
    floating-point tensor ``(3, H, W)`` in [0, 1], through which it is differentiable.

    Args:
        image_size: side of the output.
        resize: "float" resizes the float image (bicubic, antialiased) and clamps, a map of known norm
            (:meth:`norm`), in float64 and then rounded to float32; "pil" resizes in 8 bits
            as DreamSim does, which rounds. The first is torchvision's resize of float tensors, the second its resize
            of PIL images. DreamSim and LipSim drop transparency and EXIF orientation, which :func:`to_rgb` heeds.
        framing: what of an image is seen, see :func:`lipsim.data.framing.frame_of`: "stretch", the whole image,
            whose aspect ratio is not kept; "center-crop", its centred square; "pad", the whole image with a mid-gray
            border, whose aspect ratio is kept; "tiles", as "stretch", to a square that the metric cuts into tiles
            (:class:`lipsim.metric.TiledMetric`). On square images the first three are the same.
        grid: of "tiles", how many there are along a side.

    Raises:
        ValueError: an unknown ``resize`` or ``framing``, a size below 1, or one that the grid does not divide.

    Example:
        >>> Preprocess(64)(np.zeros((300, 200, 3), dtype=np.uint8)).shape
        torch.Size([3, 64, 64])
        >>> print(f"{Preprocess(64, framing='pad').norm(300, 200):.4f}")  # of a change of the file's pixels
        0.2169
    """

    def __init__(self, image_size: int, resize: str = "float", framing: str = "stretch", grid: int = 1) -> None:
        if resize not in RESIZES:
            raise LipsimError(f"expected resize to be one of {', '.join(RESIZES)}, got {resize!r}")
        self.image_size = check_count("image_size", image_size)
        self.resize = resize
        self.framing, self.grid = framing, check_count("grid", grid)
        frame_of(framing, 1, 1, image_size)  # checks the framing
        if image_size % grid or (grid > 1 and framing != "tiles"):
            raise LipsimError(
                f"expected a grid of 1, or one of tiles that divides the image_size {image_size}, got a grid of {grid} "
                f"with the framing {framing!r}"
            )

    @property
    def way(self) -> str:
        """How images become a square, in a word: "float" or "pil", where they are not stretched as "float, pad".

        What is cut into tiles has been stretched.
        """
        return self.resize if self.framing in ("stretch", "tiles") else f"{self.resize}, {self.framing}"

    @property
    def label(self) -> str:
        """:attr:`way`, and the tiles where there are some: "float, tiles 2 × 2"."""
        return f"{self.way}, tiles {self.grid} × {self.grid}" if self.framing == "tiles" else self.way

    def frame(self, height: int, width: int) -> Frame:
        """What is seen of an image of this height and width, and where."""
        return frame_of(self.framing, height, width, self.image_size)

    def norm(self, height: int, width: int) -> float:
        """By how much a change of an RGB file of ``height`` × ``width`` grows at most in ℓ2: exact, rounded up.

        It is that of the resize of what is seen: what is cut off adds nothing, and a border does not change. Of "pil",
        which rounds, it is the norm of the resize without the rounding.
        """
        frame = self.frame(height, width)
        return certificates.resize_norm(frame.seen, frame.resized) if frame.seen != frame.resized else 1.0

    def original_radius(self, radius: float, height: int, width: int) -> float:
        """:func:`lipsim.certificates.original_radius` of a file of ``height`` × ``width``, for the resize "float".

        Raises:
            ValueError: the resize is "pil", which has no norm.
        """
        if self.resize != "float":
            raise LipsimError(
                "a resize in 8 bits rounds, so no radius in the file's own pixels follows from one behind it"
            )
        frame = self.frame(height, width)
        return certificates.original_radius(radius, frame.seen, frame.resized)

    def describe(self) -> dict[str, Any]:
        """How an image comes to the metric (JSON): framing, size and resize, fill of a border, grid of tiles."""
        described: dict[str, Any] = {
            "framing": self.framing,
            "image_size": self.image_size,
            "resize": self.resize,
        }
        if self.framing == "pad":
            described["fill"] = FILL
        if self.framing == "tiles":
            described["grid"] = [self.grid, self.grid]
        return described

    def __call__(self, image: Image.Image | DeepImage | str | Path | np.ndarray | Tensor) -> Tensor:
        """The image as ``(3, image_size, image_size)`` float32 in [0, 1].

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, or is none of the kinds above.
        """
        if isinstance(image, str | Path):
            return load_image(image, self)
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Image.Image | DeepImage | Tensor):
            raise LipsimError(
                "expected one image: a PIL image, a path, a uint8 array (H, W, 3) or a floating-point tensor "
                f"(3, H, W), got {type(image).__name__}; several are torch.stack([preprocess(x) for x in images])"
            )
        if isinstance(image, Tensor):
            return self._framed(self._checked(image))
        if self.resize == "pil":
            image = to_rgb(image)
            frame = self.frame(image.height, image.width)
            (height, width), (rows, columns) = frame.seen, frame.resized
            box = (frame.left, frame.top, frame.left + width, frame.top + height)
            resized = image.crop(box).resize((columns, rows), Image.Resampling.BICUBIC)
            return F.pad(to_tensor(resized), frame.border, value=FILL)
        return self._framed(to_tensor(image))

    def _framed(self, x: Tensor) -> Tensor:
        """``(3, H, W)`` in [0, 1] to the input of the metric, float32."""
        frame = self.frame(*x.shape[1:])
        height, width = frame.seen
        x = x[:, frame.top : frame.top + height, frame.left : frame.left + width]
        if frame.seen != frame.resized:
            # The norm of a resize in float32 is not that of the exact one, and radii in a file's own pixels divide by
            # it. Channel by channel, so that a large photograph takes no more memory than in float32.
            x = torch.stack([_resized(channel.double(), frame.resized) for channel in x]).clamp(0, 1)
        return F.pad(x.float(), frame.border, value=FILL)

    def _checked(self, x: Tensor) -> Tensor:
        """A tensor that is one image.

        Raises:
            ValueError: it is none, or is to be resized in 8 bits.
        """
        if x.ndim != 3 or x.shape[0] != 3:
            last = "; channels come first: x.permute(2, 0, 1)" if x.ndim == 3 and x.shape[2] == 3 else ""
            last = "; a batch goes image by image: preprocess(x[0])" if x.ndim == 4 else last
            last = "; gray becomes x.expand(3, -1, -1)" if x.ndim == 2 or (x.shape[0] == 1 and x.ndim == 3) else last
            raise LipsimError(f"expected one image (3, H, W), got a tensor of shape {tuple(x.shape)}{last}")
        if not x.dtype.is_floating_point:
            raise LipsimError(f"expected a floating-point image in [0, 1], got {x.dtype}; divide 8-bit images by 255")
        if not x.numel():
            raise LipsimError(f"expected an image with pixels, got a tensor of shape {tuple(x.shape)}")
        check_range(x[None])
        frame = self.frame(*x.shape[1:])
        if self.resize == "pil" and frame.seen != frame.resized:
            raise LipsimError(
                "resize 'pil' works in 8 bits, which a float image has not; give a PIL image, a path or a uint8 array"
            )
        return x.clamp(0, 1)

    def __repr__(self) -> str:
        grid = f", grid={self.grid}" if self.framing == "tiles" else ""
        return f"Preprocess(image_size={self.image_size}, resize={self.resize!r}, framing={self.framing!r}{grid})"


class CentredSquare:
    """PIL image to its centred square, as large as the short side, resized: ``(3, image_size, image_size)`` in [0, 1].

    What :class:`CentralCrop` of an image with that short side shows; here the square is cut out before it is resized,
    in eight bits, so that nothing outside it counts.

    Args:
        preprocess: how the square is resized, as a metric's has it. Whether an image is stretched, padded or cropped
            makes no difference to a square.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        framed = preprocess.framing in ("pad", "center-crop")
        self.preprocess = Preprocess(preprocess.image_size, preprocess.resize) if framed else preprocess

    def __call__(self, image: Image.Image | DeepImage) -> Tensor:
        rgb = to_rgb(image)
        side = min(rgb.size)
        left, top = ((length - side) // 2 for length in rgb.size)
        return self.preprocess(rgb.crop((left, top, left + side, top + side)))

    def __repr__(self) -> str:
        return f"CentredSquare({self.preprocess!r})"


class CentralCrop:
    """PIL image to its central pixels, ``(3, image_size, image_size)`` in [0, 1]; the aspect ratio is kept.

    Args:
        image_size: side of the output; a smaller image gets a black border.
        short_side: what the short side is resized to first (in float, bicubic, antialiased, clamped); None: the image
            is cropped as it is, the published view (Ghazanfari et al. 2024).

    Raises:
        ValueError: a size below 1; later, an image that is so narrow that it would have more pixels than the limit of
            :func:`lipsim.data.bit_depth.pixel_limit` with that short side.
    """

    def __init__(self, image_size: int, short_side: int | None = None) -> None:
        if image_size < 1 or (short_side is not None and short_side < 1):
            raise LipsimError(
                f"expected an image_size and a short_side of at least 1, got {image_size} and {short_side}"
            )
        self.image_size, self.short_side = image_size, short_side

    def __call__(self, image: Image.Image | DeepImage) -> Tensor:
        from torchvision.transforms.v2.functional import center_crop  # seconds to import, and only this needs it

        x = to_tensor(image)
        if self.short_side is not None and min(x.shape[1:]) != self.short_side:
            # The long side is rounded down, as torchvision's Resize has it.
            size = [self.short_side * side // min(x.shape[1:]) for side in x.shape[1:]]
            check_pixels(size[1], size[0], f"resized to a short side of {self.short_side}, ")  # of a line of pixels
            x = F.interpolate(x[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        cropped: Tensor = center_crop(x, [self.image_size, self.image_size])
        return cropped

    def frames_as(self, other: CentralCrop) -> bool:
        """Whether both show the same part of an image, at whatever size: what a student sees of a teacher's image."""
        if self.short_side is None or other.short_side is None:
            return (self.image_size, self.short_side) == (other.image_size, other.short_side)
        return self.image_size * other.short_side == other.image_size * self.short_side

    def __repr__(self) -> str:
        return f"CentralCrop(image_size={self.image_size}, short_side={self.short_side})"
