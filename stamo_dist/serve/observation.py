"""Observations of the clients' protocols → one checked form, which the policy computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stamo_dist.errors import DataError
from stamo_dist.models.policies import AnyPolicy
from stamo_dist.serve.limits import Limits
from stamo_dist.serve.wire import BadRequestError, Broken, numbers, said

#: Parts of the names of cameras at a robot's hand, which come after those that look at the scene.
_HAND = ("wrist", "hand", "gripper")


@dataclass(frozen=True)
class Moment:
    """One observation of a request, checked."""

    views: list[np.ndarray]
    instruction: str
    key: str
    proprio: np.ndarray | None
    listed: bool = False  # answer with a list of actions, as OFT's clients expect


class Observations:
    """Checks what clients send against what a policy wants."""

    def __init__(self, policy: AnyPolicy, key: str | None, limits: Limits):
        """`key`: the source of observations that name none."""
        self._policy, self._default, self._limits = policy, key, limits

    def openvla(self, given: Any, prefix: str = "") -> Moment:
        """OpenVLA's and OpenVLA-OFT's form, see `stamo_dist.serve`; `prefix` precedes its fields' names in errors.

        Raises:
            BadRequestError: A field is missing or wrong.
        """
        if not isinstance(given, Mapping):
            raise BadRequestError(prefix.rstrip(".") or "body", f"is {said(given)}, not a map")
        text = self._instruction(given, "instruction", prefix)
        key = self._key(given, prefix)
        views = self._views(_openvla_pictures(given, prefix, self._policy.cfg.views), f"{prefix}image", prefix)
        felt = {name: given[name] for name in ("proprio", "state") if name in given}
        return Moment(views, text, key, self._proprio(dict([*felt.items()][:1]), key, prefix), "full_image" in given)

    def openpi(self, given: Mapping[Any, Any]) -> Moment:
        """Openpi's form: prompt, `observation/…` or `images` and `state`.

        Raises:
            BadRequestError: A field is missing or wrong.
        """
        text = self._instruction(given, "prompt", "")
        key = self._key(given, "")
        inside = {n: v for n, v in given.items() if isinstance(n, str) and n.startswith("observation/")}
        pictures = {name: value for name, value in inside.items() if "image" in name or "rgb" in name}
        felt = {name: value for name, value in inside.items() if name not in pictures}
        if "observation/state" in felt:
            felt = {"observation/state": felt["observation/state"]}
        if not inside:
            pictures = _map(given, "images")
            felt = {"state": given["state"]} if "state" in given else {}
        views = self._views(self._in_order(pictures, key), "observation/image", "")
        return Moment(views, text, key, self._proprio(felt, key, ""))

    def vla_eval(self, given: Mapping[Any, Any]) -> Moment:
        """vla-eval's form: `images` by camera, `task_description`, `states` or `state`.

        Raises:
            BadRequestError: A field is missing or wrong.
        """
        text = self._instruction(given, "task_description", "")
        key = self._key(given, "")
        views = self._views(self._in_order(_map(given, "images"), key), "images", "")
        felt = {name: given[name] for name in ("states", "state") if name in given}
        return Moment(views, text, key, self._proprio(dict([*felt.items()][:1]), key, ""))

    def _instruction(self, given: Mapping[Any, Any], name: str, prefix: str) -> str:
        text, field = given.get(name), f"{prefix}{name}"
        if name not in given or (isinstance(text, str) and not text.strip()):
            raise BadRequestError(field, "is missing; say what the robot is to do")
        if not isinstance(text, str):
            raise BadRequestError(field, f"is {said(text)}; give a text that says what the robot is to do")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise BadRequestError(field, "holds half a character (a lone surrogate), which is no text") from None
        if size > self._limits.text:
            raise BadRequestError(field, f"has {size} bytes; {self._limits.text} at most")
        return text

    def _key(self, given: Mapping[Any, Any], prefix: str) -> str:
        name = given.get("unnorm_key")
        if name is not None and not isinstance(name, str):
            raise BadRequestError(f"{prefix}unnorm_key", f"is {said(name)}; give the name of a source")
        try:
            return self._policy.statistics.key(name or self._default)
        except DataError as error:
            raise BadRequestError(f"{prefix}unnorm_key", str(error)) from None

    def _views(self, pictures: Mapping[str, Any], missing: str, prefix: str) -> list[np.ndarray]:
        """The images in the order of the policy's views."""
        wanted = self._policy.cfg.views
        if not pictures:
            raise BadRequestError(missing, "is missing; give uint8 (H, W, 3)")
        views = [self._picture(picture, f"{prefix}{name}") for name, picture in pictures.items()]
        if len(views) != wanted:
            first = next(iter(pictures)).partition("[")[0].partition(".")[0]
            names = ", ".join(pictures)
            raise BadRequestError(f"{prefix}{first}", f"{len(views)} views ({names}), the policy looks at {wanted}")
        return views

    def _picture(self, picture: Any, field: str) -> np.ndarray:
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
            raise BadRequestError(field, f"is {said(picture)}; give uint8 (H, W, 3), written as an array")
        if picture.shape[2] != 3 and picture.shape[0] == 3:  # as openpi's clients for ALOHA send them
            picture = picture.transpose(1, 2, 0)
        if picture.shape[2] != 3:
            raise BadRequestError(field, f"is {said(picture)}; give uint8 (H, W, 3), written as an array")
        if not all(1 <= side <= self._limits.side for side in picture.shape[:2]):
            raise BadRequestError(field, f"has shape {picture.shape}; 1 to {self._limits.side} pixels a side")
        return np.ascontiguousarray(picture)

    def _in_order(self, pictures: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Pictures by camera → those of the policy's views: by the names it was trained with, else the scene first.

        A policy of one view is given the scene's where hand cameras come with it.
        """
        wanted, seen = self._policy.cfg.views, self._policy.statistics.seen.get(key)
        short = {name.removeprefix("images.").removeprefix("observation/"): name for name in pictures}
        if seen is not None and set(seen.cameras) <= set(short):
            return {short[camera]: pictures[short[camera]] for camera in seen.cameras}
        hand = [name for name in pictures if any(part in name for part in _HAND)]
        scene = [name for name in pictures if name not in hand]
        names = scene if wanted == 1 and scene else [*scene, *hand]
        return {name: pictures[name] for name in names}

    def _proprio(self, felt: Mapping[str, Any], key: str, prefix: str) -> np.ndarray | None:
        """Proprioception (P,), of one field, or of several that follow each other."""
        if not self._policy.cfg.proprio:
            return None
        if not felt:
            raise BadRequestError(f"{prefix}state", "is missing; this policy reads proprioception")
        size = len(self._policy.statistics.range(key, "proprio", self._policy.cfg.bounds))
        if len(felt) == 1:
            ((name, values),) = felt.items()
            return numbers(values, size, f"{prefix}{name}")
        parts = [numbers(v, np.size(v) if isinstance(v, np.ndarray) else 1, name) for name, v in felt.items()]
        return numbers(np.concatenate(parts), size, ", ".join(felt))


def _openvla_pictures(given: Mapping[str, Any], prefix: str, wanted: int) -> dict[str, Any]:
    """The cameras' images by the names of their fields, the third-person one first."""
    first = next((name for name in ("full_image", "image") if name in given), None)
    if first is None:
        raise BadRequestError(f"{prefix}image", "is missing; give uint8 (H, W, 3), or OFT's full_image")
    pictures = given[first] if isinstance(given[first], list) else [given[first]]
    named = {first if len(pictures) == 1 else f"{first}[{i}]": picture for i, picture in enumerate(pictures)}
    if first == "full_image" and wanted > 1:
        named |= {name: value for name, value in given.items() if "wrist" in name}
    return named


def _map(given: Mapping[Any, Any], name: str) -> dict[str, Any]:
    found = given.get(name, {})
    if isinstance(found, Broken) or not isinstance(found, Mapping):
        raise BadRequestError(name, f"is {said(found)}; give a map from a camera's name to its image")
    return {f"{name}.{camera}": picture for camera, picture in found.items()}
