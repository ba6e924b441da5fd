"""A page of the report → its tags, its visible text, and every attribute from which a browser could fetch."""

from html.parser import HTMLParser
from pathlib import Path

FETCHING = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "background", "content"}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Fails where tags are not balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open_tags == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in FETCHING]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open_tags:
            self.words.append(data)


def require_nothing_fetched(page: Page) -> None:
    outside = [text for text in page.addresses if not text.startswith(("data:image/", "#"))]
    assert all("http" not in text and "//" not in text for text in outside), outside
    assert "http://" not in page.source and "https://" not in page.source
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert "default-src 'none'" in page.source
