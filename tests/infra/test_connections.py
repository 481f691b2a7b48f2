"""The forms in which Kafka's and PostgreSQL's addresses ask for TLS and a login."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from infra.connections import HttpTarget, kafka_options, postgres_context
from tooling.testing.certificates import Authority


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    """Authority, certificate and key."""
    authority = Authority()
    (tmp_path / "ca.pem").write_text(authority.certificate)
    certificate, key = authority.issue(tmp_path, "agent")
    return str(tmp_path / "ca.pem"), str(certificate), str(key)


def test_kafka_without_a_login_with_one_and_with_tls(files: tuple[str, str, str]) -> None:
    assert kafka_options("a:1,b:2") == {"bootstrap_servers": "a:1,b:2"}
    with_login = kafka_options("kafka://agent:p%40ss@a:1,b:2")
    assert (with_login["bootstrap_servers"], with_login["sasl_plain_password"]) == ("a:1,b:2", "p@ss")
    assert (with_login["security_protocol"], with_login["sasl_mechanism"]) == ("SASL_PLAINTEXT", "SCRAM-SHA-512")
    query = "authority={}&certificate={}&key={}".format(*files)
    with_tls = kafka_options(f"kafkas://agent:pw@a:1?{query}&mechanism=PLAIN")
    assert (with_tls["security_protocol"], with_tls["sasl_mechanism"]) == ("SASL_SSL", "PLAIN")
    assert with_tls["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    assert with_tls["ssl_context"].check_hostname


@pytest.mark.parametrize(
    "servers",
    [
        "http://a:1",
        "kafka://a:1",
        "kafka://agent@a:1",
        "kafka://agent:pw@",
        "kafkas://agent:pw@a:1",
        "kafka://agent:pw@a:1?authority=/x",
        "kafka://agent:pw@a:1?mechanism=GSSAPI",
        "kafkas://agent:pw@a:1?authority=/x&verify=no",
    ],
)
def test_another_form_of_kafkas_address_is_refused_without_its_password(servers: str) -> None:
    with pytest.raises(ValueError, match="must be host:port") as caught:
        kafka_options(servers)
    assert "pw" not in str(caught.value)


def test_postgresql_verifies_the_name_or_has_no_tls(files: tuple[str, str, str]) -> None:
    assert postgres_context({"application_name": "x"}) == (None, {"application_name": "x"})
    query = dict(zip(("sslrootcert", "sslcert", "sslkey"), files, strict=True))
    context, rest = postgres_context(query | {"sslmode": "verify-full", "application_name": "x"})
    assert context is not None
    assert (context.verify_mode, context.check_hostname, rest) == (ssl.CERT_REQUIRED, True, {"application_name": "x"})
    for mode in ("require", "verify-ca", "prefer", "disable"):
        with pytest.raises(ValueError, match="verify-full"):
            postgres_context(query | {"sslmode": mode})
    with pytest.raises(ValueError, match="sslrootcert"):
        postgres_context({"sslmode": "verify-full"})


def test_a_store_is_asked_without_tls_with_the_systems_authorities_or_with_its_own(files: tuple[str, str, str]) -> None:
    assert HttpTarget.parse("http://a:1") == HttpTarget("http://a:1")
    assert HttpTarget.parse("https://user:pw@a:1").context() is None
    query = "cafile={}&certfile={}&keyfile={}".format(*files)
    for end in (query, query.partition("&")[0]):
        target = HttpTarget.parse(f"https://a:1?{end}")
        context = target.context()
        assert context is not None
        assert (target.url, context.verify_mode, context.check_hostname) == ("https://a:1", ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize("url", ["a:1", "ftp://a", "https://", "http://a?cafile=x", "https://u:pw@a?verify=no"])
def test_another_form_of_a_stores_address_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="must be http") as caught:
        HttpTarget.parse(url)
    assert "pw" not in str(caught.value)
