"""Small PDFs that no writer makes: what damages or odd programs leave behind."""

from __future__ import annotations

HELVETICA = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"
PICTURE = "q 100 0 0 100 50 50 cm BI /W 1 /H 1 /CS /G /BPC 8 ID \x80 EI Q"
FIRST_MORE = 4  # number of the first object of ``more``


def line(text: str, font: str = "F1") -> str:
    """A content stream that shows ``text``, a string `(...)` or `<...>` of PDF."""
    return f"BT /{font} 12 Tf 50 700 Td {text} Tj ET"


def stream(content: bytes | str, dictionary: str = "") -> bytes:
    data = content if isinstance(content, bytes) else content.encode("latin-1")
    head = f"<<{dictionary}/Length {len(data)}>>\nstream\n".encode()
    return head + data + b"\nendstream"


def tiny_pdf(
    *contents: str,
    font: str = HELVETICA,
    catalog: str = "",
    page: str = "",
    more: tuple[str | bytes, ...] = (),
) -> bytes:
    """A PDF with a page for each of ``contents``; ``more`` are objects from FIRST_MORE on."""
    first = FIRST_MORE + len(more)
    kids = " ".join(f"{first + 2 * i} 0 R" for i in range(len(contents)))
    objects: list[str | bytes] = [
        f"<</Type/Catalog/Pages 2 0 R{catalog}>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(contents)}>>",
        font,
        *more,
    ]
    for number, content in enumerate(contents):
        resources = f"/Resources<</Font<</F1 3 0 R/F2<<{HELVETICA[2:]}>>>>"
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]{resources}"
            f"/Contents {first + 2 * number + 1} 0 R{page}>>",
            stream(content),
        ]
    return written(objects)


def written(objects: list[str | bytes]) -> bytes:
    """A file of these objects; the first is its root."""
    out, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        body = content if isinstance(content, bytes) else content.encode("latin-1")
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    xref = b"xref\n0 %d\n0000000000 65535 f \n" % size + table
    return (
        out
        + xref
        + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n"
        % (
            size,
            len(out),
        )
    )
