"""The files that RabbitMQ needs before its start."""

from __future__ import annotations

from pathlib import Path

from tooling.stack.engines import rabbitmq
from tooling.stack.engines.base import Place, Secrets
from tooling.stack.home import Home


def test_an_empty_cookie_is_written_again_and_another_stays(tmp_path: Path) -> None:
    place = Place(tmp_path, Home(tmp_path).place().ports, Secrets(tmp_path / "secrets.json"))
    rabbitmq.prepare(place)
    cookie = place.folder(rabbitmq.NAME) / "home" / ".erlang.cookie"
    made = cookie.read_text()
    assert len(made) >= 20
    assert cookie.stat().st_mode & 0o777 == 0o400
    cookie.chmod(0o600)
    cookie.write_text("")
    rabbitmq.prepare(place)
    assert cookie.read_text() == made
    cookie.chmod(0o600)
    cookie.write_text("a cookie of a stack from before")
    rabbitmq.prepare(place)
    assert cookie.read_text() == "a cookie of a stack from before"
