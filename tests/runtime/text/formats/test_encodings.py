from __future__ import annotations

import pytest
from webencodings.labels import LABELS

from nearfar.errors import DocumentError, InvalidOptionError
from nearfar.runtime.text.formats.encodings import (
    check_label,
    decode_declared,
    decode_given,
    known_encoding,
)
from nearfar.runtime.text.formats.html_encoding import declared_encoding, decode_page


def page(label: str, content: bytes, is_xml: bool = False) -> str:
    markup, notes = decode_page(f'<meta charset="{label}">'.encode() + content, "a.html", is_xml)
    assert notes == []
    return markup.partition(">")[2]


def message(data: bytes) -> str:
    with pytest.raises(DocumentError) as caught:
        decode_page(data, "a.html", False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("label", "content", "text"),
    [
        ("gb2312", "朱镕基".encode("gbk"), "朱镕基"),
        ("GBK", b"\x80" + "𠀀".encode("gb18030"), "€𠀀"),
        ("shift_jis", "①髙".encode("cp932"), "①髙"),
        (" x-sjis ", "①".encode("cp932"), "①"),
        ("euc-kr", "똠방각하".encode("cp949"), "똠방각하"),
        ("ks_c_5601-1987", "똠".encode("cp949"), "똠"),
        ("euc-jp", "日本".encode("euc_jp") + b"\xad\xa1\xfc\xe2", "日本①髙"),
        ("iso-2022-jp", "日本ｱ".encode("iso2022_jp_ext"), "日本ｱ"),
        ("big5", "中文".encode("big5") + b"\xa3\xe1", "中文€"),
        ("iso-8859-1", "“yes” 5 €".encode("cp1252"), "“yes” 5 €"),
        ("us-ascii", b"\x93caf\xe9\x94", "“café”"),
        ("latin1", b"\x81", "\x81"),
        ("iso-8859-9", b"\x80\xfe", "€ş"),
        ("iso-8859-8-i", b"\xe0", "א"),
        ("tis-620", b"\xa1", "ก"),
        ("windows-874", b"\x85\xa1", "…ก"),
        ("koi8-r", "я".encode("koi8_r"), "я"),
        ("macintosh", b"\x80", "Ä"),
        ("x-user-defined", b"\x93", "“"),
        ("utf-16", "plain café".encode(), "plain café"),
        ("utf-16le", "café".encode(), "café"),
        ("undefined", b"hello", "hello"),
        ("punycode", b"hello-", "hello-"),
        ("unicode_escape", rb"C:\new", r"C:\new"),
        ("utf-7", b"a +ADw-b+AD4- c", "a +ADw-b+AD4- c"),
        ("rot13", b"hello", "hello"),
        ("base64", "é".encode(), "é"),
    ],
)
def test_a_declared_encoding_is_what_browsers_take_it_for(
    label: str, content: bytes, text: str
) -> None:
    assert page(label, content) == text


def test_every_label_of_the_standard_decodes_or_is_refused_by_browsers() -> None:
    refused = {label for label in LABELS if known_encoding(label) == "replacement"}
    assert refused == {
        "csiso2022kr", "hz-gb-2312", "iso-2022-cn", "iso-2022-cn-ext", "iso-2022-kr", "replacement"
    }  # fmt: skip
    for label in {*LABELS} - refused:
        assert decode_declared(b"abc", "a.html", label) == "abc"
    assert message(b"<meta charset=hz-gb-2312>abc") == (
        "a.html declares the encoding 'hz-gb-2312', which browsers refuse to decode. Convert it: "
        "iconv -f hz-gb-2312 -t utf-8 a.html > converted"
    )


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"<meta http-equiv=Content-Type content='text/html; charset=koi8-r'>", "koi8-r"),
        (b"<META HTTP-EQUIV='content-type' CONTENT='text/html;CHARSET = \"koi8-r\"'>", "koi8-r"),
        (b"<meta content='text/html; charset=koi8-r'>", None),
        (b"<meta name=x content='charset=big5'><meta charset=koi8-r>", "koi8-r"),
        (b"<!-- <meta charset=big5> --><meta charset=koi8-r>", "koi8-r"),
        (b"<a title='<meta charset=big5>'><meta charset=koi8-r>", "koi8-r"),
        (b"<script>'<meta charset=big5>'</script><meta charset=koi8-r>", "koi8-r"),
        (b"<meta charset=none><meta charset=koi8-r>", "koi8-r"),
        (b"<?xml version='1.0' encoding='koi8-r'?><p>", "koi8-r"),
        (b"<p>" + b" " * 5000 + b"<meta charset=koi8-r>", "koi8-r"),
        (b"charset=big5", None),
    ],
)
def test_where_an_encoding_is_declared(data: bytes, label: str | None) -> None:
    assert declared_encoding(data, is_xml=False) == label


