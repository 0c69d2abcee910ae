"""Which addresses in stores a request may name, and what is told about all others."""

from __future__ import annotations

import pytest

from service.errors import ForbiddenPath, InvalidConfig
from service.storage.remote_address import check_allowed, parse_address, parse_root


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://models/bert/base", ("models", "bert", "base")),
        ("S3://models/bert/", ("models", "bert")),
        ("gs://my_bucket.example/x y/é", ("my_bucket.example", "x y", "é")),
        ("az://container/a", ("container", "a")),
        ("s3://bucket", ("bucket",)),
        ("hf://own/net", ("own", "net", "main")),
        ("hf://own/net@v1.0", ("own", "net", "v1.0")),
        ("hf://own/net@main/unet/sub", ("own", "net", "main", "unet", "sub")),
        ("hf://own/net@refs%2Fpr%2f1/unet", ("own", "net", "refs/pr/1", "unet")),
    ],
)
def test_an_address_is_its_segments(uri: str, parts: tuple[str, ...]) -> None:
    assert parse_address(uri).parts == parts


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:/bucket/a",
        "s3://bucket//a",
        "s3://bucket/./a",
        "s3://bucket/a%2Fb",
        "s3://bucket/a?versionId=hunter2",
        "s3://bucket/a#hunter2",
        "s3://user:hunter2@bucket/a",
        "s3://hunter2@bucket/a",
        "s3://bucket:9000/a",
        "s3://bucket/a\\b",
        "s3://bucket/a\nb",
        "s3://bucket/*",
        "s3://bucket/\ud800",
        "s3://bucket/" + "a" * 1025,
        "s3://-bucket/a",
        "hf://net",
        "hf://own/",
        "hf://own/net@",
        "hf://own/net@a@b",
        "hf://user:hunter2@own/net",
        "hf://own/net/sub",
        "hf://own/.hidden",
        "hf://own%2Fnet",
        "hf://own/net%2Fnet",
        "hf://own/net@refs%2F%2Fpr",
        "hf://own/net@refs%2F..",
        "hf://own/net@main/a%2Fb",
        "hf://own/net@a%25b",
    ],
)
def test_what_could_be_read_in_two_ways_or_hold_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_address(uri)
    assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize("uri", ["s3://bucket/a/../b", "s3://bucket/..", "hf://own/net@main/../x"])
def test_an_address_cannot_climb(uri: str) -> None:
    with pytest.raises(ForbiddenPath):
        parse_address(uri)


@pytest.mark.parametrize(
    ("root", "inside", "outside"),
    [
        ("s3://", ["s3://any/a"], ["gs://any/a", "hf://own/net"]),
        ("s3://models", ["s3://models", "s3://models/a"], ["s3://models2/a", "s3://other/models"]),
        ("s3://models/pub/", ["s3://models/pub", "s3://models/pub/a"], ["s3://models/public", "s3://models"]),
        ("hf://", ["hf://own/net"], ["s3://own/net"]),
        ("hf://own", ["hf://own/net@x/y"], ["hf://owner/net"]),
        ("hf://own/net", ["hf://own/net", "hf://own/net@x/y"], ["hf://own/network"]),
        ("hf://own/net@v1", ["hf://own/net@v1/sub"], ["hf://own/net", "hf://own/net@v10"]),
    ],
)
def test_a_root_is_compared_by_whole_segments(root: str, inside: list[str], outside: list[str]) -> None:
    roots = [parse_root("az://nothing"), parse_root(root)]
    for uri in inside:
        check_allowed(parse_address(uri), roots)
    told = set()
    for uri in outside:
        with pytest.raises(ForbiddenPath) as caught:
            check_allowed(parse_address(uri), roots)
        told.add(caught.value.detail)
    assert len(told) == 1, "alike for everything outside"


def test_keys_tell_places_apart_and_know_what_is_above_them() -> None:
    inner, outer = parse_address("s3://models/a/b").key, parse_address("s3://models/a").key
    assert inner.is_relative_to(outer)
    assert parse_address("gs://models/a").key != outer
    assert parse_address("hf://own/net@refs/pr").key != parse_address("hf://own/net@refs%2Fpr").key
