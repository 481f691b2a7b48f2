"""The errors of a service about an environment that it cannot use."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from infra.service.settings import Settings, SettingsError
from tooling.testing import keys

GOOD = {
    "CLAW_DATABASE_URL": "postgresql://w:db-pw@127.0.0.1:5432/claw",
    "CLAW_REQUEST_DATABASE_URL": "postgresql://r:db-pw@127.0.0.1:5432/claw",
    "CLAW_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9092",
    "CLAW_RABBITMQ_URL": "amqp://u:mq-pw@127.0.0.1:5672/v",
    "CLAW_REDIS_URL": "redis://u:re-pw@127.0.0.1:6379/0",
    "CLAW_HTTP_PORT": "8001",
    **keys.environment("user"),
}


class WithOwn(Settings):
    retention_days: int


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLAW_TOPIC_PREFIX", "CLAW_GRPC_PORT", "OTEL_EXPORTER_OTLP_ENDPOINT", "CLAW_RETENTION_DAYS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)


def error_of(settings: type[Settings]) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        settings.load()
    return caught.value


def test_a_complete_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("CLAW_RETENTION_DAYS", "30")
    settings = WithOwn.load()
    assert settings.database_url.get_secret_value() == GOOD["CLAW_DATABASE_URL"]
    assert (settings.http_port, settings.grpc_port, settings.topic_prefix) == (8001, None, "")
    assert settings.otlp_endpoint == "http://127.0.0.1:4318"
    assert settings.retention_days == 30


def test_every_wrong_variable_is_named_with_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLAW_KAFKA_BOOTSTRAP_SERVERS")
    monkeypatch.setenv("CLAW_REDIS_URL", "")
    monkeypatch.setenv("CLAW_HTTP_PORT", "eighty")
    monkeypatch.setenv("CLAW_GRPC_PORT", "70000")
    monkeypatch.setenv("CLAW_RABBITMQ_URL", "http://127.0.0.1")
    monkeypatch.setenv("CLAW_PRIVATE_KEY_FILE", "/nowhere/private.pem")
    monkeypatch.setenv("CLAW_PUBLIC_KEYS_FILE", __file__)
    monkeypatch.setenv("CLAW_MASTER_KEY_FILE", __file__)
    monkeypatch.setenv("CLAW_TLS_FOLDER", "/nowhere")
    lines = dict(line.strip().split(": ", 1) for line in str(error_of(WithOwn)).splitlines()[1:])
    assert lines.keys() == {
        "CLAW_KAFKA_BOOTSTRAP_SERVERS",
        "CLAW_REDIS_URL",
        "CLAW_HTTP_PORT",
        "CLAW_GRPC_PORT",
        "CLAW_RABBITMQ_URL",
        "CLAW_PRIVATE_KEY_FILE",
        "CLAW_PUBLIC_KEYS_FILE",
        "CLAW_MASTER_KEY_FILE",
        "CLAW_TLS_FOLDER",
        "CLAW_RETENTION_DAYS",
    }
    assert lines["CLAW_KAFKA_BOOTSTRAP_SERVERS"] == lines["CLAW_RETENTION_DAYS"] == "missing"
    assert lines["CLAW_REDIS_URL"] == "missing"
    assert "integer" in lines["CLAW_HTTP_PORT"]
    assert "65535" in lines["CLAW_GRPC_PORT"]
    assert "amqp://" in lines["CLAW_RABBITMQ_URL"]
    assert "/nowhere/private.pem" in lines["CLAW_PRIVATE_KEY_FILE"]
    assert "/nowhere/ca.pem" in lines["CLAW_TLS_FOLDER"]
    assert "JWK set" in lines["CLAW_PUBLIC_KEYS_FILE"]
    assert lines["CLAW_MASTER_KEY_FILE"] == f"{__file__}: each line must be the base64 of 32 bytes"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CLAW_DATABASE_URL", "mysql://w:hunter2@127.0.0.1/claw"),
        ("CLAW_DATABASE_URL", "postgresql://w:hunter2@[127/claw"),
        ("CLAW_DATABASE_URL", "postgresql://w@host:hunter2/claw"),
        ("CLAW_DATABASE_URL", "postgresql://w:hunter2@127.0.0.1/claw?sslmode=require"),
        ("CLAW_KAFKA_BOOTSTRAP_SERVERS", "kafka://u:hunter2@"),
        ("CLAW_KAFKA_BOOTSTRAP_SERVERS", "kafkas://u:hunter2@127.0.0.1:1?authority=/nowhere"),
    ],
)
def test_no_error_shows_a_secret(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    error = error_of(Settings)
    assert variable in str(error)
    for shown in (error, error.__context__):
        assert "hunter2" not in "".join(traceback.format_exception(shown))


def test_printed_settings_show_no_secret() -> None:
    text = repr(Settings.load())
    for secret in ("db-pw", "mq-pw", "re-pw"):
        assert secret not in text


def test_a_folder_of_secrets_that_is_missing_or_a_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (file := tmp_path / "file").touch()
    for named in (file, tmp_path / "missing"):
        monkeypatch.setenv("CLAW_SECRETS_FOLDER", str(named))
        with pytest.raises(SettingsError, match=f"CLAW_SECRETS_FOLDER: {named} is not a folder"):
            Settings.load()
