"""HTML pages."""

from sample_documents import parts, read


def test_html_gives_the_visible_text(tmp_path):
    text = (
        "<html><head><title>My\n page</title><style>p {}</style></head>\n<body><p>Before.</p>\n"
        "<h1>Bees &amp; <i>honey</i></h1>\n<script>var x = '<p>no</p>';</script><p>They  make\nho<b>ney</b>.<p>Daily."
        "<ul><li>one<li>two</ul>\n<pre>a\n  b</pre><!-- hidden -->\n<h2>Rain</h2>It falls."
    )
    [document] = read(tmp_path / "a.html", text)
    assert document.title == "My page"
    assert parts(document) == [("My page", 3), ("Bees & honey", 4), ("Rain", 9)]
    assert document.sections[1].text == "Bees & honey\n\nThey make honey.\n\nDaily.\n\none\ntwo\n\na\n  b"
    assert " ".join(document.text.split()) == "Before. Bees & honey They make honey. Daily. one two a b Rain It falls."
