from __future__ import annotations

from io import BytesIO

import pytest
from pypdf import PdfReader, PdfWriter
from tiny_pdf import PICTURE, line, stream, tiny_pdf, written

from nearfar.errors import DocumentError
from nearfar.runtime.text.formats.pdf import page_ranges, pdf_text

TYPE_0 = (
    "<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/DescendantFonts[<</Type/Font"
    "/Subtype/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)"
    "/Supplement 0>>>>]>>"
)


def message(data: bytes) -> str:
    with pytest.raises(DocumentError) as caught:
        pdf_text(data, "a.pdf")
    return str(caught.value)


def to_unicode(*pairs: tuple[str, str]) -> bytes:
    body = "\n".join(f"<{code}> <{character}>" for code, character in pairs)
    return stream(
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapType 2 def\n"
        f"1 begincodespacerange <00> <FF> endcodespacerange\n{len(pairs)} beginbfchar\n{body}\n"
        "endbfchar endcmap end end"
    )


def encrypted(algorithm: str, user_password: str) -> bytes:
    writer = PdfWriter(clone_from=PdfReader(BytesIO(tiny_pdf(line("(Open)")))))
    writer.encrypt(user_password, "owner", algorithm=algorithm)
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def test_pages_without_text_are_named() -> None:
    data = tiny_pdf(line("(Cover)"), PICTURE, PICTURE, PICTURE, line("(End)"), PICTURE)
    text, notes = pdf_text(data, "a.pdf")
    assert text.split() == ["Cover", "End"]
    assert notes == [
        "4 of 6 pages have no text: 2-4, 6 (to recognise text in pictures: ocrmypdf --skip-text "
        "a.pdf readable.pdf)"
    ]


def test_a_whole_document_has_no_notes() -> None:
    assert pdf_text(tiny_pdf(line("(One)"), line("(Two)")), "a.pdf") == ("One\n\nTwo", [])


def test_progress_counts_pages() -> None:
    told: list[tuple[int, int]] = []
    pdf_text(tiny_pdf(line("(One)"), PICTURE), "a.pdf", lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]


def test_ranges_of_pages() -> None:
    assert page_ranges([2, 3, 4, 7, 9, 10]) == "2-4, 7, 9-10"


@pytest.mark.parametrize("before", [b"junk\n" * 100, b"\xef\xbb\xbf", b"\n \n"])
def test_bytes_before_the_header(before: bytes) -> None:
    assert pdf_text(before + tiny_pdf(line("(Here)")), "a.pdf") == ("Here", [])


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_protected_files(algorithm: str) -> None:
    assert pdf_text(encrypted(algorithm, user_password=""), "a.pdf") == ("Open", [])
    assert message(encrypted(algorithm, user_password="user")) == (
        "a.pdf is encrypted. Save it without a password, for example: "
        "qpdf --decrypt --password=... a.pdf open.pdf"
    )


def test_values_of_form_fields() -> None:
    fields = (
        "<</Subtype/Widget/FT/Tx/T(name)/V(Ada)>>",
        "<</FT/Tx/T(address)/Kids[6 0 R 7 0 R]>>",
        "<</Subtype/Widget/Parent 5 0 R/T(town)/TU(Town of birth)/V(Turin)>>",
        "<</Subtype/Widget/Parent 5 0 R/T(street)/V<feff00650301>>>",
        "<</Subtype/Widget/FT/Btn/T(agreed)/V/Yes/AS/Yes>>",
        "<</Subtype/Widget/FT/Btn/T(refused)/V/Off/AS/Off>>",
        "<</Subtype/Widget/FT/Ch/T(size)/V[(s)(m)]/Opt[[(s)(small)][(m)(medium)]]>>",
        "<</Subtype/Widget/FT/Tx/Ff 8192/T(secret)/V(1234)>>",
        "<</Subtype/FreeText/Contents(Paid)>>",
        "<</Subtype/Text/Contents(A comment)>>",
        "<</FT/Tx/T(nowhere)/V(on no page)>>",
    )
    on_page = " ".join(f"{number} 0 R" for number in (4, 6, 7, 8, 9, 10, 11, 12, 13))
    text, notes = pdf_text(
        tiny_pdf(
            line("(Form)"),
            catalog="/AcroForm<</Fields[4 0 R 5 0 R 8 0 R 14 0 R]>>",
            page=f"/Annots[{on_page}]",
            more=fields,
        ),
        "a.pdf",
    )
    assert text == (
        "Form\nname: Ada\nTown of birth: Turin\naddress.street: e\u0301\nagreed: Yes\n"
        "size: small, medium\nPaid\n\nnowhere: on no page"
    )
    assert notes == ["1 comment beside the text is not read"]


