"""compose.yml agrees with its specification, with the settings of the services, and with the catalog.

The images cannot be pulled here, so the tests check only the facts that do not need them.
`compose-spec.json` is the specification's own schema (compose-spec/compose-spec, Apache-2.0), unchanged.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry

from infra.connections import kafka_options
from infra.observe.metrics import Metrics
from infra.stores.objects import BUCKET
from protos.catalog import CATALOG
from protos.topology import Catalog
from services.log_aggregator.audit.stored_heads import BUCKET as HEADS
from tooling.cli import compose
from tooling.stack import operator, provision
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import sha256
from tooling.stack.home import SERVICE_PORTS, SERVICES
from tooling.stack.keys import master_file, private_file, public_file

DEPLOY = CHECKOUT / "infra" / "deploy"


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHECKOUT / "compose.yml").read_text())
    return loaded


CONTAINERS: dict[str, Any] = document()["services"]
# Variables of names, which look like secrets.
NAMES = {
    *("CLAW_PRIVATE_KEY_FILE", "CLAW_S3_ACCESS_KEY", "MINIO_ACCESS_KEY_ID", "KAFKA_AUTHORIZER_CLASS_NAME"),
    "COMMON_SECURITY_AUTHORIZATIONENABLED",
}
STORES = {"postgres", "redis", "kafka", "rabbitmq", "etcd", "minio", "milvus", "elasticsearch"}


def test_it_is_valid_by_the_compose_specification() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(document())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({"services": {"a": {"imagee": "b"}}})


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_its_ports_and_every_variable_that_it_must_have_and_none_that_it_does_not_read(
    name: str,
) -> None:
    environment = CONTAINERS[name]["environment"]
    assert CONTAINERS[name]["command"][-1] == f"services.{name}"
    assert environment["CLAW_HTTP_PORT"] == str(SERVICE_PORTS[name])
    assert environment["CLAW_GRPC_PORT"] == str(SERVICE_PORTS[f"{name}_grpc"])
    settings = importlib.import_module(f"services.{name}.__main__").service.settings
    read = {
        str(info.validation_alias or f"CLAW_{field}").upper(): info.is_required()
        for field, info in settings.model_fields.items()
    }
    assert {variable for variable, needed in read.items() if needed} - set(environment) == set()
    # Passwords of stores too: only the services that use one have it.
    assert set(environment) - set(read) == set()


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_the_addresses_of_each_other(name: str) -> None:
    for variable, value in CONTAINERS[name]["environment"].items():
        for other, port in re.findall(r"(?:^|[=/,])([a-z_]+):(\d+)", str(value)):
            if other in SERVICES:
                kind = f"{other}_grpc" if "GRPC" in variable or variable == "CLAW_OPERATIONS" else other
                assert int(port) == SERVICE_PORTS[kind], f"{name}: {variable}={value}"


def test_only_the_gateway_is_published_and_stores_are_on_the_backend_alone() -> None:
    assert [name for name, container in CONTAINERS.items() if "ports" in container] == ["nginx"]
    assert sorted(CONTAINERS["nginx"]["networks"]) == ["frontend", "public"]
    networks = document()["networks"]
    assert [name for name, network in networks.items() if not (network or {}).get("internal")] == ["public", "frontend"]
    for name in STORES:
        assert all(networks[network] for network in CONTAINERS[name]["networks"]), name


@pytest.mark.parametrize(
    ("network", "members"),
    [
        # etcd asks for no password.
        ("metadata", {"etcd", "milvus"}),
        ("vectors", {"memory", "milvus", "milvus-users", "operator"}),
        ("objects", {"agent", "channel", "memory", "milvus", "minio", "minio-users"}),
        ("audit", {"log_aggregator", "minio", "backup"}),
        ("search", {"log_aggregator", "elasticsearch", "elasticsearch-users", "kibana", "kibana-objects", "operator"}),
    ],
)
def test_a_store_is_reached_only_by_the_containers_that_need_it(network: str, members: set[str]) -> None:
    assert {name for name, container in CONTAINERS.items() if network in container.get("networks", ())} == members
    for name in members & STORES:
        assert "backend" not in CONTAINERS[name]["networks"], name


def test_no_service_has_an_administrators_password_of_a_store() -> None:
    administrators = "MINIO_ROOT|ELASTIC|POSTGRES|RABBITMQ|KAFKA|REDIS|MILVUS"
    for name in SERVICES:
        text = json.dumps(CONTAINERS[name]["environment"])
        assert not re.search(rf"\{{({administrators})_PASSWORD", text), name
    assert "MINIO_ROOT" not in json.dumps(CONTAINERS["milvus"]["environment"])


def test_every_container_has_a_memory_limit_and_services_do_not_run_as_root_and_cannot_write() -> None:
    assert [name for name, container in CONTAINERS.items() if "mem_limit" not in container] == []
    for name in SERVICES:
        assert CONTAINERS[name]["read_only"]
        assert CONTAINERS[name]["cap_drop"] == ["ALL"]
    assert re.search(r"^USER (?!root)\w+", (DEPLOY / "docker" / "Dockerfile").read_text(), re.MULTILINE)


def test_the_log_of_a_container_does_not_grow_without_limit() -> None:
    containers = CONTAINERS | yaml.safe_load((CHECKOUT / "compose.tls.yml").read_text())["services"]
    limits = {name: container.get("logging") for name, container in CONTAINERS.items()}
    limits["certificates"] = containers["certificates"].get("logging")
    limit = {"driver": "local", "options": {"max-size": "10m", "max-file": "3"}}
    assert {name: found for name, found in limits.items() if found != limit} == {}


def test_the_operators_commands_have_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    container = CONTAINERS["operator"]
    assert container["entrypoint"] == ["python", "-m", "tooling.cli"]
    # It is for the times when something does not run.
    assert not container["depends_on"]
    for variable, value in container["environment"].items():
        monkeypatch.setenv(variable, value.replace(":?", ""))
    access = operator.access()
    assert access["base_url"] == "${CLAW_TLS_URL:-http://nginx:8080}"
    assert access["admin_token"] == "${CLAW_ADMIN_TOKEN}"
    folder = operator.keys_folder()
    assert set(container["volumes"]) == {f"keys_{name}:{master_file(folder, name).parent}:ro" for name in SERVICES}
    hosts = {engine: urlsplit(*found.values()).hostname for engine, found in access["engines"].items()}
    assert hosts == {"postgres": "postgres", "kafka": "kafka", "milvus": "milvus", "opensearch": "elasticsearch"}
    for host in (*hosts.values(), "nginx"):
        assert set(CONTAINERS[host]["networks"]) & set(container["networks"]), host


def run_script(container: str, program: str, folder: Path) -> list[list[str]]:
    """The arguments of each call of `program` in a container's script. A file among them is replaced by its content."""
    fake = folder / program
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "words = [open(word).read() if os.path.isfile(word) else word for word in sys.argv[1:]]\n"
        f"open({str(folder / 'calls')!r}, 'a').write(json.dumps(words) + '\\n')\n"
        """print('{"success":true,"code":0}')\n"""
    )
    fake.chmod(0o755)
    found = CONTAINERS[container]
    [*_, flags, script] = found.get("entrypoint") or found["command"]
    values = {name: f"value of {name}" for name in found["environment"]}
    environment = {**values, "PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    subprocess.run(["sh", flags, script.replace("$$", "$")], env=environment, check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_log_aggregators_user_has_its_own_indices_only(tmp_path: Path) -> None:
    sent = {}
    for call in run_script("elasticsearch-users", "curl", tmp_path):
        sent[call[-1].partition("/_security/")[2]] = json.loads(call[call.index("-d") + 1])
    assert sent["role/log_aggregator"]["indices"] == [{"names": ["clawbus-*"], "privileges": ["all"]}]
    assert "all" not in sent["role/log_aggregator"]["cluster"]
    assert sent["user/log_aggregator"]["roles"] == ["log_aggregator"]
    assert sent["user/log_aggregator"]["password"] == "value of LOG_AGGREGATOR_ELASTIC_PASSWORD"
    assert sent["user/kibana_system/_password"] == {"password": "value of KIBANA_PASSWORD"}


def test_the_saved_objects_are_brought_into_kibana(tmp_path: Path) -> None:
    [call] = run_script("kibana-objects", "curl", tmp_path)
    assert call[-1] == "http://kibana:5601/api/saved_objects/_import?overwrite=true"
    [(host, path, _)] = [volume.split(":") for volume in CONTAINERS["kibana-objects"]["volumes"]]
    [file] = [word.removeprefix("file=@") for word in call if word.startswith("file=@")]
    assert (CHECKOUT / host / Path(file).relative_to(path)).is_file()
    # Kibana refuses a request without this header.
    assert "kbn-xsrf: true" in call


def test_each_user_of_the_object_store_has_its_own_bucket_only(tmp_path: Path) -> None:
    calls = run_script("minio-users", "mc", tmp_path)
    policies = {call[4]: json.loads(call[5]) for call in calls if call[1:3] == ["policy", "create"]}
    assert {name: policy["Statement"][0]["Resource"] for name, policy in policies.items()} == {
        **{name: [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"] for name in ("agent", "channel", "memory")},
        "milvus": ["arn:aws:s3:::a-bucket", "arn:aws:s3:::a-bucket/*"],
        "log_aggregator": [f"arn:aws:s3:::{HEADS}", f"arn:aws:s3:::{HEADS}/*"],
    }
    assert ["admin", "user", "add", "minio", "memory", "value of MEMORY_MINIO_PASSWORD"] in calls
    assert ["admin", "policy", "attach", "minio", "milvus", "--user", "milvus"] in calls
    # The writer of the heads cannot delete one or change the bucket. The lock keeps the versions of an object that it
    # might overwrite.
    [heads] = policies["log_aggregator"]["Statement"]
    assert heads["Action"] == ["s3:ListBucket", "s3:GetObject", "s3:PutObject"]
    made = calls.index(["mb", "--ignore-existing", "--with-lock", f"minio/{HEADS}"])
    assert calls[made + 1] == ["retention", "set", "--default", "compliance", "400d", f"minio/{HEADS}"]


def test_memory_has_a_user_of_milvus_that_may_use_collections_only(tmp_path: Path) -> None:
    assert CONTAINERS["milvus"]["environment"]["COMMON_SECURITY_AUTHORIZATIONENABLED"] == "true"
    calls = [
        (call[-1].partition("/v2/vectordb/")[2], json.loads(call[call.index("-d") + 1]), call[call.index("-H") + 1])
        for call in run_script("milvus-users", "curl", tmp_path)
    ]
    assert {header for _, _, header in calls} == {"Authorization: Bearer root:value of MILVUS_PASSWORD"}
    asked = [(path, body) for path, body, _ in calls]
    assert ("users/create", {"userName": "memory", "password": "value of MEMORY_MILVUS_PASSWORD"}) in asked
    assert asked[-1] == ("users/grant_role", {"userName": "memory", "roleName": "memory"})
    given = {body["privilege"] for path, body in asked if path == "roles/grant_privilege_v2"}
    assert given == {"DatabaseAdmin", "CollectionAdmin"}
    url = urlsplit(CONTAINERS["memory"]["environment"]["CLAW_MILVUS_URL"].replace(":?", ""))
    assert (url.username, url.hostname) == ("memory", "milvus")


def test_redis_knows_an_account_for_each_service_and_no_other_way_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = CONTAINERS["provision"]["environment"]
    for variable in environment:
        monkeypatch.setenv(variable, f"value of {variable}")
    for variable, name in (("GATEWAY_CONFIG", "nginx.conf"), ("REDIS_ACCOUNTS", "users.acl"), ("KEYS_FOLDER", "keys")):
        monkeypatch.setenv(f"CLAW_{variable}", str(tmp_path / name))
    monkeypatch.setattr(compose, "make_keys", Mock())
    monkeypatch.setattr(compose, "bring_up_to_date", AsyncMock())
    compose.provision()
    written = (tmp_path / Path(environment["CLAW_REDIS_ACCOUNTS"]).name).read_text()
    assert "value of" not in written
    lines = dict(line.removeprefix("user ").split(" ", 1) for line in written.splitlines())
    assert lines.pop("default") == "off"
    assert set(lines) == {"admin", *SERVICES}
    for name in SERVICES:
        assert sha256(f"value of {name.upper()}_REDIS_PASSWORD") in lines[name]
        url = CONTAINERS[name]["environment"]["CLAW_REDIS_URL"]
        assert url == f"redis://{name}:${{{name.upper()}_REDIS_PASSWORD:?}}@redis:6379/0"
    command = CONTAINERS["redis"]["command"]
    [folder] = [volume.split(":")[1] for volume in CONTAINERS["redis"]["volumes"] if "accounts" in volume]
    assert command[command.index("--aclfile") + 1] == f"{folder}/users.acl"


def test_the_file_holds_no_secret() -> None:
    for name, container in CONTAINERS.items():
        for variable, value in container.get("environment", {}).items():
            if re.search(r"PASS|SECRET|TOKEN|AUTH|KEY$", variable) and variable not in NAMES:
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:[?-]\}", str(value)), f"{name}: {variable}"
        assert not re.search(r"://[^$/\s]*:[^$/\s@]+@", json.dumps(container)), name


def test_an_image_is_named_by_its_digest_if_the_comment_does_not_name_it() -> None:
    [unknown] = re.findall(
        r"digests of ([^.]+) are not known", (CHECKOUT / "compose.yml").read_text().replace("\n#", "")
    )
    names = set(re.split(r", | and ", unknown.lower()))
    for container in CONTAINERS.values():
        path, _, digest = container["image"].partition("@")
        name = path.rpartition("/")[2].partition(":")[0]
        known = name != "clawbus" and name not in names
        assert bool(re.fullmatch(r"sha256:[0-9a-f]{64}", digest)) == known, path


def test_the_image_has_a_closed_folder_for_the_keys_of_each_service() -> None:
    [made] = re.findall(
        r"install -d -m 700 -o clawbus ((?:/keys/\w+[\s\\]*)+)", (DEPLOY / "docker" / "Dockerfile").read_text()
    )
    assert set(re.findall(r"/keys/(\w+)", made)) == set(SERVICES)


def test_volumes_that_are_used_are_named_and_named_ones_are_used() -> None:
    used = {
        volume.partition(":")[0]
        for container in CONTAINERS.values()
        for volume in container.get("volumes", ())
        if not volume.startswith((".", "/"))
    }
    assert used == set(document()["volumes"])


def test_a_service_has_its_own_private_key_only() -> None:
    environment = CONTAINERS["provision"]["environment"]
    for name in SERVICES:
        assert CONTAINERS[name]["volumes"][:2] == ["keys_public:/keys/public:ro", f"keys_{name}:/keys/own:ro"]
        assert (
            f"keys_{name}:{private_file(Path(environment['CLAW_KEYS_FOLDER']), name).parent}"
            in (CONTAINERS["provision"]["volumes"])
        )
        own = CONTAINERS[name]["environment"]
        assert own["CLAW_PRIVATE_KEY_FILE"] == str(private_file(Path("/keys"), "own"))
        assert own["CLAW_MASTER_KEY_FILE"] == str(master_file(Path("/keys"), "own"))
        assert own["CLAW_PUBLIC_KEYS_FILE"] == str(public_file(Path("/keys")))
    others = [name for name in CONTAINERS if name not in (*SERVICES, "provision", "backup", "operator")]
    assert not [name for name in others if "keys_" in json.dumps(CONTAINERS[name].get("volumes", []))]


def test_init_makes_every_value_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compose.yml").write_text((CHECKOUT / "compose.yml").read_text())
    monkeypatch.setattr(compose, "CHECKOUT", tmp_path)
    compose.init()
    first = (tmp_path / ".env").read_text()
    values = dict(line.split("=", 1) for line in first.splitlines())
    assert set(values) == set(re.findall(r"\$\{([A-Z0-9_]+):\?", (CHECKOUT / "compose.yml").read_text()))
    secrets = [value for name, value in values.items() if "PASSWORD" in name or "SECRET" in name]
    assert len(set(secrets)) == len(secrets) > 30
    assert ((tmp_path / ".env").stat().st_mode & 0o777) == 0o600
    # MinIO wants the key's name and 32 bytes.
    name, _, key = values["MINIO_KMS_SECRET_KEY"].partition(":")
    assert (name, len(base64.b64decode(key, validate=True))) == ("clawbus", 32)
    # Values and comments of a person stay; missing values are added.
    kept = first.replace(f"GATEWAY_PORT={values['GATEWAY_PORT']}\n", "# ours\nGATEWAY_PORT=9999\n")
    lacking = re.sub(r"^REDIS_PASSWORD=.*\n", "", kept, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(lacking)
    compose.init()
    assert re.fullmatch(re.escape(lacking) + r"REDIS_PASSWORD=\S{32}\n", (tmp_path / ".env").read_text())


async def test_topics_and_queues_are_the_catalogs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    async def nothing(*_: object) -> None: ...

    async def brokers(catalog: Catalog, *_: object, **__: object) -> None:
        raise Asked(catalog)

    monkeypatch.setattr(provision, "prepare_database", nothing)
    monkeypatch.setattr(provision, "migrate", nothing)
    monkeypatch.setattr(provision, "provision_brokers", brokers)
    with pytest.raises(Asked) as asked:
        await provision.bring_up_to_date({}, {}, {}, database="", kafka="", rabbit_url="", management_url="")
    assert asked.value.args == (CATALOG,)


def test_the_provisioning_container_gets_every_variable_that_it_reads() -> None:
    source = Path(str(compose.__file__)).read_text()
    needed = set(re.findall(r'env\["(CLAW_\w+)"\]', source))
    needed |= {
        f"{name.upper()}_{role}_PASSWORD"
        for name in SERVICES
        for role in ("OWNER", "REQUEST", "WORKER", "RABBITMQ", "KAFKA", "REDIS")
    }
    assert needed | {"CLAW_MASTER_KEY", "CLAW_TLS_URL", "CLAW_INSIDE_TLS"} == set(
        CONTAINERS["provision"]["environment"]
    )


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_logs_in_to_kafka_as_itself_and_has_the_topics_of_the_catalog(name: str) -> None:
    servers = CONTAINERS[name]["environment"]["CLAW_KAFKA_BOOTSTRAP_SERVERS"]
    assert servers == f"kafka://{name}:${{{name.upper()}_KAFKA_PASSWORD:?}}@kafka:9092"
    assert kafka_options(servers.replace(":?", ""))["sasl_plain_username"] == name
    rights = provision.topics_of(name)
    assert rights.reads == {topic.name for topic in CATALOG.topics if name in topic.consumers}
    assert rights.writes == {topic.name for topic in CATALOG.topics if name in topic.producers}


def test_kafka_lets_nobody_in_without_a_login_and_gives_no_rights_by_itself() -> None:
    # The image makes names of settings from those of the variables.
    settings = {
        variable.removeprefix("KAFKA_").replace("___", "-").replace("_", ".").lower(): value
        for variable, value in CONTAINERS["kafka"]["environment"].items()
    }
    protocols = dict(pair.split(":") for pair in settings["listener.security.protocol.map"].split(","))
    for listener in settings["listeners"].split(","):
        name, host = listener.partition(":")[0], urlsplit(listener).hostname
        assert protocols[name].startswith("SASL_") or host == "127.0.0.1"
    for mechanism in settings["listener.name.client.sasl.enabled.mechanisms"].split(","):
        assert f"listener.name.client.{mechanism.lower()}.sasl.jaas.config" in settings
    assert "allow.everyone.if.no.acl.found" not in settings
    assert settings["authorizer.class.name"].endswith(".StandardAuthorizer")


def test_prometheus_asks_every_service_and_its_alerts_name_metrics_that_exist() -> None:
    [services, *_] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert set(services["static_configs"][0]["targets"]) == {f"{name}:{SERVICE_PORTS[name]}" for name in SERVICES}
    metrics = Metrics(CollectorRegistry())
    metrics.lane_seconds.labels("runs").observe(0)
    measured = list(metrics.registry.collect())
    names = {metric.name for metric in measured}
    # The limit of a bucket is part of its name.
    buckets = {sample.labels.get("le") for metric in measured for sample in metric.samples}
    assert set(re.findall(r'le="([^"]+)"', (DEPLOY / "prometheus" / "alerts.yml").read_text())) <= buckets
    used = set()
    for path in ("prometheus/alerts.yml", "grafana/dashboards/clawbus.json"):
        used |= set(re.findall(r"\bclaw_\w+", (DEPLOY / path).read_text()))
    assert used
    assert {re.sub(r"_(total|count|bucket|sum)$", "", name) for name in used} <= names


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    """`test_prometheus` runs the cases."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    cases = yaml.safe_load((DEPLOY / "prometheus" / "alerts.test.yml").read_text())["tests"]
    fires: dict[bool, set[str]] = {True: set(), False: set()}
    for case in cases:
        for one in case["alert_rule_test"]:
            fires[bool(one["exp_alerts"])].add(one["alertname"])
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert fires == {True: names, False: names}
