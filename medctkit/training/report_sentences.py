"""A report as single sentences, their contraries and phrases: text only, no labels."""

import re

_SENTENCE_END = re.compile(r"(?<=\.)\s+(?=[A-Z])")
# Tried in this order; what is denied is stated, what is stated is denied.
_RULES = [
    (re.compile(pattern), contrary)
    for pattern, contrary in (
        (r"^No (\w)", lambda m: m[1].upper()),
        (r"\b(There (?:is|are)) no\b", r"\1"),
        (r"\b(is|are|was|were) not\b", r"\1"),
        (r"\b(shows?) no\b", r"\1"),
        (r"\bwithout\b", "with"),
        (r"^(There (?:is|are))(?: an?)?\b", r"\1 no"),
        (r"\b(is|are|was|were)\b", r"\1 not"),
        (r"\b(shows?)(?: an?)?\b", r"\1 no"),
        (r"^", "No "),  # telegram style; the vocabularies of CT-CLIP's text encoders know no capitals
    )
]


def sentences_of(report: str) -> list[str]:
    """The sentences of a report, in order."""
    return [sentence for sentence in _SENTENCE_END.split(report.strip()) if sentence]


def contrary(sentence: str) -> str:
    """The sentence that says the contrary: "No nodule is seen." for "Nodule is seen.", and the reverse.

    A rule of thumb for reports in plain English, whose sentences each state or deny one thing.
    """
    for pattern, replacement in _RULES:
        found, count = pattern.subn(replacement, sentence, count=1)
        if count:
            return found
    return sentence


def phrases_of(report: str, longest: int = 4) -> set[str]:
    """All runs of one to `longest` words within the sentences of a report, in small letters; numbers are left out."""
    found = set()
    for sentence in sentences_of(report):
        words = re.findall(r"[a-z-]+", sentence.lower())
        found |= {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}
    return found
