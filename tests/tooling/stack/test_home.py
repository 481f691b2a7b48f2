from __future__ import annotations

from pathlib import Path

import pytest

from protos import catalog
from tooling.stack import machine
from tooling.stack.backup.keyfile import backup_key
from tooling.stack.engines.base import EngineError, Secrets, cache_folder
from tooling.stack.home import SERVICE_PORTS, SERVICES, Home, home_folder, ports_at, usual_ports
from tooling.stack.provision import permissions
from tooling.stack.supervisor import Supervisor


def test_stacks_at_the_usual_offsets_have_different_ports() -> None:
    ports = [port for offset in (0, 400, 2000, 5000) for port in ports_at(offset).values()]
    assert len(set(ports)) == len(ports) == 4 * len(usual_ports())


@pytest.mark.parametrize("offset", [1, 1000, 3000, 40000])
def test_an_offset_that_leads_to_another_stacks_port_is_refused(offset: int) -> None:
    with pytest.raises(EngineError, match="CLAW_PORT_OFFSET"):
        ports_at(offset)


def test_an_offset_that_is_not_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAW_PORT_OFFSET", "many")
    with pytest.raises(EngineError, match="CLAW_PORT_OFFSET: 'many'"):
        Home(tmp_path).place()


def test_a_stack_remembers_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAW_PORT_OFFSET", "400")
    Home(tmp_path).place()
    monkeypatch.delenv("CLAW_PORT_OFFSET")
    assert Home(tmp_path).place().ports["postgres"] == 5832


def test_a_password_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    first = Secrets(path)("postgres.admin")
    assert Secrets(path)("postgres.admin") == first != Secrets(path)("valkey.admin")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_reported_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_DISK_MB", 10**9)
    with pytest.raises(EngineError, match=r"only \d+ MB are free"):
        machine.check_machine(tmp_path)


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(EngineError, match=r"CLAW_HOME: .* is too long for the path of a socket"):
        Supervisor(Path("/" + "x" * 100))


def test_a_state_folder_that_is_a_file_or_in_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "file").touch()
    for named in (file, file / "home"):
        monkeypatch.setenv("CLAW_HOME", str(named))
        with pytest.raises(EngineError, match=f"CLAW_HOME: {file} is not a folder"):
            home_folder()


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="CLAW_HOME: the folder /proc/x cannot be made"):
        Home(Path("/proc/x")).place()
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", "/proc/x/backup.key")
    with pytest.raises(EngineError, match="CLAW_BACKUP_KEY_FILE: the folder /proc/x cannot be made"):
        backup_key()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/x")
    with pytest.raises(EngineError, match="XDG_CACHE_HOME: the folder /proc/x/clawbus cannot be made"):
        cache_folder()


def test_the_services_are_those_of_the_catalog() -> None:
    assert set(SERVICES) == set(catalog.SERVICES)
    assert {name.removesuffix("_grpc") for name in SERVICE_PORTS} == {*SERVICES, "otlp", "payments"}


def test_a_service_may_read_only_its_own_queues() -> None:
    channel = permissions("channel")
    assert channel["configure"] == "^$"
    assert "channel[.]outbound" in channel["read"]
    assert "document" not in channel["read"] + channel["write"]
    assert permissions("billing")["read"] == "^()$"
