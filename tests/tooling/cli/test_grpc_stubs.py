"""Tests of the changes of a .proto file that break callers, and of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tooling.cli.grpc_stubs import Json, ProtoError, breaking_protos, compile_protos

PROTO = """syntax = "proto3";
package shop.v1;
service Shop { rpc Buy(Order) returns (Receipt); }
message Order { string item = 1; int64 price_nanos = 2; Size size = 3; optional string note = 4; }
message Receipt { string id = 1; }
enum Size { SIZE_UNSPECIFIED = 0; SIZE_SMALL = 1; }
"""


def compiled(root: Path, text: str) -> Json:
    (root / "protos" / "shop" / "v1").mkdir(parents=True, exist_ok=True)
    (root / "protos" / "shop" / "v1" / "shop.proto").write_text(text)
    return compile_protos(root)[1]


def test_stubs_import_by_their_package(tmp_path: Path) -> None:
    (tmp_path / "protos" / "shop" / "v1").mkdir(parents=True)
    (tmp_path / "protos" / "shop" / "v1" / "shop.proto").write_text(PROTO)
    stubs, _ = compile_protos(tmp_path)
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    assert sorted(stubs) == sorted(f"protos/shop/v1/shop{suffix}" for suffix in suffixes)
    assert "from protos.shop.v1 import shop_pb2" in stubs["protos/shop/v1/shop_pb2_grpc.py"]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("string id = 1;", "string id = 1; string text = 2;"),
        ("rpc Buy", "rpc Return(Receipt) returns (Order); rpc Buy"),
        ("SIZE_SMALL = 1;", "SIZE_SMALL = 1; SIZE_LARGE = 2;"),
        ("int64 price_nanos = 2;", "reserved 2;"),
        ("int64 price_nanos = 2;", "reserved 2, 100 to max;"),
        ("message Receipt", "// said better\nmessage Receipt"),
    ],
    ids=["new field", "new method", "new value", "reserved", "reserved range", "comment"],
)
def test_a_compatible_change_passes(tmp_path: Path, was: str, becomes: str) -> None:
    assert was in PROTO
    assert breaking_protos(compiled(tmp_path, PROTO), compiled(tmp_path, PROTO.replace(was, becomes))) == []


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        ("int64 price_nanos = 2;", "", "shop.v1.Order field 2: removed"),
        ("int64 price_nanos = 2;", "int64 price = 2;", "shop.v1.Order field 2: was price_nanos"),
        ("int64 price_nanos = 2;", "string price_nanos = 2;", "shop.v1.Order field 2: was price_nanos"),
        ("int64 price_nanos = 2;", "repeated int64 price_nanos = 2;", "shop.v1.Order field 2: was"),
        ("optional string note", "string note", "shop.v1.Order field 4: was"),
        ("int64 price_nanos = 2;", "int64 price_nanos = 5;", "shop.v1.Order field 2: removed"),
        ("SIZE_SMALL = 1;", "", "shop.v1.Size value 1: removed"),
        ("SIZE_SMALL = 1;", "SIZE_TINY = 1;", "shop.v1.Size value 1: was SIZE_SMALL"),
        ("returns (Receipt)", "returns (stream Receipt)", "shop.v1.Shop/Buy: was"),
        ("rpc Buy(Order) returns (Receipt);", "", "shop.v1.Shop/Buy: removed"),
        ("package shop.v1", "package shop.v2", "shop.v1.Order: removed"),
    ],
)
def test_a_change_that_breaks_a_caller_is_named(tmp_path: Path, was: str, becomes: str, problem: str) -> None:
    assert was in PROTO
    problems = breaking_protos(compiled(tmp_path, PROTO), compiled(tmp_path, PROTO.replace(was, becomes)))
    assert any(found.startswith(problem) for found in problems), problems


def test_a_reserved_number_must_stay_reserved(tmp_path: Path) -> None:
    reserved = PROTO.replace("int64 price_nanos = 2;", "reserved 2;")
    reused = PROTO.replace("int64 price_nanos = 2;", "string colour = 2;")
    assert breaking_protos(compiled(tmp_path, reserved), compiled(tmp_path, reused)) == [
        "shop.v1.Order reserved 2-3: removed"
    ]


def test_a_file_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProtoError, match="do not compile"):
        compiled(tmp_path, "syntax = 'proto3'; message {")
