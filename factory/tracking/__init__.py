"""Tracking: every verb is one MLflow run, with what it read, what it was told and what came out.

The store is `sqlite:///runs/mlflow.db` with artifacts in `runs/artifacts`, unless MLFLOW_TRACKING_URI says
otherwise. MLflow is imported by the first `track()` (or `warm_up()`), never by importing this module. Only
the driver process tracks; workers hand their numbers to it. MLflow's usage telemetry is off unless
MLFLOW_DISABLE_TELEMETRY is set: the data here is medical. A server that is away for a while costs nothing:
entries wait in `runs/mlflow-outbox` (or FACTORY_MLFLOW_OUTBOX) and are sent when it is back.
"""

from factory.tracking.run import Run, current_store, track, warm_up
from factory.tracking.store import EXPERIMENT, STORE_FOLDER, StoreAway, check_store, tracking_uri

__all__ = [
    "EXPERIMENT",
    "STORE_FOLDER",
    "Run",
    "StoreAway",
    "check_store",
    "current_store",
    "track",
    "tracking_uri",
    "warm_up",
]
