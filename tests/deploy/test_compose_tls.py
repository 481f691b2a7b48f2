"""With compose.tls.yml over compose.yml, no connection is without TLS but those that the file names."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import pytest
import yaml
from cryptography import x509

from infra.connections import TLS_FILES, HttpTarget, kafka_options, postgres_context
from infra.web.rpc import Tls
from tooling.cli import compose
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES

BASE, OVERLAY = (yaml.safe_load((CHECKOUT / name).read_text()) for name in ("compose.yml", "compose.tls.yml"))
CONTAINERS: dict[str, Any] = OVERLAY["services"]
ENGINES = ("postgres", "redis", "kafka", "rabbitmq", "minio", "elasticsearch")
# Without TLS: a store that only its users reach, and the receiver of spans.
PLAIN = {"http://memory:${MEMORY_MILVUS_PASSWORD:?}@milvus:19530", "http://otel-collector:4318"}


def merged(name: str) -> dict[str, str]:
    """The variables of a container with both files."""
    return {**BASE["services"].get(name, {}).get("environment", {}), **CONTAINERS[name].get("environment", {})}


def test_it_is_valid_by_the_compose_specification_and_changes_parts_that_exist() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(OVERLAY)
    assert set(CONTAINERS) - set(BASE["services"]) == {"certificates"}
    used = {
        volume.partition(":")[0]
        for container in CONTAINERS.values()
        for volume in container.get("volumes", ())
        if not volume.startswith(".")
    }
    assert used == set(OVERLAY["volumes"])


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the container makes the certificates; it has tried to give each to its user."""
    folder = tmp_path_factory.mktemp("certificates")
    given: dict[Path, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "chown", lambda file, user, _: given.update({Path(file): user}))
        compose.certificates(folder)
    kept = {path for path in (folder / "tls").rglob("*.pem") if "public" not in path.parts}
    assert kept - set(given) == {folder / "tls" / "authority.pem"}
    assert {given[folder / "tls" / name / "key.pem"] for name in ("postgres", "nginx", "user")} == {999, 101, 10001}
    return folder / "tls"


def test_each_part_gets_its_own_key_and_no_other(issued: Path) -> None:
    volumes = {name: container.get("volumes", ()) for name, container in CONTAINERS.items()}
    owners = {folder.name for folder in issued.iterdir() if folder.is_dir()}
    made = {volume.partition(":")[0] for volume in volumes.pop("certificates")}
    assert made == {"tls_authority", *(f"tls_{owner}" for owner in owners)}
    for name, mounted in volumes.items():
        own = {volume.partition(":")[0] for volume in mounted if volume.startswith("tls_")}
        wanted = (
            name if (issued / name).exists() else "admin" if name in ("provision", "backup", "operator") else "public"
        )
        assert own <= {f"tls_{wanted}"}, name
        assert all(volume.endswith(":ro") for volume in mounted), name
    assert [path.name for path in (issued / "public").iterdir()] == ["ca.pem"]
    assert (issued / "kafka" / "keystore.pem").read_text().count("BEGIN") == 2


