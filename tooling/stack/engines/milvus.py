"""Milvus standalone: the real server, from a wheel that exists for 64-bit Linux on Intel only.

It listens on every interface, without a password, and has no setting against that. So it runs in a network namespace of
its own if the machine allows one; otherwise ``./claw doctor`` warns. With TLS the program before it serves mutual TLS.
"""

from __future__ import annotations

import lzma
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tooling.stack.engines import certificates
from tooling.stack.engines.base import (
    EngineError,
    Place,
    Program,
    cache_folder,
    complete,
    package_folder,
    write_atomically,
)

NAME = "milvus"
PORTS = {
    "milvus": 19530,
    "milvus_proxy_internal": 19529,
    "milvus_query_coord": 19531,
    "milvus_root_coord": 19532,
    "milvus_query_node": 19533,
    "milvus_index_coord": 19534,
    "milvus_index_node": 19535,
    "milvus_data_coord": 19536,
    "milvus_data_node": 19537,
    "milvus_etcd": 19538,
    "milvus_etcd_peer": 19539,
    "milvus_metrics": 19540,
}
_VERSION = "2.3.5"
# The path of the run-time folder is fixed in the program: the first of these two, or the second if the first cannot be
# made. The first user of a machine who starts Milvus owns that folder, and the Milvus of every other user would fail.
# The replacement has the same length and is relative to the working directory, so that each stack has its own folder.
_FIXED_RUN_FOLDERS = b"/run/milvus/tmp/milvus"
_OWN_RUN_FOLDER = b"run/process"


def install() -> None:
    _unpacked()


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    data = folder / "data"
    (folder / "configs").mkdir(exist_ok=True)
    values = {
        "proxy_port": place.ports["milvus"],
        **{f"{name.removeprefix('milvus_')}_port": place.ports[name] for name in PORTS if name != "milvus"},
        "etcd_data_dir": data / "etcd.data",
        "etcd_log_level": "error",
        "local_storage_dir": data,
        "rocksmq_data_dir": data / "rocksmq",
        # Empty: the log goes to standard output, so that the supervisor rotates it as it does all others.
        "system_log_path": "",
    }
    template = (package_folder("milvus") / "data" / "config.yaml.template").read_text()
    # {{ key(type): default }}
    settings = re.sub(
        r"\{\{ *(\w+)(?:\(\w+\))?(?:: *(.*?))? *\}\}",
        lambda found: str(values.get(found[1], found[2] or "")),
        template,
    )
    # Otherwise its parts call each other at the machine's first address, which may change.
    settings = re.sub(r"(?m)^  ip:.*", "  ip: 127.0.0.1", settings)
    settings = re.sub(r"(?m)^log:\n  level: \w+", "log:\n  level: warn", settings)
    # By default Milvus searches rows whose index is not built yet by a quick index of its own, which misses some.
    # Without it, these rows are compared one by one; the rows of other partitions are not looked at.
    settings = re.sub(r"(interimIndex:.*\n +enableIndex): true", r"\1: false", settings)
    write_atomically(folder / "configs" / "milvus.yaml", settings)
    write_atomically(folder / "configs" / "glog.conf", "--logtostderr=true\n--minloglevel=1\n")
    client, peer = (f"http://127.0.0.1:{place.ports[name]}" for name in ("milvus_etcd", "milvus_etcd_peer"))
    etcd = {
        "name": "default",
        "data-dir": data / "etcd.data",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "log-level": "error",
    }
    write_atomically(folder / "etcd.yaml", "".join(f"{name}: {value}\n" for name, value in etcd.items()))


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    programs = _unpacked()
    environment = {
        "DEPLOY_MODE": "STANDALONE",
        "ETCD_CONFIG_PATH": str(folder / "etcd.yaml"),
        "METRICS_PORT": str(place.ports["milvus_metrics"]),
        "MILVUSCONF": str(folder / "configs"),
    }
    # `env`: the libraries are for the server only, and not for the Python program before it.
    server = ("env", f"LD_LIBRARY_PATH={programs}", str(programs / "milvus"), "run", "standalone")
    return Program((*certificates.isolated(place, NAME), *server), environment)


async def ready(place: Place) -> str:
    """Lists the collections, through the proxy and the root coordinator."""
    async with certificates.store_client(place, NAME) as client:
        answer = await client.get("/v1/vector/collections")
    if answer.status_code != 200 or answer.json().get("code") != 200:
        raise ConnectionError(f"milvus answered {answer.text}")
    return _VERSION


def access(place: Place) -> dict[str, Any]:
    return {"url": certificates.store_url(place, NAME, certificates.ADMIN)}


def _unpacked() -> Path:
    """The folder of the wheel's programs. They are unpacked once for all stacks of this user."""
    folder = cache_folder() / f"milvus-{_VERSION}-own-run-folder"
    if folder.exists():
        return folder
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for packed in (package_folder("milvus") / "data" / "bin").glob("*.lzma"):
            with lzma.open(packed) as source, (fresh / packed.stem).open("wb") as target:
                shutil.copyfileobj(source, target)
            (fresh / packed.stem).chmod(0o755)
        server = (fresh / "milvus").read_bytes()
        if server.count(_FIXED_RUN_FOLDERS) != 1:
            raise EngineError("the package milvus has another server than the pinned one: reinstall it from the pins")
        (fresh / "milvus").write_bytes(server.replace(_FIXED_RUN_FOLDERS, 2 * _OWN_RUN_FOLDER))
        complete(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
