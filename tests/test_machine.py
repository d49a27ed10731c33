"""What the machine says of itself, read from folders that stand for its own."""

import os
import sys
from pathlib import Path

import pytest

from fastlm import machine

GIB = 2**30


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/", {"memory.max": f"{GIB}"}, GIB),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": f"{GIB}"}, GIB),
        ("0::/of/the/host", {"memory.max": f"{2 * GIB}"}, 2 * GIB),
        ("3:cpu:/c\n2:cpuset,memory:/c\n0::/", {"memory/c/memory.limit_in_bytes": f"{GIB}"}, GIB),
        ("4:memory:/", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}"}, None),
        ("3:cpu:/", {"memory.max": f"{GIB}"}, None),
        (None, {}, None),
    ],
)
def test_a_containers_memory_counts(
    own: str | None, files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    whole = 64 * GIB
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": whole // 4096, "SC_PAGE_SIZE": 4096}.get)
    assert machine.memory() == (limit or whole)
    monkeypatch.setattr(os, "sysconf_names", {})
    assert machine.memory() is None


def test_the_processors_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: X\n")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor() == "GenuineIntel"
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "linux")  # of a processor whose maker nothing tells
    assert machine.processor() == ""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD")
    assert machine.processor() == "AuthenticAMD"