def test_a_page_of_values_has_text() -> None:
    field = "<</Subtype/Widget/FT/Tx/T(name)/V(Ada)>>"
    data = tiny_pdf(PICTURE, page="/Annots[4 0 R]", more=(field,))
    assert pdf_text(data, "a.pdf") == ("name: Ada", [])


@pytest.mark.parametrize(
    ("font", "shown"),
    [
        (TYPE_0, "<002b00480f4f>"),
        (TYPE_0.replace("Identity-H", "GBKp-EUC-H"), "<b0a1>"),
        (TYPE_0.replace("/DescendantFonts", "/ToUnicode 4 0 R/DescendantFonts"), "<002b>"),
        ("<</Subtype/Type1/BaseFont/X/Encoding<</Differences[65/g12/C0_1]>>>>", "(AB)"),
        ("<</Subtype/Type3/CharProcs<<>>/Encoding<</Differences[65/x01]>>>>", "(AAA)"),
    ],
)
def test_fonts_without_unicode(font: str, shown: str) -> None:
    no_map = (stream("begincmap endcmap"),)
    text, notes = pdf_text(tiny_pdf(line(shown), line("(Read)", "F2"), font=font, more=no_map), "a")
    assert text.strip() == "Read"
    assert notes == [
        "1 of 2 pages is not read because their fonts have no map to Unicode: 1 (to recognise "
        "their text: ocrmypdf --force-ocr a readable.pdf)"
    ]
    assert message(tiny_pdf(line(shown), font=font, more=no_map)) == (
        "a.pdf has no text that can be read: its fonts have no map to Unicode, so that its "
        "characters are not known. Run text recognition first, for example: ocrmypdf --force-ocr "
        "a.pdf readable.pdf"
    )


def test_a_page_of_which_little_is_unknown() -> None:
    both = line("(Much that is known)", "F2") + "\n" + line("<002b>")
    text, notes = pdf_text(tiny_pdf(both, font=TYPE_0), "a.pdf")
    assert "Much that is known" in text
    assert notes == [
        "1 of 1 page has characters that their fonts do not map to Unicode, which are wrong here: 1"
    ]


def test_a_map_of_only_some_codes() -> None:
    font = TYPE_0.replace("/DescendantFonts", "/ToUnicode 4 0 R/DescendantFonts")
    more = (to_unicode(*((f"{i + 1:04x}", f"{ord(c):04x}") for i, c in enumerate("know"))),)
    whole = pdf_text(tiny_pdf(line("<00010002000300040002>"), font=font, more=more), "a.pdf")
    assert whole == ("known", [])
    text, notes = pdf_text(
        tiny_pdf(line("<0001000200030004000200480002>"), font=font, more=more), "a.pdf"
    )
    assert text == "knownHn"
    assert notes == [
        "1 of 1 page has characters that their fonts do not map to Unicode, which are wrong here: 1"
    ]


