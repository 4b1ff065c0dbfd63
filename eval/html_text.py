"""Text of HTML pages: paragraphs and code as they read, without navigation, scripts, styles."""

import re
from html.parser import HTMLParser

DROPPED = {
    "script", "style", "nav", "head", "footer", "noscript", "template", "svg", "iframe", "button",
    "select", "textarea",
}  # fmt: skip
DROPPED_CLASSES = {
    "navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "toc", "footer",
}  # fmt: skip
"""What DocBook and Sphinx call their navigation; `headerlink` is a paragraph sign in headings."""

PARAGRAPHS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "html", "main", "ol", "p", "pre", "section", "summary", "table", "ul",
}  # fmt: skip
LINES = {"br", "li", "tr", "option"}
CELLS = {"td", "th"}
VOID = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source",
    "track", "wbr",
}  # fmt: skip
CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
MARKED_SECTION = re.compile(
    r"<!\[(?!CDATA\[)[^>]*>?"
)  # of word processors; the parser dies of some
BYTES_OF_CHARSET = 2048  # HTML asks for it among the first 1024


def html_to_text(page: bytes) -> bytes:
    """The text of a page as UTF-8. Never raises: a browser shows any page, too."""
    reader = _Reader()
    reader.feed(MARKED_SECTION.sub("", decode_html(page)))
    reader.close()
    return reader.text().encode("utf-8", errors="ignore")


def decode_html(page: bytes) -> str:
    """UTF-8 where the bytes are that, else what the page says, else Latin-1 as browsers do."""
    stated = CHARSET.search(page[:BYTES_OF_CHARSET])
    return decode(page, *([stated.group(1).decode("ascii")] if stated else []))


def decode(text: bytes, *stated: str) -> str:
    """Text of any encoding: by its mark, as UTF-8, as one of `stated`, in the end as cp1252."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if text.startswith(mark):
            return text.decode(encoding, errors="replace")
    for encoding in ("utf-8-sig", *stated):
        try:
            return text.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return text.decode("cp1252", errors="replace")


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.dropping: str | None = None  # the element that is left out, with all that is in it
        self.depth = 0  # of elements of that name
        self.verbatim = 0

    def handle_starttag(self, tag, attrs):
        if self.dropping:
            self.depth += tag == self.dropping
        elif tag not in VOID and is_dropped(tag, dict(attrs)):
            self.dropping, self.depth = tag, 1
        else:
            self.verbatim += tag == "pre"
            self.separate(tag)

    def handle_endtag(self, tag):
        if self.dropping:
            self.depth -= tag == self.dropping
            if not self.depth:
                self.dropping = None
            return
        if tag == "pre":
            self.verbatim = max(0, self.verbatim - 1)
        if tag in PARAGRAPHS:
            self.separate(tag)

    def handle_startendtag(self, tag, attrs):
        if not self.dropping:
            self.separate(tag)

    def handle_data(self, data):
        if self.dropping:
            return
        if not self.verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)

    def separate(self, tag):
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")
        elif tag in CELLS:
            self.parts.append("  ")

    def text(self) -> str:
        text = "".join(self.parts)
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def is_dropped(tag: str, attributes: dict) -> bool:
    classes = (attributes.get("class") or "").split()
    return (
        tag in DROPPED
        or attributes.get("role") == "navigation"
        or "hidden" in attributes
        or not DROPPED_CLASSES.isdisjoint(classes)
    )
