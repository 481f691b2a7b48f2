"""Problem documents."""

from __future__ import annotations

import json
from datetime import timedelta

from infra.errors import TooManyRequests, WrongType
from infra.web.problems import problem


def test_a_client_over_the_limit_learns_the_time_to_wait() -> None:
    response = problem(TooManyRequests(timedelta(seconds=7), "more than 3 in 60 s"))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


def test_a_wrong_type_names_the_field() -> None:
    response = problem(WrongType("file", "is of the type image/gif"))
    assert response.status_code == 415
    assert json.loads(bytes(response.body))["errors"] == [{"field": "file", "message": "is of the type image/gif"}]
