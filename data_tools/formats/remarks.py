"""Notes shared by the formats' scans: episodes without instruction, without success, without proprioception."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from data_tools.formats.source import EpisodeRef

#: Usual names of an instruction, the most specific first; compared in lower case.
LANGUAGE = (
    "language_instruction",
    "natural_language_instruction",
    "language_instruction_2",
    "language_instruction_3",
    "instruction",
    "task_description",
    "task_instruction",
    "language",
    "lang",
    "language_goal",
    "goal_language",
    "task_language",
    "language_description",
    "language_annotation",
    "language_raw",
    "prompt",
    "caption",
)
_HINTS = ("lang", "instr", "task", "text", "prompt", "descr", "goal", "caption", "annot", "command", "utter")


def looks_like_language(key: str) -> bool:
    """Whether a key outside LANGUAGE might nevertheless hold an instruction."""
    return any(hint in key.lower() for hint in _HINTS)


def language_keys(keys: Iterable[str]) -> list[str]:
    """Those of these keys (paths with /) whose last part is one of LANGUAGE, the most specific first."""
    named = [(LANGUAGE.index(last), key) for key in keys if (last := key.rsplit("/", 1)[-1].lower()) in LANGUAGE]
    return [key for _, key in sorted(named, key=lambda pair: pair[0])]


def unsaid_instructions(episodes: Sequence[EpisodeRef], candidates: Iterable[str] = (), way: str = "") -> list[str]:
    """A note if episodes have no instruction, with the keys that look like one and the option to use."""
    silent = sum(not e.instruction.strip() for e in episodes)
    if not silent:
        return []
    found = sorted(candidates)
    hint = f"; these look like one: {', '.join(found)}" + (f" ({way})" if way else "") if found else ""
    return [
        f"instructions: {silent} of {len(episodes)} episodes have none{hint}; "
        "give them with --instructions FILE.csv (columns episode,instruction)"
    ]


def succeeded(episodes: Sequence[EpisodeRef], only: bool) -> tuple[list[EpisodeRef], list[str]]:
    """The episodes to take, by `success` in their meta (bool; absent or None: unknown), and notes on failed ones.

    With `only`, episodes that are known to have failed are left out.
    """
    failed = [e for e in episodes if e.meta.get("success") is False]
    unknown = sum(e.meta.get("success") is None for e in episodes)
    notes = []
    if failed:
        end = "left out" if only else "taken all the same; --set only_successful=true leaves them out"
        notes.append(f"success: {len(failed)} of {len(episodes)} episodes failed, {end}")
    if only and unknown:
        notes.append(f"success: {unknown} of {len(episodes)} episodes do not say whether they succeeded; taken")
    return [e for e in episodes if not only or e.meta.get("success") is not False], notes


def no_proprio(there: Iterable[str]) -> list[str]:
    """A note that no proprioception was found, with the existing numeric keys."""
    return [
        f"proprio: none of the usual keys; numeric ones are: {', '.join(there) or 'none'}; "
        "name them with --set proprio=KEY,KEY, or say --set proprio=none"
    ]


def hdr_videos(kinds: Mapping[str, str], named: int = 3) -> list[str]:
    """A note on videos of high dynamic range; `hdr`: name → "PQ", "HLG", or "" for standard range."""
    found = sorted(name for name, kind in kinds.items() if kind)
    if not found:
        return []
    names = ", ".join(found[:named]) + (f" and {len(found) - named} more" if len(found) > named else "")
    return [
        f"colours: {len(found)} of {len(kinds)} videos are HDR ({', '.join(sorted({kinds[n] for n in found}))}), "
        f"read as they are stored, paler than they should be: {names}; map them to BT.709 first, e.g. with ffmpeg's "
        "filters zscale and tonemap"
    ]
