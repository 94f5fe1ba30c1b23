"""Lance tables: the only package that imports lance.

Tables are opened, read and queried through `Table`; the exactly-once write path is `write_fragment` in the
write tasks and one `Committer` in the driver.
"""

import os

os.environ.setdefault("LANCE_LOG", "error")  # each nearest() without _distance prints a warning otherwise

from factory.storage.committer import Committer, DroppedRecord
from factory.storage.create import create_table, write_table
from factory.storage.errors import DuplicateRequests, StorageFull, TableDamaged
from factory.storage.lease import LeaseHeld, LeaseLost
from factory.storage.location import ledger_folder
from factory.storage.maintenance import Maintenance, maintain
from factory.storage.quarantine import IntentLog, QuarantinedRequest, QuarantineLog
from factory.storage.real import TestAccess, class_names, real_digest, real_rows, test_accesses
from factory.storage.reconciliation import Reconciliation
from factory.storage.status import PlanStatus, plan_status
from factory.storage.table import Table, open_table
from factory.storage.verdicts import whole_filter
from factory.storage.writer import FragmentRecord, write_fragment

__all__ = [
    "Committer",
    "DroppedRecord",
    "DuplicateRequests",
    "FragmentRecord",
    "IntentLog",
    "LeaseHeld",
    "LeaseLost",
    "Maintenance",
    "PlanStatus",
    "QuarantineLog",
    "QuarantinedRequest",
    "Reconciliation",
    "StorageFull",
    "Table",
    "TableDamaged",
    "TestAccess",
    "class_names",
    "create_table",
    "ledger_folder",
    "maintain",
    "open_table",
    "plan_status",
    "real_digest",
    "real_rows",
    "test_accesses",
    "whole_filter",
    "write_fragment",
    "write_table",
]
