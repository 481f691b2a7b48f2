"""An S3 server: S3Proxy on a plain folder. It has one account. With TLS it shows a certificate and asks for none."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from infra.connections import HttpTarget
from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, Place, Program, write_atomically
from tooling.stack.engines.jars import JAVA, install_jars

NAME = "s3"
PORTS = {"s3": 9000}
_VERSION = "2.6.0"
_READY = "claw-ready"
_ACCESS_KEY = "claw"


def install() -> None:
    install_jars(NAME)


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    (folder / "data").mkdir(exist_ok=True)
    settings = {
        **_listener(place),
        "s3proxy.authorization": "aws-v2-or-v4",
        "s3proxy.identity": _ACCESS_KEY,
        "s3proxy.credential": place.secret("s3.admin"),
        "jclouds.provider": "filesystem-nio2",
        "jclouds.identity": "local",
        "jclouds.credential": "local",
        "jclouds.filesystem.basedir": str(folder / "data"),
    }
    text = "".join(f"{name}={value}\n" for name, value in settings.items())
    write_atomically(folder / "s3proxy.conf", text)


def program(place: Place) -> Program:
    [jar] = install_jars(NAME).glob("*.jar")
    options = ("-Xmx192m", "-DLOG_LEVEL=warn")
    return Program((*JAVA, *options, "-jar", str(jar), "--properties", str(place.folder(NAME) / "s3proxy.conf")))


async def ready(place: Place) -> str:
    """Stores an object and reads it back."""
    await asyncio.to_thread(_round_trip, place)
    return _VERSION


def access(place: Place) -> dict[str, Any]:
    endpoint = certificates.store_url(place, NAME, certificates.ADMIN)
    return {"endpoint": endpoint, "access_key": _ACCESS_KEY, "secret_key": place.secret("s3.admin")}


def _listener(place: Place) -> dict[str, str]:
    """The settings of the port, and the key store with the certificate if there is one."""
    address = f"127.0.0.1:{place.ports['s3']}"
    own = certificates.folder(place, NAME)
    if not own.exists():
        return {"s3proxy.endpoint": f"http://{address}"}
    store, password = place.folder(NAME) / "keystore.p12", place.secret("s3.keystore")
    write_atomically(store, certificates.key_store(own, password))
    return {
        "s3proxy.secure-endpoint": f"https://{address}",
        "s3proxy.keystore-path": str(store),
        "s3proxy.keystore-password": password,
    }


def _round_trip(place: Place) -> None:
    import urllib3
    from minio import Minio

    tls = HttpTarget.parse(certificates.store_url(place, NAME, certificates.ADMIN)).context()
    with urllib3.PoolManager(ssl_context=tls, timeout=ANSWER_SECONDS, retries=False) as pool:
        keys = (_ACCESS_KEY, place.secret("s3.admin"))
        client = Minio(f"127.0.0.1:{place.ports['s3']}", *keys, secure=tls is not None, http_client=pool)
        if not client.bucket_exists(_READY):
            client.make_bucket(_READY)
        client.put_object(_READY, "ready", io.BytesIO(b"ready"), 5)
        client.get_object(_READY, "ready").close()
