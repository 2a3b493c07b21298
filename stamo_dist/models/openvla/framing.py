"""Transforming upright camera frames into a policy's view, with the settings of released policies.

The policies of OpenVLA and OpenVLA-OFT for LIBERO were trained on frames that their authors turned by 180°. The
simulator's frames are upside down, so the result is a mirrored upright frame. A policy trained with random crops of
0.9 of the area needs a centre crop of the same area. Neither is recorded in a released folder.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from stamo_dist.errors import RunError
from stamo_dist.pixels import to_uint8, window
from stamo_dist.recipe.policy import Bounds

Picture = Image.Image | NDArray[np.uint8]
_FLIPS = {"upright": (1, 1), "mirrored": (1, -1), "flipped_vertically": (-1, 1), "rotated_180": (-1, -1)}
ORIENTATIONS = tuple(_FLIPS)


@dataclass(frozen=True)
class Framing:
    """How a policy sees frames that are upright."""

    orientation: str = "upright"  # one of ORIENTATIONS
    crop: float = 1.0  # share of the area that the centre crop keeps; 1 is all
    resize: int | None = None  # side to which a frame is brought before the crop, by JPEG and Lanczos

    def __post_init__(self) -> None:
        """Raises: RunError: Unknown orientation, or an invalid share."""
        if self.orientation not in ORIENTATIONS:
            raise RunError(f"--orientation {self.orientation}: must be one of {', '.join(ORIENTATIONS)}")
        if not 0 < self.crop <= 1:
            raise RunError(f"--crop {self.crop}: must be above 0 and at most 1, the share of the area that is kept")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Framing:
        """Read from a policy's settings; unchanged frames if they were written before this was recorded."""
        return cls(**settings.get("framing", {}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_sent(self) -> Framing:
        """The framing for frames that are already turned, as the official clients send them."""
        return replace(self, orientation="upright")

    def __call__(self, image: Picture) -> Picture:
        """One frame, PIL or uint8 (H, W, 3) → as the policy sees it; the same object if nothing changes."""
        if self == AS_IT_IS:
            return image
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        down, right = _FLIPS[self.orientation]
        pixels = np.ascontiguousarray(pixels[::down, ::right])
        if self.resize is not None and pixels.shape[:2] != (self.resize, self.resize):
            pixels = _resized(pixels, self.resize)
        return pixels if self.crop == 1 else centre_crop(pixels, self.crop)

    def said(self) -> str:
        """A description for the user."""
        parts = [self.orientation.replace("_", " ")]
        parts += [f"JPEG and Lanczos to {self.resize} px"] if self.resize else []
        parts += [f"centre crop of {self.crop:g} of the area" if self.crop < 1 else "no crop"]
        return ", ".join(parts)


AS_IT_IS = Framing()


def centre_crop(pixels: NDArray[np.uint8], area: float) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) → the middle `area` of it, a share, at the same height and (for a square) the same width."""
    side = math.sqrt(area)
    corner = (1 - side) / 2
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    cut = window(image, corner, corner, side, len(pixels))
    return np.ascontiguousarray(to_uint8(cut).permute(1, 2, 0).numpy())


def _resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    # As TensorFlow's codec, which the official evaluation uses: accurate encoding, fast decoding.
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=95, subsampling="4:2:0")
    unpacked = simplejpeg.decode_jpeg(packed.getvalue(), "RGB", fastdct=True, fastupsample=False)
    return np.array(Image.fromarray(unpacked).resize((side, side), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class FramingPreset:
    """How the authors of released policies run them."""

    about: str
    framing: Framing
    views: int
    parallel: bool  # OFT: predicts a chunk at once
    chunk: int
    bounds: Bounds
    actions: str = "openvla"  # format of its actions for the simulator
    benchmark: str | None = None
    cameras: tuple[str, ...] = ()  # of the benchmark, in the order of the views
    size: int = 256  # side of the frames before `framing`


_LIBERO = Framing("mirrored", 0.9, 224)
#: openvla/openvla: experiments/robot/{libero,bridge}; moojink/openvla-oft: experiments/robot/{libero,aloha}.
PRESETS: dict[str, FramingPreset] = {
    "openvla-libero": FramingPreset(
        "OpenVLA fine-tuned for a LIBERO suite", _LIBERO, 1, False, 1, "q99", benchmark="libero",
        cameras=("agentview",),
    ),
    "oft-libero": FramingPreset(
        "OpenVLA-OFT for a LIBERO suite", _LIBERO, 2, True, 8, "q99", benchmark="libero",
        cameras=("agentview", "eye_in_hand"),
    ),
    "openvla-bridge": FramingPreset(
        "openvla-7b on a WidowX as in Bridge", Framing("upright", 1.0, 224), 1, False, 1, "q99",
    ),
    "oft-aloha": FramingPreset("OpenVLA-OFT for ALOHA", Framing("upright", 0.9, 224), 3, True, 25, "minmax"),
}  # fmt: skip


def preset(name: str) -> FramingPreset:
    """Raises: RunError: There is none of that name."""
    if name not in PRESETS:
        raise RunError(f"--as {name}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def listed() -> str:
    """The list of presets, for messages."""
    return "; ".join(f"{name} ({found.about})" for name, found in PRESETS.items())


@dataclass(frozen=True)
class Use:
    """What the user states about a policy whose folder may not record it; None: the folder's value."""

    preset: str | None = None
    orientation: str | None = None
    crop: float | None = None
    views: int | None = None
    chunk: int | None = None
    bounds: str | None = None

    def __post_init__(self) -> None:
        """Raises: RunError: Unknown preset or orientation, or invalid share or bounds."""
        self.named  # noqa: B018
        Framing(self.orientation or "upright", 1.0 if self.crop is None else self.crop)
        if self.bounds not in (None, *get_args(Bounds)):
            raise RunError(f"--bounds {self.bounds}: must be one of {', '.join(get_args(Bounds))}")

    @property
    def named(self) -> FramingPreset | None:
        """Raises: RunError: There is none of that name."""
        return preset(self.preset) if self.preset is not None else None

    def framing(self, recorded: Framing | None, folder: str, sources: Sequence[str]) -> Framing:
        """`recorded`: the folder's framing, None if not recorded. `sources`: sources with statistics in the folder.

        Raises:
            RunError: Neither the folder nor the user states how frames are turned and cropped.
        """
        named = self.named
        found = named.framing if named else recorded
        if found is None and (self.orientation is None or self.crop is None):
            raise RunError(
                f"{folder}: does not say how it sees frames, and was not trained here; say it with --as "
                f"{' or '.join(fitting(sources)) or 'PRESET'}, or with --orientation and --crop. Presets: {listed()}"
            )
        changes = {key: value for key in ("orientation", "crop") if (value := getattr(self, key)) is not None}
        return replace(found or AS_IT_IS, **changes)

    def check_ours(self, path: str) -> None:
        """Raises: RunError: Options for released policies are given for a policy that was trained here."""
        given = {"as": self.preset, "views": self.views, "chunk": self.chunk, "bounds": self.bounds}
        if said := [f"--{name}" for name, value in given.items() if value is not None]:
            raise RunError(f"{', '.join(said)}: {path} was trained here and says it itself; leave it out")

    @property
    def actions_at_once(self) -> int | None:
        """Size of the action chunk; None: the folder's."""
        named = self.named
        return self.chunk or (named.chunk if named else None)

    def options(self) -> dict[str, Any]:
        """Fields of recipe.policy.PolicyConfig that it determines."""
        named = self.named
        found: dict[str, Any] = {"views": named.views, "bounds": named.bounds} if named else {}
        return found | {key: value for key in ("views", "bounds") if (value := getattr(self, key)) is not None}

    def check(self, head: bool, folder: str) -> None:
        """`head`: whether the folder has an action head.

        Raises:
            RunError: The preset belongs to another kind of policy.
        """
        named = self.named
        if named and named.parallel != head:
            has = (
                "has an action head, as OFT's do"
                if head
                else ("has no action head (action_head--*.pt), without which a download of OFT is incomplete")
            )
            fit = ", ".join(name for name, other in PRESETS.items() if other.parallel == head)
            raise RunError(f"--as {self.preset}: {folder} {has}; choose one of {fit}")


AS_RECORDED = Use()


def fitting(sources: Sequence[str]) -> list[str]:
    """Presets that the names of a released policy's statistics suggest."""
    return [
        name
        for name, found in PRESETS.items()
        if found.benchmark and any(source.startswith(found.benchmark) for source in sources)
    ]
