"""Marks a PDF/A-3 that has an e-invoice attached as Factur-X 1.0, by its XMP metadata. Pure.

Source: Factur-X 1.0, "PDF/A-3 and XMP"; the extension schema is the one that the specification comes with.
"""

from __future__ import annotations

import re

FILE_NAME = "factur-x.xml"
_NAMESPACE = "urn:factur-x:pdfa:CrossIndustryDocument:invoice:1p0#"
_PROPERTIES = (
    ("DocumentFileName", FILE_NAME, "The name of the embedded XML document"),
    ("DocumentType", "INVOICE", "The type of the hybrid document in capital letters, e.g. INVOICE or ORDER"),
    ("Version", "1.0", "The actual version of the standard applying to the embedded XML document"),
    ("ConformanceLevel", "EN 16931", "The conformance level of the embedded XML document"),
)
# As typst writes them.
_METADATA = re.compile(
    rb"\n(\d+) 0 obj\n<</Length \d+/Type/Metadata/Subtype/XML>>\nstream\n(.*?)\nendstream", re.DOTALL
)
_TRAILER = re.compile(rb"trailer\n<<(.*)>>\nstartxref\n(\d+)\n%%EOF\s*\Z", re.DOTALL)
# The end of the list of schemas that PDF/A does not know, and the end of the metadata.
_SCHEMAS_END, _END = "</rdf:Bag></pdfaExtension:schemas>", "</rdf:RDF>"


def mark(document: bytes) -> bytes:
    """Appends the new metadata to a PDF by typst as an incremental update (ISO 32000-1, 7.5.6).

    Raises ValueError if the PDF is not written as by typst.
    """
    trailer = _TRAILER.search(document, document.rfind(b"trailer"))
    found = _METADATA.findall(document)
    if not trailer or not found:
        raise ValueError("the PDF has no plain metadata or no plain trailer")
    # typst writes the metadata last. An earlier match would be a text of a tenant.
    number, text = int(found[-1][0]), found[-1][1].decode()
    if text.count(_SCHEMAS_END) != 1 or text.count(_END) != 1:
        raise ValueError("the metadata of the PDF has no single list of extension schemas")
    new = text.replace(_SCHEMAS_END, _schema() + _SCHEMAS_END).replace(_END, _description() + _END).encode()
    start = len(document)
    body = b"%d 0 obj\n<</Type/Metadata/Subtype/XML/Length %d>>\nstream\n%b\nendstream\nendobj\n" % (
        number,
        len(new),
        new,
    )
    table = b"xref\n%d 1\n%010d 00000 n \ntrailer\n<<%b/Prev %b>>\nstartxref\n%d\n%%%%EOF\n"
    return document + body + table % (number, start, trailer[1], trailer[2], start + len(body))


def _schema() -> str:
    properties = "".join(
        '<rdf:li rdf:parseType="Resource">'
        f"<pdfaProperty:name>{name}</pdfaProperty:name><pdfaProperty:valueType>Text</pdfaProperty:valueType>"
        f"<pdfaProperty:category>external</pdfaProperty:category>"
        f"<pdfaProperty:description>{description}</pdfaProperty:description></rdf:li>"
        for name, _, description in _PROPERTIES
    )
    return (
        '<rdf:li rdf:parseType="Resource"><pdfaSchema:schema>Factur-X PDFA Extension Schema</pdfaSchema:schema>'
        f"<pdfaSchema:namespaceURI>{_NAMESPACE}</pdfaSchema:namespaceURI><pdfaSchema:prefix>fx</pdfaSchema:prefix>"
        f"<pdfaSchema:property><rdf:Seq>{properties}</rdf:Seq></pdfaSchema:property></rdf:li>"
    )


def _description() -> str:
    values = "".join(f"<fx:{name}>{value}</fx:{name}>" for name, value, _ in _PROPERTIES)
    return f'<rdf:Description rdf:about="" xmlns:fx="{_NAMESPACE}">{values}</rdf:Description>'