@pytest.mark.parametrize("name", [*SERVICES, *ENGINES])
def test_a_certificate_names_its_part(issued: Path, name: str) -> None:
    tls = Tls.read(issued / name)
    names = x509.load_pem_x509_certificate(tls.certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == [name]
    assert tls.authority == (issued / "authority.pem").read_bytes()


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_reaches_each_store_and_service_by_tls(issued: Path, name: str) -> None:
    variables = merged(name)
    assert variables["CLAW_TLS_FOLDER"] == "/tls"
    plain = {value for value in variables.values() if re.match(r"(http|redis|amqp|kafka)://", str(value))}
    assert plain <= PLAIN
    here = {key: str(value).replace("/tls/", f"{issued / name}/").replace(":?", "") for key, value in variables.items()}
    for url in (here["CLAW_DATABASE_URL"], here["CLAW_REQUEST_DATABASE_URL"]):
        context, _ = postgres_context(dict(parse_qsl(urlsplit(url).query)))
        assert context
    assert kafka_options(here["CLAW_KAFKA_BOOTSTRAP_SERVERS"])["security_protocol"] == "SASL_SSL"
    for scheme, url in (("rediss", here["CLAW_REDIS_URL"]), ("amqps", here["CLAW_RABBITMQ_URL"])):
        files = [value for _, value in parse_qsl(urlsplit(url).query)]
        assert urlsplit(url).scheme == scheme
        assert sorted(files) == sorted(str(issued / name / file) for file in TLS_FILES)
    for variable in ("CLAW_S3_ENDPOINT", "CLAW_OPENSEARCH_URL"):
        if variable in here:
            assert HttpTarget.parse(here[variable]).context()
    # The same account as without TLS.
    for variable in ("CLAW_DATABASE_URL", "CLAW_RABBITMQ_URL", "CLAW_KAFKA_BOOTSTRAP_SERVERS", "CLAW_REDIS_URL"):
        before = BASE["services"][name]["environment"][variable]
        assert (
            urlsplit(variables[variable].replace(":?", "")).netloc.rpartition("@")[0]
            == (urlsplit(before.replace(":?", "")).netloc.rpartition("@")[0])
        )


def test_the_engines_serve_nothing_without_tls_and_ask_for_a_certificate() -> None:
    redis = CONTAINERS["redis"]["command"]
    assert (redis[redis.index("--port") + 1], redis[redis.index("--tls-auth-clients") + 1]) == ("0", "yes")
    kafka = merged("kafka")
    assert kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"] == "CONTROLLER:PLAINTEXT,CLIENT:SASL_SSL"
    assert kafka["KAFKA_LISTENER_NAME_CLIENT_SSL_CLIENT_AUTH"] == "required"
    rabbitmq = (CHECKOUT / "infra/deploy/rabbitmq/tls.conf").read_text()
    assert "listeners.tcp = none" in rabbitmq
    assert "fail_if_no_peer_cert = true" in rabbitmq
    rules = [
        line.split()
        for line in (CHECKOUT / "infra/deploy/postgres-tls/pg_hba.conf").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ["hostssl", "all", "all", "all", "scram-sha-256", "clientcert=verify-ca"] in rules
    # pg_dump of the backup: the administrator alone.
    assert [rule for rule in rules if rule[0] not in ("local", "hostssl")] == [
        ["hostnossl", "claw", "claw", "all", "scram-sha-256"]
    ]
    assert "ssl=on" in CONTAINERS["postgres"]["command"]
    # The settings without TLS stay.
    for name in ("postgres", "redis"):
        command = CONTAINERS[name]["command"]
        assert command[: len(BASE["services"][name]["command"])] == BASE["services"][name]["command"]
    assert merged("elasticsearch")["xpack.security.http.ssl.enabled"] == "true"
    assert "--certs-dir" in CONTAINERS["minio"]["entrypoint"][-1]


def test_the_gateway_reaches_the_services_by_mutual_tls() -> None:
    folder = merged("provision")["CLAW_INSIDE_TLS"]
    assert CONTAINERS["nginx"]["volumes"] == [f"tls_nginx:{folder}:ro"]
    text = compose.gateway_configuration(inside=folder)
    assert f'proxy_ssl_certificate_key "{folder}/key.pem";' in text
    assert "proxy_ssl_verify on;" in text
    assert "proxy_pass http://" not in text


def test_prometheus_asks_the_services_by_tls() -> None:
    script = CONTAINERS["prometheus"]["entrypoint"][-1]
    [(edit, source)] = re.findall(r"sed '(.*?)' (\S+) >", script, re.DOTALL)
    file = CHECKOUT / "infra/deploy/prometheus" / Path(source).name
    done = subprocess.run(["sed", edit, str(file)], check=True, capture_output=True, text=True)
    services, *others = yaml.safe_load(done.stdout)["scrape_configs"]
    assert (services["scheme"], services["tls_config"]["key_file"]) == ("https", "/tls/key.pem")
    assert [job for job in others if "tls_config" in job] == []