@pytest.mark.parametrize(
    "mapping",
    [
        "1 beginbfrange <0041> <0043> <0061> endbfrange",
        "1 beginbfrange <0041><0043>[<0061><0062><0063>] endbfrange",
    ],
)
def test_a_map_of_ranges(mapping: str) -> None:
    font = TYPE_0.replace("/DescendantFonts", "/ToUnicode 4 0 R/DescendantFonts")
    more = (
        stream(
            f"begincmap 1 begincodespacerange <0000><FFFF> endcodespacerange\n{mapping}\nendcmap"
        ),
    )
    shown = pdf_text(tiny_pdf(line("<004100420043>"), font=font, more=more), "a.pdf")
    assert shown == ("abc", [])


def test_fonts_with_unicode_by_name() -> None:
    named = "<</Subtype/Type1/BaseFont/X/Encoding<</Differences[65/uni4E16/eacute/f_i]>>>>"
    assert pdf_text(tiny_pdf(line("(ABC)"), font=named), "a.pdf")[1] == []


def test_a_map_to_what_is_no_character() -> None:
    font = "<</Subtype/Type1/BaseFont/Helvetica/ToUnicode 4 0 R>>"
    more = (to_unicode(("41", "D800"), ("42", "0000"), ("43", "D83DDE00"), ("44", "FFFF")),)
    text, notes = pdf_text(tiny_pdf(line("(xyzCxyz A B D)"), font=font, more=more), "a.pdf")
    assert text == "xyz\U0001f600xyz \ufffd \ufffd \ufffd"
    assert len(notes) == 1


def test_a_damaged_page_among_others() -> None:
    text, notes = pdf_text(tiny_pdf(line("(One)"), "BT (never closed"), "a.pdf")
    assert text.strip() == "One"
    assert len(notes) == 1
    assert notes[0].startswith("1 of 2 pages is damaged and not read: 2 (")


def test_pages_that_are_not_there() -> None:
    data = tiny_pdf(line("(One)")).replace(b"/Count 1", b"/Count 9")
    assert pdf_text(data, "a.pdf")[1] == ["9 pages are declared, but only 1 is there"]


def test_an_xfa_form() -> None:
    data = tiny_pdf(line("(Please wait... )"), catalog="/AcroForm<</XFA(x)/Fields[]>>")
    [note] = pdf_text(data, "a.pdf")[1]
    assert note.startswith("the document is an XFA form, whose content only some programs show")


def test_a_collection_of_files() -> None:
    writer = PdfWriter(
        clone_from=PdfReader(BytesIO(tiny_pdf(line("(Cover)"), catalog="/Collection<<>>")))
    )
    writer.add_attachment("inner.txt", b"unread")
    out = BytesIO()
    writer.write(out)
    assert pdf_text(out.getvalue(), "a.pdf")[1] == [
        "the document is a collection of files, which are not read: inner.txt"
    ]


DEEP = [f"<</Type/Pages/Kids[{number} 0 R]/Count 1>>" for number in range(3, 1003)]


@pytest.mark.parametrize(
    "data",
    [
        written(["<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[2 0 R]/Count 1>>"]),
        written(["<</Type/Catalog/Pages 2 0 R>>", *DEEP, "<</Type/Page>>"]),
        written(["<</Type/Catalog>>"]),
        written(["null"]),
        tiny_pdf("BT " + "[" * 5000),
        tiny_pdf(line("(One)"))[:300],
        tiny_pdf(line("(One)")).replace(b"xref\n0", b"xxxx\n0"),
    ],
    ids=["loop", "deep pages", "no pages", "no root", "deep array", "cut", "no table"],
)
def test_damaged(data: bytes) -> None:
    said = message(data)
    assert said.startswith("a.pdf is a corrupt PDF and cannot be read (")
    assert said.endswith("). Fetch or export it again.")
    assert "\n" not in said


def test_no_pages() -> None:
    data = written(["<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[]/Count 0>>"])
    assert message(data) == "a.pdf is a PDF without pages. Fetch or export it again."
