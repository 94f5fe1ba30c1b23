"""Lance tables: the only package that imports lance.

Tables are opened, read and queried through `Table`; the exactly-once write path is `write_fragment` in the
write tasks and one `Committer` in the driver.
"""

import os

os.environ.setdefault("LANCE_LOG", "error")  # each nearest() without _distance prints a warning otherwise

from factory.storage.access import TestAccess, test_accesses
from factory.storage.committer import Committer, DroppedRecord
from factory.storage.create import create_table, write_table
from factory.storage.errors import (
    DuplicateRequests,
    StorageFailed,
    StorageFull,
    StorageUnreachable,
    TableDamaged,
)
from factory.storage.index_set import IndexSet
from factory.storage.integrity import Damage, check_table
from factory.storage.lease import LeaseHeld, LeaseLost
from factory.storage.location import (
    absolute_uri,
    cache_folder,
    is_remote,
    ledger_folder,
    parse_storage_options,
    resolve_options,
    take_storage_options,
)
from factory.storage.maintenance import Maintenance, maintain
from factory.storage.quarantine import IntentLog, QuarantinedRequest, QuarantineLog
from factory.storage.real import class_names, real_digest, real_rows
from factory.storage.reconciliation import Reconciliation
from factory.storage.status import PlanStatus, plan_status
from factory.storage.table import Table, open_table
from factory.storage.verdicts import whole_filter
from factory.storage.writer import FragmentRecord, write_fragment

__all__ = [
    "Committer",
    "Damage",
    "DroppedRecord",
    "DuplicateRequests",
    "FragmentRecord",
    "IndexSet",
    "IntentLog",
    "LeaseHeld",
    "LeaseLost",
    "Maintenance",
    "PlanStatus",
    "QuarantineLog",
    "QuarantinedRequest",
    "Reconciliation",
    "StorageFailed",
    "StorageFull",
    "StorageUnreachable",
    "Table",
    "TableDamaged",
    "TestAccess",
    "absolute_uri",
    "cache_folder",
    "check_table",
    "class_names",
    "create_table",
    "is_remote",
    "ledger_folder",
    "maintain",
    "open_table",
    "parse_storage_options",
    "plan_status",
    "real_digest",
    "real_rows",
    "resolve_options",
    "take_storage_options",
    "test_accesses",
    "whole_filter",
    "write_fragment",
    "write_table",
]
