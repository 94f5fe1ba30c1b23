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
