"""What doctor and plan say of a place: exit codes, codes of findings, and the mend of each."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from graftwork.cli import app
from graftwork.cluster.jobs.checks import surroundings
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import GraftworkError


def cli(*argv: str) -> Result:
    return CliRunner().invoke(app, list(argv))


def code_of(done: Result) -> int:
    return done.exception.exit_code if isinstance(done.exception, GraftworkError) else done.exit_code


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text('kind: exec\nname: hello\nargv: ["true"]\n')
    return str(file)


def test_a_sound_machine_has_no_findings(spec: str) -> None:
    done = cli("doctor", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0, told
    assert told["unheard"] is None
    assert set(told["versions"]) == {"graftwork", "python", "ray", "torch", "kubernetes"}


def test_a_place_that_does_not_answer_is_3_and_the_rest_is_told(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .ray/auth_token would be a finding
    done = cli("doctor", "--target", "http://127.0.0.1:9", "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert told["findings"] == []
    assert "127.0.0.1:9" in told["unheard"]


@pytest.mark.parametrize(
    "on", ["k8s:", "k8s:ctx", "k8s:ctx/", "http:/x", "http://h:99999", "htps://h:1", "nowhere", ""]
)
@pytest.mark.parametrize("verb", ["doctor", "plan"])
def test_an_address_that_is_none_is_2_and_names_the_forms(spec: str, on: str, verb: str) -> None:
    done = cli(verb, *([spec] if verb == "plan" else []), "--target", on)
    assert code_of(done) == 2
    assert isinstance(done.exception, GraftworkError)
    said = str(done.exception)
    assert f"--target {on}" in said
    assert "k8s:CONTEXT/NAMESPACE" in said or "http(s)://HOST:PORT" in said


def test_a_plan_without_its_place_tells_what_it_can(spec: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("kind: cluster\nprices: {cpu_hour: 0.5}\nlimits: {deadline: 2h}\n")
    done = cli("plan", spec, "--target", "http://127.0.0.1:9", "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert (told["cpus"], told["usd_per_hour"], told["most_usd"]) == (12.0, 6.0, 12.0)
    assert told["findings"] == []


def test_a_typo_and_a_wrong_kind_of_cluster_file_are_told(spec: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("kind: cluster\nstorag: {uri: s3://b}\n")
    done = cli("plan", spec, "--target", "local")
    assert code_of(done) == 2
    assert "did you mean 'storage'?" in str(done.exception)
    done = cli("plan", spec, "--target", "local", "--cluster-config", spec)
    assert code_of(done) == 2
    assert "kind='exec'" in str(done.exception)


def test_what_is_lacking_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)

    def codes(on: str, root: str, **cluster: object) -> list[str]:
        found = list(surroundings(on, root, ClusterSpec.model_validate(cluster)))
        assert all(one.hint for one in found)
        return [one.code for one in found]

    assert codes("http://10.0.0.1:8265", "/r") == ["W-NO-TOKEN"]
    assert codes("http://127.0.0.1:8265", "/r") == []
    assert codes("http://127.0.0.1:8265", "/r", ray_version="2.1.0") == ["W-RAY-VERSION"]
    assert codes("k8s:a/b", "/r") == ["E-STORE-LOCAL"]
    assert codes("k8s:a/b", "s3://b/x") == ["W-NO-S3-CREDENTIALS"]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert codes("http://10.0.0.1:8265", "/r") == ["E-TOKEN-FILE"]
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert codes("http://10.0.0.1:8265", "/r") == ["W-TOKEN-FILE-OPEN"]


def test_an_endpoint_is_rendered_with_no_cluster_in_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    cluster, file = tmp_path / "cluster.yaml", tmp_path / "s.yaml"
    cluster.write_text("kind: cluster\ncode: image\nstorage: {uri: 's3://bucket/x'}\nworkers: [{count: 2}]\n")
    file.write_text("kind: serve\nname: desk\nbase: nowhere\ntoken_env: KEYS\n")
    done = cli("k8s", "render", str(file), "--cluster-config", str(cluster), "--namespace", "team")
    assert done.exit_code == 0, done.exception
    service, budget = yaml.safe_load_all(done.stdout)
    assert (service["kind"], service["metadata"]["name"]) == ("RayService", "desk")
    assert service["metadata"]["namespace"] == "team"
    assert budget["kind"] == "PodDisruptionBudget"
    assert code_of(cli("k8s", "render", str(file), "--cluster-config", str(cluster), "--set", "token_env=null")) == 2


def test_the_rules_are_held_with_no_cluster_in_reach(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    done = cli("plan", spec, "--target", "k8s:ctx/team", "--set", "name=" + "n" * 60, "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert {"E-NAME-TOO-LONG", "E-STORE-LOCAL", "E-IMAGE-DIGEST"} <= {one["code"] for one in told["findings"]}
    assert "kubeconfig" in told["unheard"]
    assert [one["kind"] for one in told["objects"]] == ["RayJob"]
