"""Office files whose XML has the names of the strict form (ISO/IEC 29500), which Office can save."""

from __future__ import annotations

import io
import re
import zipfile
from typing import IO

_STRICT = b"http://purl.oclc.org/ooxml/"
_NAME = re.compile(re.escape(_STRICT) + rb"(\w{1,40})/")


def transitional(file: IO[bytes], archive: zipfile.ZipFile) -> IO[bytes]:
    """The file, or a copy with the usual names in place of strict ones, which the libraries do not know."""
    relations = "_rels/.rels"
    if relations not in archive.NameToInfo or _STRICT not in archive.read(relations):
        return file
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            part = archive.read(name)
            if name.endswith((".xml", ".rels")):
                part = _NAME.sub(rb"http://schemas.openxmlformats.org/\1/2006/", part)
            copy.writestr(name, part)
    return out
