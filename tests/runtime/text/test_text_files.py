from __future__ import annotations

import os
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest
from pypdf import PdfReader, PdfWriter
from reportlab.pdfgen.canvas import Canvas

from nearfar.errors import DocumentError, DocumentWarning
from nearfar.runtime.text.text_files import document_text, join_documents, read_document


def make_pdf(path: Path, *pages: str) -> Path:
    canvas = Canvas(str(path))
    for page in pages:
        canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return path


def make_scan(path: Path) -> Path:
    canvas = Canvas(str(path))
    canvas.rect(10, 10, 100, 100, fill=1)
    canvas.showPage()
    canvas.save()
    return path


def encrypt(path: Path, user_password: str) -> Path:
    writer = PdfWriter(clone_from=PdfReader(path))
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    writer.write(path)
    return path


def message(act: Callable[[], str]) -> str:
    with pytest.raises(DocumentError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.py"])
def test_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("# Title\r\n\r\n *ü* <b>\n".encode())
    assert read_document(path) == "# Title\n\n *ü* <b>\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("grüße 世界".encode(encoding))
    assert read_document(path) == "grüße 世界"


def test_html_is_what_a_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "a.HTML"
    path.write_text(
        """<!doctype html><html><head><title>Home</title><style>p {}</style></head>
        <body><h1>Big  <b>bold</b>
        title</h1><p>one<br>two &amp; three</p><!-- hidden --><script>alert()</script>
        <ul><li>a</li> <li>b</li></ul>
        <table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>
        <pre>x\n  y</pre></body></html>"""
    )
    expected = "Home\n\nBig bold title\n\none\ntwo & three\n\na\nb\n\n1 2\n3 4\n\nx\n  y"
    assert read_document(path) == expected


def test_html_may_declare_its_encoding() -> None:
    page = '<meta charset="iso-8859-1"><p>grüße</p>'
    assert document_text(page.encode("latin1"), "a.html") == "grüße"
    assert document_text(page.replace("iso-8859-1", "nonsense").encode(), "a.html") == "grüße"


def test_pdf_pages(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "a.pdf", "First page", "Second page")
    assert read_document(path).split() == ["First", "page", "Second", "page"]


def test_pdf_through_a_pipe_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    data = make_pdf(tmp_path / "a.pdf", "First page").read_bytes()
    assert document_text(data, "stdin").strip() == "First page"


def test_pdf_that_only_restricts_changes_opens(tmp_path: Path) -> None:
    path = encrypt(make_pdf(tmp_path / "a.pdf", "Open"), user_password="")
    assert read_document(path).strip() == "Open"


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("x")
    path = tmp_path / "raport.txt"
    said = message(lambda: read_document(path))
    assert said == f"{path} does not exist. Did you mean {tmp_path / 'report.txt'}?"


def test_missing_file_without_a_near_name(tmp_path: Path) -> None:
    path = tmp_path / "zzz"
    assert message(lambda: read_document(path)) == f"{path} does not exist. Check the path."


def test_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "a.txt"
    said = message(lambda: read_document(path))
    assert said == f"{path} does not exist, nor does the folder {path.parent}. Check the path."


def test_folder(tmp_path: Path) -> None:
    said = message(lambda: read_document(tmp_path))
    assert said == f"{tmp_path} is a folder. Name the files in it, like {tmp_path}/*.md."


@pytest.mark.parametrize("data", [b"", b" \n\t "])
def test_empty(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    said = message(lambda: read_document(path))
    assert said == f"{path} is empty ({len(data)} bytes). Give a document with text."


def test_markup_without_text() -> None:
    said = message(lambda: document_text(b"<p> <br></p><style>x</style>", "a.html"))
    assert said == "a.html holds no text, only white space or markup."


def test_byte_order_mark_without_text() -> None:
    assert "a.txt holds no text" in message(lambda: document_text(b"\xef\xbb\xbf", "a.txt"))


def test_binary() -> None:
    said = message(lambda: document_text(b"\x7fELF\x00\x01", "a.out"))
    assert said == (
        "a.out is a binary file (a zero byte at offset 4). Give text, Markdown, HTML or PDF."
    )


def test_mis_encoded() -> None:
    data = ("x" * 1500 + "ü").encode("latin1")
    said = message(lambda: document_text(data, "a.txt"))
    assert said == (
        "a.txt is not valid UTF-8: byte 0xfc at offset 1,500. If it is in another encoding, "
        "name that, for example: --encoding windows-1252"
    )


def test_truncated_utf_16() -> None:
    data = "ab".encode("utf-16")[:-1]
    said = message(lambda: document_text(data, "a.txt"))
    assert said.startswith("a.txt is not valid UTF-16: byte")
    assert said.endswith("It may be cut off: fetch or export it again.")  # not: from windows-1252


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads all, so the refusal is made here

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
    said = message(lambda: read_document(path))
    assert said == (f"{path} cannot be read: permission denied. Change it with: chmod u+r {path}")


def test_other_failures_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    assert message(lambda: read_document(path)) == f"{path} cannot be read: File name too long."


def test_encrypted_pdf(tmp_path: Path) -> None:
    path = encrypt(make_pdf(tmp_path / "a.pdf", "Closed"), user_password="user")
    said = message(lambda: read_document(path))
    assert said == (
        f"{path} is encrypted. Save it without a password, for example: "
        f"qpdf --decrypt --password=... {path} open.pdf"
    )


def test_scanned_pdf(tmp_path: Path) -> None:
    path = make_scan(tmp_path / "a.pdf")
    said = message(lambda: read_document(path))
    assert said == (
        f"{path} has 1 page but no text: it is probably scanned. Run text recognition first, "
        f"for example: ocrmypdf {path} readable.pdf"
    )


@pytest.mark.parametrize("keep", [9, 100, 400])
def test_truncated_pdf(tmp_path: Path, keep: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_pdf(tmp_path / "a.pdf", "Text")
    path.write_bytes(path.read_bytes()[:keep])
    said = message(lambda: read_document(path))
    assert said.startswith(f"{path} is a corrupt PDF and cannot be read (")
    assert said.endswith("). Fetch or export it again.")
    assert capfd.readouterr().err == ""


def test_a_pdf_in_name_only() -> None:
    said = message(lambda: document_text(b"hello", "a.pdf"))
    assert said == "a.pdf is not a PDF: it does not begin with %PDF. Check the file."


def test_one_document_stays_as_it_is() -> None:
    assert join_documents([("dir/a.txt", " text\n")]) == " text\n"


def test_several_get_headings() -> None:
    joined = join_documents([("dir/a.txt", "one\n"), ("stdin", "\ntwo")])
    assert joined == "# a.txt\n\none\n\n# stdin\n\ntwo"


def test_equal_names_keep_their_paths() -> None:
    joined = join_documents([("x/a.txt", "1"), ("y/a.txt", "2"), ("y/b.txt", "3")])
    assert [line for line in joined.splitlines() if line.startswith("#")] == [
        "# x/a.txt",
        "# y/a.txt",
        "# b.txt",
    ]


def packed(*names: str, kind: str = "") -> bytes:
    out = BytesIO()
    with ZipFile(out, "w") as archive:
        if kind:
            archive.writestr(ZipInfo("mimetype"), kind)  # without the time: the same each time
        for name in names:
            archive.writestr(ZipInfo(name), "x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (packed("[Content_Types].xml", "word/document.xml"), "a Word document, which cannot be"),
        (packed("xl/workbook.xml"), "an Excel workbook"),
        (packed("ppt/presentation.xml"), "a PowerPoint presentation"),
        (packed("x", kind="application/epub+zip"), "an EPUB book"),
        (packed("x", kind="application/vnd.oasis.opendocument.text"), "an OpenDocument file"),
        (packed("a.txt"), "a ZIP archive, which cannot be read. Unpack it"),
        (b"PK\x03\x04damaged", "a ZIP archive"),
        (b"\x89PNG\r\n\x1a\n\0\0", "a PNG picture"),
        (b"\xff\xd8\xff\xe0", "a JPEG picture"),
        (b"{\\rtf1 Hello}", "a document in RTF"),
        (b"%!PS-Adobe-3.0", "PostScript"),
        (b"\x1f\x8b\x08", "compressed by gzip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
        (b"\x89NEARFAR", "a document that nearfar saved, which cannot be read. Ask it: nearfar"),
        (b"GGUF\x03", "a model (GGUF)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "a.html", "stdin"])
def test_other_kinds_are_named_whatever_the_suffix(data: bytes, what: str, name: str) -> None:
    assert message(lambda: document_text(data, name)).startswith(f"{name} is {what}")


def test_utf_16_without_a_mark_is_named() -> None:
    said = message(lambda: document_text("plain text".encode("utf-16-le"), "a.txt"))
    assert said.startswith("a.txt looks like UTF-16 without a byte order mark.")


def test_html_through_a_pipe_is_known_by_its_first_bytes() -> None:
    page = b"\xef\xbb\xbf\n<!-- saved -->\n<!DOCTYPE html><p>One</p>"
    assert document_text(page, "stdin") == "One"
    assert document_text(b"<html><p>One</p>", "stdin") == "One"
    assert document_text(b"<!DOCTYPE html><p>One</p>", "a.txt").startswith("<!DOCTYPE")
    assert document_text(b"In <html> there is", "stdin") == "In <html> there is"


def test_what_is_partly_read_warns_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text("One<!-- two")
    note = (
        f"{path}: ends inside a comment that begins at character 3 and is never closed; as in a "
        "browser, what follows it is not read"
    )
    with pytest.warns(DocumentWarning) as warned:
        assert read_document(path) == "One"
    assert [str(each.message) for each in warned] == [f"{note}."]
    assert warned[0].filename == __file__
    said = message(lambda: read_document(path, strict=True))
    assert said == f"{note}. Without strict reading the rest of it can be used."


def test_devices_are_not_read() -> None:
    said = message(lambda: read_document("/dev/zero"))
    assert said == "/dev/zero is a device. Give a file, or - to read a pipe."


def test_a_pipe_with_a_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("through",), daemon=True)
    writer.start()
    assert read_document(path) == "through"
    writer.join(10)


def test_names_that_no_file_has() -> None:
    said = message(lambda: read_document("a\0b"))
    assert said == "a\ufffdb is not a file name: it has a zero byte."
