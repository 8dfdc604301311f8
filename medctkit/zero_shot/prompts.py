"""Prompts: the sentences that state and deny each finding."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from medctkit.findings import FINDINGS

SIDES = ("stating", "denying")
PROMPTS: dict[str, dict[str, list[str]]] = json.loads((files("medctkit") / "assets" / "prompts.json").read_text())

# A name, a file, (stating, denying), {"stating": ..., "denying": ...}, or one of the last two for each finding.
Prompts = str | Path | Sequence | Mapping


def prompt_sentences(prompts: Prompts, findings: Sequence[str] = FINDINGS) -> tuple[list[list[str]], list[list[str]]]:
    """The sentences that state and those that deny each finding.

    Args:
        prompts: the name of a set in `PROMPTS`; (stating, denying), each a template or a list of templates with
            {finding} in them; a dict {"stating": [...], "denying": [...]}; a dict with one of these for each finding,
            where a sentence may do without {finding}; or the `Path` of a JSON file with such a dict.
        findings: names to put into the templates.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, a damaged file, no sentence for one side or finding, a template without {finding}.
    """
    where = "prompts"
    if isinstance(prompts, str):
        if prompts not in PROMPTS:
            raise ValueError(
                f"unknown prompts {prompts!r}; choose one of {sorted(PROMPTS)}, or give templates of your own or the "
                "Path of a JSON file that holds them"
            )
        prompts = PROMPTS[prompts]
    elif isinstance(prompts, Path):
        where, prompts = str(prompts), _read_prompts(prompts)
    if not isinstance(prompts, Mapping) or set(prompts) & set(SIDES):
        sides = _sides(prompts, where)
        for template in (*sides[0], *sides[1]):
            if "{finding}" not in template:
                raise ValueError(
                    f"{where}: {template!r} has no {{finding}} in it, so all findings would be asked the same; put "
                    "{finding} where the name belongs"
                )
        of_finding = dict.fromkeys(findings, sides)
    else:
        if set(prompts) != set(findings):
            missing, unknown = ([n for n in a if n not in b] for a, b in ((findings, prompts), (prompts, findings)))
            raise ValueError(
                f'{where}: expected "stating" and "denying", or an entry for each finding; '
                f"missing {', '.join(missing) or 'none'}; unknown {', '.join(map(str, unknown)) or 'none'}"
            )
        of_finding = {name: _sides(prompts[name], f"{where}, {name}") for name in findings}

    def side(i: int) -> list[list[str]]:
        return [[sentence.replace("{finding}", name) for sentence in of_finding[name][i]] for name in findings]

    return side(0), side(1)


def _read_prompts(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; expected JSON, {{"stating": [...], "denying": [...]}}')
    try:
        found = json.loads(path.read_bytes())  # with the mark of an editor or without, in UTF-8 or UTF-16
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}. Compare it with assets/prompts.json") from None
    if isinstance(found, Mapping) and set(found) & set(PROMPTS):
        raise ValueError(f"{path} holds the sets {', '.join(found)}; keep one: what stands between its braces")
    return found


def _sides(prompts: Any, where: str) -> tuple[list[str], list[str]]:
    """The stating and the denying sentences of one set."""
    if isinstance(prompts, Mapping) and set(prompts) == set(SIDES):
        prompts = [prompts[side] for side in SIDES]
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence) or len(prompts) != 2:
        expected = '{"stating": [...], "denying": [...]} or a pair of the two'
        raise ValueError(f"{where}: expected {expected}, got {prompts!r:.200}")
    sides = [[side] if isinstance(side, str) else side for side in prompts]
    for name, side in zip(SIDES, sides, strict=True):
        if not isinstance(side, list | tuple) or not side:
            raise ValueError(f"{where}: the {name} side is {side!r:.200}; expected at least one sentence")
        for sentence in side:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"{where}: the {name} side has {sentence!r:.200} in it; expected a sentence")
    return list(sides[0]), list(sides[1])
