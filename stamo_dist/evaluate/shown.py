"""How a policy sees a benchmark: as in its training, unless the user overrides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stamo_dist.errors import DataError, RunError
from stamo_dist.evaluate.options import ShowOptions, split
from stamo_dist.evaluate.simulators import Setting, SimulatorCatalogue
from stamo_dist.models.openvla.actions import SeenAs
from stamo_dist.models.openvla.framing import Framing, FramingPreset
from stamo_dist.models.policies import AnyPolicy, trained_on

#: Defaults if neither the policy nor the user specifies them.
_BENCHMARK, _SIZE = "libero", 256


@dataclass(frozen=True)
class PolicyView:
    """A benchmark as a policy sees it."""

    policy: str
    benchmark: str
    setting: Setting
    unnorm_key: str | None
    trained: Mapping[str, SeenAs]  # of every source of the policy; empty if its folder does not record them

    @classmethod
    def to(
        cls, policy: str, benchmarks: SimulatorCatalogue, asked: ShowOptions, preset: FramingPreset | None = None
    ) -> PolicyView:
        """Options not given come from the policy's folder (its weights are not opened), else from a preset.

        Raises:
            RunError: The policy was trained on other benchmarks, or on several and none is named, or the named cameras
                are in another order.
        """
        cameras = tuple(split(asked.cameras or []))
        benchmark, size, actions, unnorm_key = asked.benchmark, asked.size, asked.actions, asked.unnorm_key
        if preset is not None:
            benchmark, actions = benchmark or preset.benchmark, actions or preset.actions
            if benchmark == preset.benchmark:
                check_order(cameras, preset.cameras, "its authors show it")
                cameras = cameras or preset.cameras
            size = size or preset.size
        actions = actions or "delta"
        trained = trained_on(policy)
        key = next((name for name in (unnorm_key, f"{unnorm_key}_no_noops") if name in trained), None)
        formats = dict.fromkeys(seen.format for seen in ([trained[key]] if key else trained.values()))
        if benchmark is None:
            if len(formats) > 1:
                raise RunError(f"--benchmark: the policy was trained on {', '.join(formats)}; choose one")
            benchmark = next(iter(formats), _BENCHMARK)
        if trained and unnorm_key is None and benchmark not in formats:
            which = ", ".join(f"{name} ({seen.format})" for name, seen in trained.items())
            raise RunError(
                f"{policy}: was trained on {which}, not on {benchmark}; choose another --benchmark, or "
                "with --unnorm-key the source whose actions it is to take there"
            )
        seen = trained[key] if key else next((s for s in trained.values() if s.format == benchmark), None)
        if seen is None:
            setting = Setting(size or _SIZE, cameras or (benchmarks.default_camera(benchmark),), actions)
            setting = replace(setting, finely=not trained)  # other datasets were not rendered by our renderer
        else:
            square = seen.frame_size is not None and seen.frame_size[0] == seen.frame_size[1]
            rendered = seen.frame_size[0] if seen.frame_size and square and size in (None, seen.size) else None
            if seen.format == benchmark:
                check_order(cameras, seen.cameras, "it was trained with")
            theirs = seen.cameras if seen.format == benchmark else (benchmarks.default_camera(benchmark),)
            setting = Setting(size or seen.size, cameras or theirs, actions, rendered=rendered)
        return cls(policy, benchmark, setting, unnorm_key, trained)

    def with_views(self, views: int, *, named: bool) -> Setting:
        """The setting with as many cameras as the policy has views; `named`: the user chose them.

        Raises:
            RunError: There are fewer, or the user named more.
        """
        cameras = self.setting.cameras
        if len(cameras) < views or (named and len(cameras) > views):
            raise RunError(
                f"--cameras: the policy looks at {views} view{'s' * (views > 1)} of a moment, and "
                f"{', '.join(cameras)} {'are' if len(cameras) > 1 else 'is'} {len(cameras)}; name {views}"
            )
        return replace(self.setting, cameras=cameras[:views])

    def sources_of(self, tasks: Sequence[str], policy: AnyPolicy) -> dict[str, str]:
        """Task → the source whose statistics scale its actions: as named, else its suite's, else the benchmark's.

        Raises:
            RunError: It is not determined, or ambiguous.
            DataError: Its statistics, or some of them, are missing.
        """
        known = policy.statistics
        of_benchmark = [name for name, seen in self.trained.items() if seen.format == self.benchmark]
        found = {}
        for task in tasks:
            if self.unnorm_key is not None:
                found[task] = known.key(self.unnorm_key)
                continue
            try:
                found[task] = known.key(task.partition("/")[0])
            except DataError:
                candidates = of_benchmark or list(known.sources)
                if len(candidates) != 1:
                    raise RunError(
                        f"--unnorm-key: the policy has statistics of {', '.join(candidates) or 'no source'}; choose "
                        f"the one whose actions it is to take in {task}"
                    ) from None
                found[task] = candidates[0]
        for source in dict.fromkeys(found.values()):
            known.range(source, "action", policy.cfg.bounds)
            if policy.cfg.proprio:
                known.range(source, "proprio", policy.cfg.bounds)
        return found

    def said(self, setting: Setting, framing: Framing) -> str:
        """The view in one line, for the user."""
        drawn = f"drawn at {setting.rendered} px, seen at" if setting.rendered not in (None, setting.size) else "at"
        return f"{self.benchmark}: {', '.join(setting.cameras)} {drawn} {setting.size} px, {framing.said()}"


def check_order(named: Sequence[str], theirs: Sequence[str], whose: str) -> None:
    """Raises: RunError: The policy's cameras are named in another order."""
    if tuple(named) != tuple(theirs) and sorted(named) == sorted(theirs):
        raise RunError(
            f"--cameras {','.join(named)}: {whose} {', '.join(theirs)}, in this order, which its views keep; leave "
            "--cameras out"
        )
