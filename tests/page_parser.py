"""What a browser would make of a page: its tags, attributes, styles and text."""

from __future__ import annotations

import re
from html import parser


class Page(parser.HTMLParser):
    """Collects what a browser would act on, and insists that tags balance."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles |= {value or "" for name, value in attrs if name == "style"}
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def require_harmless(self) -> None:
        """Nothing runs, nothing is fetched, and only numbers reach a style."""
        assert not self.tags & {"script", "img", "link", "iframe", "object", "form", "a", "base"}
        assert not any(name.startswith("on") or name in ("src", "href", "srcset") for name in self.attributes)
        assert all(re.fullmatch(r"--t:\d{1,3}%|width:[\d.]+%", style) for style in self.styles)
