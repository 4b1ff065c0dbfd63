"""HTML becomes the text that one reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap.eval.html_text import html_to_text

PAGE = b"""<!DOCTYPE html><html><head><title>T</title><style>p { }</style></head><body>
<nav><div>menu</div><nav>inner</nav>more</nav>
<div class="navheader"><div>up</div> next</div>
<h1>Title<a class="headerlink" href="#t">&para;</a></h1>
<p>One   <b>bold</b>
word &amp; &eacute;.<br>Next<script>if (a < b) { "</p>" }</script> line</p>
<pre>def f(x):
    return  x &lt; 1
</pre>
<ul><li>first</li><li>second</ul>
<table><tr><td>a</td><td>b</td></tr></table>
<div role="navigation">no</div><p hidden>no</p><p>end
</body></html>"""


def test_a_page():
    assert html_to_text(PAGE).decode() == (
        "Title\n\nOne bold word & é.\nNext line\n\ndef f(x):\n    return  x < 1\n\n"
        "first\nsecond\n\n  a  b\n\nend"
    )


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (b"\xef\xbb\xbf<p>\xc3\xa9", "é"),
        (b"<meta charset='iso-8859-2'><p>\xbe", "ž"),
        (b"<meta charset=no-such><p>caf\xe9", "café"),
        ("<p>é".encode("utf-16"), "é"),
        (b"", ""),
        (b"<![if !IE]><p>a<![endif]>", "a"),
        (b"<p>a<!-- never closed", "a"),
        (b"<nav>never closed<p>a", ""),
        (b"</p></nav></pre>a", "a"),
    ],
)
def test_bad_pages(page, text):
    assert html_to_text(page).decode().startswith(text)


PIECES = ["<", ">", "<!", "<![", "]]>", "&", "&#x110000;", "&#", "<p", "</", "<?", "--", "\0", "a",
          "'", '"', "=", "<pre>", "<script>", "</script", "<![CDATA[", "<nav>", "\ud800",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_any_page_has_a_text(pieces):
    html_to_text("".join(pieces).encode("utf-8", errors="surrogatepass")).decode()
