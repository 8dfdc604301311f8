"""Pages that are written, read as a browser reads them."""

from html.parser import HTMLParser

VOID = ("img", "input", "meta")  # tags that are never closed


class Page(HTMLParser):
    """The tags of a page: (name, attributes, tags around it); fails where they are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict, tuple[str, ...]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, name: str) -> list[dict]:
        """Attributes of all tags of a name."""
        return [attributes for tag, attributes, _ in self.tags if tag == name]
