"""OpenSearch: one node, without the security plugin, and therefore on loopback only.

With TLS it runs in a network namespace of its own, behind `isolated`, which serves mutual TLS.
"""

from __future__ import annotations

import json
from typing import Any

from tooling.stack.engines import certificates
from tooling.stack.engines.base import Place, Program, write_atomically
from tooling.stack.engines.jars import JAVA, console_log, install_jars

NAME = "opensearch"
PORTS = {"opensearch": 9200, "opensearch_transport": 9300}
_READY = "claw-ready"
# The runner's usual modules, without those that Clawbus does not use, and without analysis-common: with it no index can
# be made, because the wheel's Java lacks the data of the Thai language. The standard analyzer is in the core.
_MODULES = (
    "org.opensearch.transport.Netty4ModulePlugin",
    "org.opensearch.index.mapper.MapperExtrasModulePlugin",
    "org.opensearch.index.reindex.ReindexModulePlugin",
)


def install() -> None:
    install_jars(NAME)


def prepare(place: Place) -> None:
    folder = place.folder(NAME) / "node_1" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "network.host": "127.0.0.1",
        "transport.port": place.ports["opensearch_transport"],
        "discovery.type": "single-node",
        # With the default thresholds it refuses to write on a nearly full disk. `./claw doctor` checks the disk.
        "cluster.routing.allocation.disk.threshold_enabled": "false",
    }
    text = "".join(f"{name}: {value}\n" for name, value in settings.items())
    write_atomically(folder / "opensearch.yml", text)
    write_atomically(folder / "log4j2.properties", console_log("%d %p %c{1.} %m%n"))
    arguments = {
        "-basePath": place.folder(NAME),
        "-clusterName": "claw",
        "-numOfNode": 1,
        # The runner adds the number of the node, 1.
        "-baseHttpPort": place.ports["opensearch"] - 1,
        "-moduleTypes": ",".join(_MODULES),
    }
    words = ", ".join(json.dumps(str(word)) for pair in arguments.items() for word in pair)
    # In BeanShell, because the runner's own main refuses ports above 9299 and has no argument for that. The script
    # waits at its end, because the runner's threads do not keep the process alive.
    script = f"""import org.codelibs.opensearch.runner.OpenSearchRunner;
runner = new OpenSearchRunner();
runner.setMaxHttpPort(-1);
runner.build(new String[] {{{words}}});
Thread.currentThread().join();
"""
    write_atomically(place.folder(NAME) / "start.bsh", script)


def program(place: Place) -> Program:
    java = (*JAVA, "-Xms256m", "-Xmx512m", "-cp", f"{install_jars(NAME)}/*")
    server = (*java, "bsh.Interpreter", str(place.folder(NAME) / "start.bsh"))
    with_tls = certificates.folder(place, NAME).exists()
    return Program((*certificates.isolated(place, NAME), *server) if with_tls else server)


async def ready(place: Place) -> str:
    """Stores a document and finds it."""
    async with certificates.store_client(place, NAME) as client:
        document = f"/{_READY}/_doc/1"
        stored = await client.put(document, params={"refresh": "true"}, json={"ready": True})
        stored.raise_for_status()
        found = await client.get(f"/{_READY}/_search", params={"q": "ready:true"})
        if found.raise_for_status().json()["hits"]["total"]["value"] != 1:
            raise ConnectionError("opensearch did not find the stored document")
        return str((await client.get("/")).json()["version"]["number"])


def access(place: Place) -> dict[str, Any]:
    return {"url": certificates.store_url(place, NAME, certificates.ADMIN)}