def test_xml_and_html_disagree() -> None:
    data = b"<?xml version='1.0' encoding='big5'?><meta charset='koi8-r'>"
    assert declared_encoding(data, is_xml=False) == "koi8-r"
    assert declared_encoding(data, is_xml=True) == "big5"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_believed_first(encoding: str) -> None:
    markup = '<meta charset="big5">é'
    assert decode_page(markup.encode(encoding), "a.html", False) == (markup, [])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_xml_in_utf_16_needs_no_mark(encoding: str) -> None:
    markup = '<?xml version="1.0"?><p>é'
    assert decode_page(markup.encode(encoding), "a.html", True) == (markup, [])
    said = message("<p>plain text".encode(encoding))
    assert said == (
        "a.html looks like UTF-16 without a byte order mark. Say so: --encoding "
        f"{encoding.replace('16-', '16')}"
    )
    label = encoding.replace("16-", "16")
    assert decode_page("<p>plain é".encode(encoding), "a", False, label) == ("<p>plain é", [])


def test_bytes_that_are_not_what_is_declared() -> None:
    assert message(b"<meta charset=x-sjis>\xff\xff") == (
        "a.html is not valid shift_jis, which it declares ('x-sjis'): byte 0xff at offset 21. If "
        "it is in another encoding, name that: --encoding LABEL"
    )
    assert "a.html is not valid UTF-8: byte 0xe9 at offset 3." in message(b"<p>\xe9")
    assert "a.html is not valid windows-1253" in message(
        b"<meta charset=greek2><meta charset=cp1253>\xaa"
    )


def test_an_encoding_that_is_given_counts_before_the_one_that_is_declared() -> None:
    data = "<meta charset=latin1>жаба".encode("koi8-r")
    assert decode_page(data, "a", False, "koi8-r") == ("<meta charset=latin1>жаба", [])
    marked = "\ufeff".encode() + "жаба".encode()  # a mark is never wrong
    assert decode_given(marked, "a", "koi8-r") == ("жаба", [])
    assert decode_given("①".encode("cp932"), "a", "x-sjis") == ("①", [])
    text, notes = decode_given("café".encode(), "a", "latin1")
    assert (text, notes) == (
        "cafÃ©",
        [
            "is read as windows-1252, as --encoding says, but its bytes are valid UTF-8, so that "
            "may be wrong"
        ],
    )
    with pytest.raises(DocumentError, match=r"a is not valid euc-kr: byte 0xff at offset 1\. Name"):
        decode_given(b"x\xff\xff", "a", "euc-kr")
    with pytest.raises(DocumentError, match="a is a binary file"):
        decode_given(b"xyz\0", "a", "latin1")


@pytest.mark.parametrize("label", ["utf-7", "latin-one", "", "iso-2022-kr"])
def test_labels_that_the_standard_does_not_have(label: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        check_label(label)
    assert str(caught.value) == (
        f"Unknown encoding {label!r}. Give a label of the WHATWG encoding standard, like "
        "windows-1252, shift_jis or utf-16le."
    )


def test_a_declaration_that_is_probably_wrong_is_noted() -> None:
    data = "<meta charset=latin1>café".encode()
    markup, notes = decode_page(data, "a.html", False)
    assert markup.endswith("cafÃ©")
    assert notes == [
        "declares the encoding 'latin1' and is read as that, but its bytes are valid UTF-8, so "
        "the declaration may be wrong"
    ]


def test_names_of_python_are_not_labels() -> None:
    for name in ("idna", "raw_unicode_escape", "zlib", "mbcs", "utf_8_sig", "cp037", "u8"):
        assert known_encoding(name) is None
