"""The KubeRay manifest is valid by KubeRay's own schema and says the same as cluster.yaml."""

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.kuberay import Args, command, manifest, parse, ray_version, render, variables

ROOT = Path(__file__).resolve().parents[2]
SYNTHESIZE = (
    "--recipe", "tiny", "--generator", "/shared/generator", "--real", "s3://bucket/real.lance", "--num-requests", "100",
    "--out", "s3://bucket/out.lance",
)  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def job(**changes: Any) -> dict[str, Any]:
    return manifest(Args(**{"image": "factory:1", "verb": "synthesize", "argv": SYNTHESIZE} | changes))


def test_valid_by_kuberays_schema(schema: dict[str, Any]) -> None:
    made = job(secret="store")
    jsonschema.validate(made, schema)
    for break_it in (
        lambda spec: spec.update(entryPoint="x"),
        lambda spec: spec["rayClusterSpec"].pop("headGroupSpec"),
        lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="none"),
        lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ):
        broken = copy.deepcopy(made)
        break_it(broken["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_says_the_same_as_cluster_yaml(config: dict[str, Any]) -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    types = config["available_node_types"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == str(types["head"]["resources"]["CPU"])
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {name.replace("_", "-") for name in types if name != "head"}
    gpu = groups["gpu-worker"]
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (0, types["gpu_worker"]["max_workers"])
    pod = gpu["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"]) == ("8", "1")
    assert pod["tolerations"][0]["key"] == "spot"
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == config["idle_timeout_minutes"] * 60
    assert cluster["rayVersion"] == ray_version()
    environment = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
    assert environment.items() >= variables(config).items()
    assert environment["MLFLOW_TRACKING_URI"].startswith("http")


def test_the_command_arrives_as_typed() -> None:
    words = shlex.split(job()["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "jobs.cli", "synthesize"]
    assert words[words.index("--generator") + 1] == "/shared/generator"
    assert words[words.index("--num-requests") + 1] == "100"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"argv": ("--recipe", "tinny", *SYNTHESIZE[2:])}, "did you mean 'tiny'"),
        ({"argv": (*SYNTHESIZE[:-1], "out.lance")}, "out out.lance: lies in one container only"),
        ({"argv": (*SYNTHESIZE[:-1], "/shared/../out.lance")}, "lies in one container only"),
        ({"name": "Big_Name"}, "--name Big_Name"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_the_example_in_the_repository_is_up_to_date(tmp_path: Path) -> None:
    text = (ROOT / "rayjob.yaml").read_text()
    made = yaml.safe_load(text)
    container = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    verb, *argv = shlex.split(made["spec"]["entrypoint"])[3:]
    assert render(Args(image=container["image"], verb=verb, argv=tuple(argv))) == text
    out = tmp_path / "job.yaml"
    assert command(["--image", container["image"], "--out", str(out), verb, *argv]) == 0
    assert out.read_text() == text
    assert parse(["--image", "x", verb, *argv]).argv == tuple(argv)
