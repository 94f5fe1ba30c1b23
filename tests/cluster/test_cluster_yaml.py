"""cluster.yaml is valid by Ray's own schema and installs from the project's own lock."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_valid_by_rays_schema(config: dict) -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"no_such_key": 1}, schema)


def test_head_type_exists_and_locks_are_files(config: dict) -> None:
    assert config["head_node_type"] in config["available_node_types"]
    named = [
        word for line in config["setup_commands"] for word in line.split() if word.startswith("requirements/")
    ]
    assert named and all((ROOT / name).is_file() for name in named)


def test_nodes_know_storage_and_mlflow_and_share_the_token(config: dict) -> None:
    from jobs.kuberay import variables

    assert {"FACTORY_STORAGE", "MLFLOW_TRACKING_URI"} <= set(variables(config))
    starts = [config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in start and "factory.env" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_jobs_are_told_how_large_the_cluster_may_become(config: dict) -> None:
    from jobs.kuberay import growth

    assert growth(config) == {"FACTORY_MAX_CPUS": "96", "FACTORY_MAX_GPUS": "8"}
    told = " ".join(config["initialization_commands"])
    assert all(f"{name}={value}" in told for name, value in growth(config).items()), (
        "cluster.yaml says the sum"
    )


def test_the_head_computes_nothing_and_workers_are_spot(config: dict) -> None:
    types = dict(config["available_node_types"])
    assert types.pop(config["head_node_type"])["resources"]["CPU"] == 0
    for node in types.values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert node["resources"]["memory"] > 0
