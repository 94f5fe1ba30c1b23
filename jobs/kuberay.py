"""A KubeRay RayJob manifest of a verb, from the values of cluster.yaml.

    factory kuberay --image registry.example/factory:1 --out rayjob.yaml \\
        synthesize --recipe tiny --generator /shared/generator --real s3://bucket/real.lance \\
        --num-requests 100000 --out s3://bucket/synthetic.lance
    kubectl apply -f rayjob.yaml

The image holds this checkout in /app and its locked requirements (docs/cluster.md has the Dockerfile). Nodes, spot
capacity, storage and the MLflow address are those of cluster.yaml; a persistent volume claim is mounted at /shared.
The verb's arguments are checked here. A job whose head is lost is started again by KubeRay and goes on from storage.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster import GROWTH_VARIABLES
from jobs.submission import ROOT, SUBMITTABLE, SUBMITTABLE_VERBS, Command, parse_command, path_key

CODE_FOLDER = "/app"
SHARED_FOLDER = "/shared"
RESTARTS = 3
KEEP_SECONDS = 600
_VARIABLE = re.compile(r"\b(FACTORY_STORAGE|MLFLOW_TRACKING_URI)=(\S+)")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `factory kuberay`."""

    image: str
    """Container image with the checkout in /app."""
    verb: str
    """The verb to run."""
    argv: tuple[str, ...]
    """Its arguments; paths are those of the containers."""
    out: str | None = None
    """File to write; standard output without it."""
    name: str = "synthetic-data-factory"
    """Name of the RayJob."""
    claim: str = "factory-shared"
    """Persistent volume claim, mounted at /shared on every node."""
    secret: str | None = None
    """Kubernetes secret whose keys become environment variables, such as credentials of the object store."""
    cluster: str = str(ROOT / "cluster.yaml")
    """File with the values."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name):
            raise ValueError(
                f"--name {self.name}: want at most 47 lower-case letters, digits and dashes, a letter first"
            )


def parse(argv: Sequence[str]) -> Args:
    """Arguments of the command line.

    Raises:
        SystemExit: unknown options, or no verb.
    """
    parser = argparse.ArgumentParser(
        prog="factory kuberay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True, help="container image with the checkout in /app")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: standard output)")
    parser.add_argument("--name", default=Args.name, help="name of the RayJob")
    parser.add_argument("--claim", default=Args.claim, help="persistent volume claim for /shared")
    parser.add_argument("--secret", help="secret whose keys become environment variables")
    parser.add_argument("--cluster", default=Args.cluster, metavar="FILE", help="file with the values")
    parser.add_argument("verb", choices=SUBMITTABLE_VERBS, metavar="VERB", help=", ".join(SUBMITTABLE_VERBS))
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="…", help="arguments of the verb")
    found = vars(parser.parse_args(list(argv)))
    return Args(**found | {"argv": tuple(found["argv"])})


def manifest(args: Args) -> dict[str, Any]:
    """The RayJob as a mapping.

    Raises:
        ValueError: arguments that the verb refuses, a relative path, a cluster file without head or workers.
    """
    command = _checked(parse_command(args.verb, args.argv, ROOT))
    config = yaml.safe_load(Path(args.cluster).read_text())
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    if not types:
        raise ValueError(f"{args.cluster}: no node type beside the head, so there is nobody to work")
    minutes = config.get("idle_timeout_minutes", 10)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": args.name},
        "spec": {
            "entrypoint": command.entrypoint(),
            "submissionMode": "K8sJobMode",
            "backoffLimit": RESTARTS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "rayClusterSpec": {
                "rayVersion": ray_version(),
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"idleTimeoutSeconds": int(minutes * 60)},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": str(head["resources"]["CPU"])},
                    "template": _pod(args, "ray-head", head, config),
                },
                "workerGroupSpecs": [_group(args, name, node, config) for name, node in types.items()],
            },
        },
    }


def _checked(command: Command) -> Command:
    """The command, if its paths can hold in a container: absolute below the shared folder, or a URI.

    Raises:
        ValueError: another path.
    """
    for field in SUBMITTABLE[command.verb].paths:
        found = getattr(command.args, field)
        for value in filter(None, found if isinstance(found, tuple) else (found,)):
            path = Path(value.removeprefix(path_key(value)))
            inside = ".." not in path.parts and path.is_relative_to(SHARED_FOLDER)
            if "://" not in value and not inside:
                raise ValueError(
                    f"{field} {value}: lies in one container only; name a URI (s3://…) or a path below {SHARED_FOLDER}"
                )
    return command


def _group(args: Args, name: str, node: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    least = int(node.get("min_workers", 0))
    return {
        "groupName": name.replace("_", "-"),
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": int(node.get("max_workers", config["max_workers"])),
        "rayStartParams": {},
        "template": _pod(args, "ray-worker", node, config),
    }


def _pod(args: Args, role: str, node: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """One container with the node type's CPUs, memory and GPUs; spot nodes are tolerated where the type is spot."""
    resources = node["resources"]
    amounts = {
        "cpu": str(max(int(resources["CPU"]), 2)),
        "memory": f"{int(resources['memory']) // 2**20}Mi",
        **({"nvidia.com/gpu": str(resources["GPU"])} if resources.get("GPU") else {}),
    }
    container = {
        "name": role,
        "image": args.image,
        "workingDir": CODE_FOLDER,
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "env": [{"name": name, "value": value} for name, value in variables(config).items()],
        "volumeMounts": [
            {"name": "shared", "mountPath": SHARED_FOLDER},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if args.secret:
        container["envFrom"] = [{"secretRef": {"name": args.secret}}]
    spec: dict[str, Any] = {
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}},
            # The object store: a container's own /dev/shm is 64 MB.
            {
                "name": "shm",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{int(resources['memory']) // 2**20 // 3}Mi"},
            },
        ],
    }
    if node.get("node_config", {}).get("InstanceMarketOptions", {}).get("MarketType") == "spot":
        spec["tolerations"] = [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


def variables(config: Mapping[str, Any]) -> dict[str, str]:
    """FACTORY_STORAGE and MLFLOW_TRACKING_URI as cluster.yaml sets them, its growth, and where the program lies.

    Raises:
        ValueError: the file does not set them.
    """
    found = dict(_VARIABLE.findall("\n".join(config.get("initialization_commands", []))))
    for name in ("FACTORY_STORAGE", "MLFLOW_TRACKING_URI"):
        if name not in found:
            raise ValueError(f"cluster file: initialization_commands set no {name}")
    return {
        **dict(sorted(found.items())),
        **growth(config),
        "PYTHONPATH": CODE_FOLDER,
        "PYTHONUNBUFFERED": "1",
    }


def growth(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that tell a job how large the cluster may become: the sum over its node types."""
    sums = {
        resource: sum(
            node["resources"].get(resource, 0) * int(node.get("max_workers", config["max_workers"]))
            for name, node in config["available_node_types"].items()
            if name != config["head_node_type"]
        )
        for resource in GROWTH_VARIABLES
    }
    return {GROWTH_VARIABLES[resource]: str(amount) for resource, amount in sums.items()}


def ray_version() -> str:
    """The version of Ray in the lock."""
    text = (ROOT / "requirements" / "gpu.txt").read_text()
    found = re.search(r"^ray(?:\[[^\]]*\])?==([\d.]+)", text, re.MULTILINE)
    assert found is not None, "requirements/gpu.txt pins no Ray"
    return found.group(1)


def render(args: Args) -> str:
    """The manifest as YAML."""
    text: str = yaml.safe_dump(manifest(args), sort_keys=False, width=110)
    return f"# Made by `factory kuberay` from {Path(args.cluster).name}; apply with kubectl.\n{text}"


def command(argv: Sequence[str]) -> int:
    """`factory kuberay`."""
    args = parse(argv)
    text = render(args)
    if args.out is None:
        sys.stdout.write(text)
        return 0
    Path(args.out).write_text(text)
    print(f"wrote {args.out}; next: kubectl apply -f {args.out}")
    return 0
