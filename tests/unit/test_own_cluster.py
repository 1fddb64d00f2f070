"""What an own cluster refuses before a process of Ray is started."""

import os
import socket
from pathlib import Path

import pytest

from graftwork.cluster import own_token
from graftwork.cluster.own import NodeSpec, node, storage_environment
from graftwork.cluster.own_join import address_towards, require_head
from graftwork.cluster.own_ports import Ports, require_free
from graftwork.cluster.run_store import AttemptRecord, Ended
from graftwork.cluster.state import judge
from graftwork.errors import ClusterError, ConfigError
from tests.ports import free_port


def test_a_token_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "token"
    assert own_token.made(file)
    first = file.read_text()
    assert not own_token.made(file)
    assert file.read_text() == first
    assert len(first) == 64
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o077 == 0
    assert own_token.checked(file) == file


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    own_token.made(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="others can read it.*\n.*\n.*chmod 600"):
        own_token.checked(file)


@pytest.mark.parametrize("text", ["", "short", "two words of a token", "ключ" * 8])
def test_a_file_without_a_token_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    os.close(os.open(file, os.O_CREAT, 0o600))
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        own_token.checked(file)
    assert "it holds no token" in str(refused.value)
    assert not text or text not in str(refused.value)


def test_a_taken_port_is_named_with_who_holds_it() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", free_port()))
        mine.listen()
        port = mine.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} \(gcs\).*pid {os.getpid()}\)(.|\n)*another --port"):
            require_free(Ports(12_000, port, 8265), "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "found"), [("0.0.0.0", "no address of one network"), ("192.0.2.77", "no address of this machine")]
)
def test_only_an_address_of_this_machine_is_bound(tmp_path: Path, host: str, found: str) -> None:
    own_token.made(tmp_path / "token")
    spec = NodeSpec(host, Ports(), tmp_path / "token")
    with pytest.raises(ConfigError, match=found), node(spec):
        pass


@pytest.mark.parametrize("ports", [(6300, 6379, 8265), (8250, 6379, 8265), (65400, 6379, 8265), (0, 6379, 8265)])
def test_ports_that_meet_or_are_none_are_refused(ports: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="two of the ports|no port has this number"):
        Ports(*ports)


def test_the_heads_state_goes_to_a_folder_or_to_redis_and_no_password_is_taken_or_shown(tmp_path: Path) -> None:
    found = storage_environment(f"rocksdb {tmp_path / 'gcs'}")
    assert found == {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    assert storage_environment("redis://10.0.0.1:6400")["RAY_REDIS_ADDRESS"] == "redis://10.0.0.1:6400"
    for bad in ("rocksdb", "sqlite x", "redis://", "redis://:hunter2@10.0.0.1:6400"):
        with pytest.raises(ConfigError) as refused:
            storage_environment(bad)
        assert "hunter2" not in str(refused.value)


def test_a_head_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ClusterError, match="nothing answers there"):
        require_head(f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="not the address of a head"):
        require_head("http://127.0.0.1")
    assert address_towards("127.0.0.1:1") == "127.0.0.1"


def test_a_job_whose_ray_lost_its_head_is_retried_as_lost() -> None:
    said = "[2026-11-26 E 1 1] rpc_client.h:204: Failed to connect to GCS within 15 seconds. GCS may have been killed."
    found = judge(AttemptRecord(1, 0.0, 1.0, None, None, Ended(2.0, 1, message=said)), None, 3.0)
    assert (found.state, found.cause) == ("failed", "lost")
    assert "the head of its Ray died under it" in found.why
