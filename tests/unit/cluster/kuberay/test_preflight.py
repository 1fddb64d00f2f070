"""What a person gets wrong in a cluster's spec or a job, refused with its code before anything is written."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.cluster.jobs.checks import secret_findings
from graftwork.cluster.jobs.models import Attempt, Demand, Finding, Job
from graftwork.cluster.kuberay.objects import build_rayjob
from graftwork.cluster.kuberay.preflight import preflight
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.spec import ClusterSpec
from tests.kuberay_objects import BASE, GPUS, ROOT, attempt, changed, cluster, job, rayjob, rayservice

TOKEN = "hf_abcdefghijklmnopqrstuvwx"
AWS = "AKIAIOSFODNN7EXAMPLE"
GITHUB = "ghp_" + "a1B2" * 9
NONE: dict[str, Any] = {}


def store(**parts: Any) -> dict[str, Any]:
    return {"storage": {**BASE["storage"], **parts}}


def workers(**parts: Any) -> dict[str, Any]:
    return {"workers": [{**GPUS, **parts}]}


ON_GPUS = {"demand": Demand(num_workers=2, gpus_per_worker=1.0)}
BAD_SPECS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # code, changes of the cluster, parts of the job
    ("E-IMAGE-DIGEST", {"image": None}, NONE),
    ("E-IMAGE-DIGEST", {"image": "registry/app:latest"}, NONE),
    ("E-IMAGE-DIGEST", {"image": "registry/app"}, NONE),
    ("E-IMAGE-DIGEST", {"image": "registry/app@sha256:abc"}, NONE),
    ("E-IMAGE-DIGEST", {"image": "registry/app@md5:" + "0" * 32}, NONE),
    ("E-AUTH-OPEN", {"auth": {"mode": "disabled"}}, NONE),
    ("E-HEAD-MEMORY", {"head": {"memory": "4Gi"}}, NONE),
    ("E-HEAD-MEMORY", {"head": {"memory": "8G"}}, NONE),
    ("E-AUTH-VERSION", {"ray_version": "newest"}, NONE),
    ("E-AUTH-VERSION", {"ray_version": "2.51.0"}, NONE),
    ("E-RAY-VERSION", {"ray_version": "2.59.1"}, NONE),
    ("E-NAME-TOO-LONG", NONE, {"name": "a" * 34}),
    ("E-NAME-FORM", NONE, {"name": "2nd-run"}),
    ("E-NAME-FORM", NONE, {"name": "my_run"}),
    ("E-NAME-FORM", NONE, {"name": "my.run"}),
    ("E-STORE-LOCAL", store(uri=None), NONE),
    ("E-STORE-LOCAL", store(uri="file:///home/me/runs"), NONE),
    ("E-STORE-CLAIM", store(claim="runs"), NONE),
    ("E-STORE-ENDPOINT", store(endpoint="minio:9000"), NONE),
    ("E-REFERENCE-FORM", store(secret="S3 credentials"), NONE),
    ("E-REFERENCE-FORM", store(secret=AWS), NONE),
    ("E-REFERENCE-FORM", store(uri="file:///r", claim="My Claim"), NONE),
    ("E-REFERENCE-FORM", {"auth": {"secret": "Ray_Token"}}, NONE),
    ("E-REFERENCE-FORM", {"image_pull_secret": "a/b"}, NONE),
    ("E-REFERENCE-FORM", {"service_account": "Team A"}, NONE),
    ("E-REFERENCE-FORM", {"queue": "GPU queue"}, NONE),
    ("E-REFERENCE-FORM", {"priority": "very high"}, NONE),
    ("E-REFERENCE-FORM", {"gang": "volcano", "gang_queue": "a b"}, NONE),
    ("E-REFERENCE-FORM", {"gcs": {"backend": "redis", "redis_address": "r:1", "redis_secret": "R!"}}, NONE),
    ("E-SECRET-REFERENCE", {"secret_env": {"HF_TOKEN": "hub"}}, NONE),
    ("E-SECRET-REFERENCE", {"secret_env": {"HF_TOKEN": TOKEN}}, NONE),
    ("E-SECRET-REFERENCE", {"secret_env": {"HF_TOKEN": "hub/"}}, NONE),
    ("E-SECRET-REFERENCE", {"secret_env": {"HF_TOKEN": "Hub/token"}}, NONE),
    ("E-ENV-NAME", {"env": {"A-B": "1"}}, NONE),
    ("E-ENV-NAME", {"secret_env": {"1A": "hub/token"}}, NONE),
    ("E-ENV-TWICE", {"env": {"A": "1"}, "secret_env": {"A": "hub/token"}}, NONE),
    ("E-ENV-RESERVED", {"env": {"RAY_AUTH_MODE": "disabled"}}, NONE),
    ("E-ENV-RESERVED", {"env": {"RAY_ADDRESS": "auto"}}, NONE),
    ("E-REDIS-UNSAID", {"env": {"RAY_REDIS_ADDRESS": "redis:6379"}}, NONE),
    ("E-AUTOSCALER-ENV", {"env": {"RAY_enable_autoscaler_v2": "1"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"HF_TOKEN": "abc"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"WANDB_API_KEY": "0123"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"DB_PASSWORD": "hunter2"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"AWS_ACCESS_KEY_ID": "x"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"NOTE": AWS}}, NONE),
    ("E-SECRET-VALUE", {"env": {"NOTE": TOKEN}}, NONE),
    ("E-SECRET-VALUE", {"env": {"NOTE": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"PROXY": "http://me:hunter2@proxy:3128"}}, NONE),
    ("E-SECRET-VALUE", {"env": {"NOTE": "-----BEGIN RSA PRIVATE KEY-----"}}, NONE),
    ("E-SECRET-VALUE", NONE, {"spec": {"argv": ["curl", "-H", f"Authorization: Bearer {TOKEN}"]}}),
    ("E-SECRET-VALUE", NONE, {"spec": {"env": {"API_KEY": "abc"}}}),
    ("E-SECRET-VALUE", NONE, {"spec": {"argv": ["sync", "--password=hunter2"]}}),
    ("E-TOKEN-MISSING", NONE, {"kind": "serve", "spec": {"token_env": "GRAFTWORK_TOKEN"}}),
    ("E-LABEL-FORM", {"labels": {"team": "a b"}}, NONE),
    ("E-LABEL-FORM", {"labels": {"-team": "a"}}, NONE),
    ("E-LABEL-FORM", {"labels": {"team": "a" * 64}}, NONE),
    ("E-LABEL-FORM", workers(node_selector={"gpu type": "h100"}), NONE),
    ("E-LABEL-FORM", workers(spot=True, spot_key="spot nodes"), NONE),
    ("E-LABEL-RESERVED", {"labels": {"ray.io/cluster": "mine"}}, NONE),
    ("E-LABEL-RESERVED", {"labels": {"kueue.x-k8s.io/queue-name": "mine"}}, NONE),
    ("E-GANG-QUEUE", {"gang": "kai"}, NONE),
    ("E-GANG-NONE", {"gang_queue": "root.a"}, NONE),
    ("E-KUEUE-GROUPS", {"queue": "q", "workers": [{"name": f"g{i}"} for i in range(8)]}, NONE),
    ("E-STORE-FORM", store(uri="s3://bucket/team a"), NONE),
    ("E-ENTRYPOINT-SHELL", store(uri="s3://bucket/$(id)"), NONE),
    ("E-ENTRYPOINT-SHELL", store(uri="s3://bucket/a;ls"), NONE),
    ("E-SCHEMA-BOUNDS", {"limits": {"deadline": "30000d"}}, NONE),
    ("E-SCHEMA-BOUNDS", {"ttl_s": 2.0**40}, NONE),
    ("E-GPU-NONE", workers(gpu=0), NONE),
    ("E-FIT-NO-GPU", {"workers": [{"name": "cpu"}]}, ON_GPUS),
    ("E-FIT-WORKERS", workers(count=1), ON_GPUS),
    ("E-FIT-WORKERS", workers(count=0), ON_GPUS),
    ("E-FIT-WORKERS", workers(count=1, max_count=4), ON_GPUS),  # training is a fixed gang
    ("E-FIT-WORKER", workers(count=8), {"demand": Demand(gpus_per_worker=2.0)}),
    ("E-FIT-WORKER", workers(cpu="2"), {"demand": Demand(cpus_per_worker=4.0)}),
    ("E-FIT-WORKER", workers(memory="8Gi"), {"demand": Demand(memory_bytes_per_worker=9 * 2**30)}),
    ("E-FIT-WORKER", workers(memory="8Gi"), {"demand": Demand(2, 1.0, 1.0, 9 * 2**30)}),  # of a GPU's machine
    ("E-GPU-SHARE", workers(), {"demand": Demand(num_workers=2, gpus_per_worker=0.5)}),
    ("E-GPU-SHARE", workers(gpu=4), {"demand": Demand(gpus_per_worker=1.5)}),
    ("E-NVME-PATH", workers(), {**ON_GPUS, "spec": {"strategy": {"offload_optimizer": "nvme", "nvme_path": "/nvme"}}}),
    (
        "E-NVME-PATH",
        workers(),
        {
            **ON_GPUS,
            "kind": "tune",
            "spec": {"train": {"strategy": {"offload_weights": "nvme", "nvme_path": "/scratchy"}}},
        },
    ),
    ("E-SECRET-VALUE", {"gcs": {"backend": "redis", "redis_address": "redis://:hunter2@redis:6379"}}, NONE),
    ("E-SECRET-VALUE", {"gcs": {"backend": "redis", "redis_address": "redis://r:6379?password=hunter2"}}, NONE),
    ("E-SECRET-VALUE", {"labels": {"team": GITHUB}}, NONE),
    ("E-SECRET-VALUE", {"labels": {GITHUB: "team"}}, NONE),
    ("E-SECRET-VALUE", {"labels": {"team": f"{TOKEN} "}}, NONE),
    ("E-SECRET-VALUE", workers(node_selector={"team": AWS}), NONE),
    ("E-SECRET-VALUE", workers(spot=True, spot_key=GITHUB), NONE),
    ("E-SECRET-VALUE", {"gang": "kai", "gang_queue": f"a/{GITHUB}"}, NONE),
    ("E-SECRET-VALUE", {"image": "https://me:hunter2@registry/app"}, NONE),
    ("E-SECRET-VALUE", {"env": {"PROXY": "http://:hunter2@proxy:3128"}}, NONE),
    ("E-SECRET-VALUE", NONE, {"spec": {"arms": [{"prompt": {"system": f"use {TOKEN}"}}]}}),
    ("E-SECRET-VALUE", NONE, {"spec": {"space": {TOKEN: {"kind": "choice"}}}}),
    ("E-BUDGET-NO-PRICES", {"limits": {"deadline": "1h", "budget_usd": 10}}, NONE),
    (
        "E-BUDGET-NO-PRICE",
        {
            "limits": {"deadline": "1h", "budget_usd": 10},
            **workers(),
            "prices": {"cpu_hour": 0.04, "gpu_hour": {"L4": 1.0}},
        },
        NONE,
    ),
]

GOOD_SPECS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no GPUs": (NONE, NONE),
    "GPUs": (workers(), ON_GPUS),
    "spot": ({**workers(spot=True), "retry": {"max_attempts": 3}}, ON_GPUS),
    "kueue": ({**workers(), "queue": "gpu", "priority": "high"}, ON_GPUS),
    "volcano": ({"gang": "volcano", "gang_queue": "team-a", "priority": "high"}, NONE),
    "kai": ({"gang": "kai", "gang_queue": "team-a"}, NONE),
    "yunikorn": ({"gang": "yunikorn", "gang_queue": "root.team-a"}, NONE),
    "redis": ({"gcs": {"backend": "redis", "redis_address": "redis:6379", "redis_secret": "redis"}}, NONE),
    "the image's code": ({"code": "image", "image_pull_secret": "registry"}, NONE),
    "a shared folder": (store(uri="file:///mnt/runs", secret=None, claim="runs"), NONE),
    "two groups": ({"workers": [GPUS, {"name": "cpu", "count": 3}]}, ON_GPUS),
    "a store of one's own": (store(endpoint="https://minio.storage:9000"), NONE),
    "secrets by name": ({"secret_env": {"HF_TOKEN": "hub/token"}, "env": {"MAX_TOKENS": "512"}}, NONE),
    "a budget": (
        {
            **workers(),
            "limits": {"deadline": "8h", "budget_usd": 100},
            "prices": {"cpu_hour": 0.04, "gpu_hour": {"H100": 4.5}},
        },
        ON_GPUS,
    ),
    "a share of a GPU for one worker": (workers(count=1), {"demand": Demand(1, 1.0, 0.5), "kind": "tune"}),
    "a program of one's own on GPUs": (workers(), {"kind": "exec"}),
    "an endpoint that grows": (workers(count=1, max_count=4), {"kind": "serve", "demand": Demand(1, 1.0, 1.0)}),
    "prices for every GPU": ({**workers(), "prices": {"gpu_hour": {"default": 1.0}}}, ON_GPUS),
    "names near to secrets": ({"labels": {"token-team": "a", "api-key": "b"}}, NONE),
    "hashes in the spec": (
        {"secret_env": {"HF_TOKEN": "hub/token"}},
        {"spec": {"base": "sha256:" + "0a" * 32, "token_env": "HF_TOKEN"}},
    ),
}


def asked(changes: dict[str, Any], parts: dict[str, Any]) -> Attempt:
    made = job(cluster(**changes), **{key: value for key, value in parts.items() if key != "spec"})
    return Attempt(
        Job(made.name, made.kind, made.digest, made.root, parts.get("spec", {}), made.cluster, made.demand), 1
    )


def errors(found: list[Finding]) -> set[str]:
    return {finding.code for finding in found if finding.level == "error"}


@pytest.mark.parametrize("bad", BAD_SPECS, ids=[f"{index}-{bad[0]}" for index, bad in enumerate(BAD_SPECS)])
def test_a_bad_spec_is_refused_with_its_code(bad: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    code, changes, parts = bad
    found = preflight(asked(changes, parts), "team-a")
    assert code in errors(found)
    assert found[0].level == "error"
    assert all(finding.where and finding.problem for finding in found)


@pytest.mark.parametrize("name", GOOD_SPECS)
def test_a_good_spec_has_no_findings(name: str) -> None:
    assert preflight(asked(*GOOD_SPECS[name]), "team-a") == []


def test_a_service_that_grows_has_no_findings() -> None:
    changes = {**workers(count=1, max_count=4), "secret_env": {"KEYS": "endpoint/keys"}}
    serves = Attempt(job(cluster(**changes), kind="serve", demand=Demand(4, 1.0, 1.0)), 1)
    assert preflight(serves, "team-a", objects=[rayservice(**changes)]) == []


def test_objects_from_elsewhere_are_judged_too() -> None:
    made = changed(rayjob(), {"spec.submissionMode": "Foo", "spec.entryPoint": "x"})
    assert errors(preflight(attempt(cluster()), "team-a", objects=[made])) == {"E-SUBMISSION-MODE", "E-SCHEMA-UNKNOWN"}


def test_a_namespace_is_a_name() -> None:
    assert errors(preflight(attempt(cluster()), "Team A")) >= {"E-NAMESPACE-FORM"}


def test_a_fact_is_said_once() -> None:
    """Head, workers and their init containers share one image: one finding."""
    both = cluster(image="app:1", workers=[GPUS, {"name": "cpu"}])
    found = preflight(attempt(both, demand=ON_GPUS["demand"]), "team-a")
    assert [finding.code for finding in found] == ["E-IMAGE-DIGEST"]


def test_numbers_say_what_to_change() -> None:
    (found,) = preflight(asked(workers(count=1), ON_GPUS), "team-a")
    assert found.problem == "room for 1 workers: 1 x gpu (cpu 8, memory 32Gi, gpu 1)"
    assert found.rule == "2 workers run at the same time, 1 CPU, 1 GPU each"
    (found,) = [one for one in preflight(attempt(cluster(), name="a" * 40), "team-a") if one.code == "E-NAME-TOO-LONG"]
    assert "7 too many" in found.problem


def test_no_finding_shows_a_secret() -> None:
    changes = {
        "env": {"A": TOKEN, "B": AWS, "DB_PASSWORD": "hunter2"},
        "secret_env": {"C": TOKEN},
        **store(secret=AWS),
        "labels": {"team": f"{GITHUB} ", GITHUB: "!"},
        **workers(node_selector={"a b": AWS, f"{TOKEN}!": "c"}),
        "gcs": {"backend": "redis", "redis_address": "redis://:hunter2@redis:6379"},
        "gang": "kai",
        "gang_queue": f"a/{GITHUB}",
        "image": "https://me:hunter2@registry/app",
    }
    said = str(preflight(asked(changes, {"spec": {"argv": [TOKEN], "space": {TOKEN: 1}}}), "team-a"))
    assert [text for text in (TOKEN, AWS, GITHUB, "hunter2") if text in said] == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gcs": {"backend": "redis", "redis_address": "redis://:hunter2@redis:6379"}}, "gcs.redis_address"),
        ({"labels": {"team": GITHUB}}, "labels.team"),
        ({"labels": {GITHUB: "team"}}, "labels"),
        (workers(node_selector={"team": AWS}), "workers[0].node_selector.team"),
    ],
)
def test_a_secret_is_refused_in_every_place_with_its_key(changes: dict[str, Any], where: str) -> None:
    """The scan is one for all places: test_job_places.py has the other two."""
    made = asked(changes, NONE)
    assert [one.where for one in secret_findings(made.job)] == [where]
    assert where in {one.where for one in preflight(made, "team-a") if one.code == "E-SECRET-VALUE"}


@pytest.mark.parametrize(
    ("code", "changes", "parts"),
    [
        ("W-NO-DEADLINE", {"limits": {}}, NONE),
        ("W-GATE-ROCKSDB", {"gcs": {"backend": "rocksdb"}}, NONE),
        ("W-REDIS-OPEN", {"gcs": {"backend": "redis", "redis_address": "r:1"}}, NONE),
        ("W-TWO-QUEUES", {"queue": "a", "gang": "volcano", "gang_queue": "b"}, NONE),
        ("W-FIT-FIXED", workers(max_count=4), NONE),
        ("W-GPU-ANY", workers(node_selector={}), NONE),
        ("W-GPU-UNKNOWN", workers(gpu_type="TPU"), NONE),
        ("W-GPU-UNKNOWN", workers(gpu_type="H100-MIG-1g.5gb"), ON_GPUS),
        ("W-GPU-UNKNOWN", workers(gpu_type=None), ON_GPUS),
        ("W-GPU-UNUSED", workers(), NONE),  # the laptop's spec with an explicit 0
        ("W-GPU-UNUSED", workers(count=4), ON_GPUS),
        ("W-GPU-UNUSED", workers(), {"kind": "serve", "demand": Demand()}),
        ("W-GPU-NO-PRICE", {**workers(), "prices": {"cpu_hour": 0.04, "gpu_hour": {"L4": 1.0}}}, ON_GPUS),
        (
            "W-NVME-IMAGE",
            workers(),
            {**ON_GPUS, "spec": {"strategy": {"offload_optimizer": "nvme", "nvme_path": "/scratch/offload"}}},
        ),
        ("W-FIT-DEADLINE", NONE, {"demand": Demand(seconds=2 * 86400)}),
        (
            "W-FIT-BUDGET",
            {"limits": {"deadline": "9h", "budget_usd": 1}, "prices": {"cpu_hour": 1}},
            {"demand": Demand(seconds=36000)},
        ),
    ],
)
def test_what_is_said_and_not_refused(code: str, changes: dict[str, Any], parts: dict[str, Any]) -> None:
    found = preflight(asked(changes, parts), "team-a")
    assert (code in {finding.code for finding in found}, errors(found)) == (True, set())


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
SIZES = st.sampled_from(["500m", "1", "8", "2Gi", "16Gi", "64Gi", "100G"])
TIMES = st.floats(0.1, 1e10)
GROUPS = st.fixed_dictionaries(
    {"count": st.integers(0, 4), "cpu": SIZES, "memory": SIZES, "gpu": st.integers(0, 8)},
    optional={
        "gpu_type": st.sampled_from(["H100", "odd"]),
        "spot": st.booleans(),
        "spot_key": TEXTS,
        "node_selector": st.dictionaries(TEXTS, TEXTS, max_size=1),
    },
)


def named(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "name": f"g{index}"} for index, group in enumerate(groups)]


SPECS = st.fixed_dictionaries(
    {"workers": st.lists(GROUPS, max_size=9).map(named)},
    optional={
        "image": st.sampled_from([None, "a:b", BASE["image"]]),
        "image_pull_secret": TEXTS,
        "queue": TEXTS,
        "priority": TEXTS,
        "gang": st.sampled_from(["none", "volcano", "kai", "yunikorn"]),
        "gang_queue": TEXTS,
        "ray_version": st.sampled_from(["2.60.0", "2.60.1", "2.40", "x"]),
        "code": st.sampled_from(["wheel", "image"]),
        "storage": st.fixed_dictionaries({"uri": st.just(ROOT)}, optional={"secret": TEXTS, "claim": TEXTS}),
        "auth": st.fixed_dictionaries({"mode": st.sampled_from(["token", "disabled"])}, optional={"secret": TEXTS}),
        "head": st.fixed_dictionaries({"cpu": SIZES, "memory": SIZES}),
        "limits": st.fixed_dictionaries({}, optional={"deadline": TIMES, "pending": TIMES}),
        "service_account": TEXTS,
        "env": st.dictionaries(TEXTS, TEXTS, max_size=2),
        "ttl_s": st.floats(0, 1e10),
        "secret_env": st.dictionaries(TEXTS, TEXTS, max_size=2),
        "labels": st.dictionaries(TEXTS, TEXTS, max_size=2),
    },
)


@settings(max_examples=60, deadline=None)
@given(SPECS)
def test_any_spec_makes_objects_that_pass_or_findings_that_say_why(tree: dict[str, Any]) -> None:
    """What preflight lets through, the schema and the operator's rules let through; the time fits an int32."""
    made = attempt(ClusterSpec.model_validate(tree))
    built = build_rayjob(made, "team-a", None)
    refused = errors([*check_schema(built), *check_rules(built)])
    assert refused <= errors(preflight(made, "team-a"))
    if not errors(preflight(made, "team-a")):
        assert built["spec"].get("activeDeadlineSeconds", 1) < 2**31
        assert math.isfinite(built["spec"]["ttlSecondsAfterFinished"])
