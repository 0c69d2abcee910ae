"""How many jobs there are of each status, kept by triggers: asking costs the same at a million jobs."""

from __future__ import annotations

import sqlite3

SCHEMA = """
    CREATE TABLE job_counts (
        status TEXT PRIMARY KEY,
        jobs INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO job_counts (status, jobs) SELECT status, count(*) FROM jobs GROUP BY status;
    CREATE TRIGGER count_status_of_new_job AFTER INSERT ON jobs BEGIN
        INSERT INTO job_counts (status, jobs) VALUES (new.status, 1)
            ON CONFLICT (status) DO UPDATE SET jobs = jobs + 1;
    END;
    CREATE TRIGGER count_status_of_changed_job AFTER UPDATE OF status ON jobs WHEN new.status <> old.status BEGIN
        UPDATE job_counts SET jobs = jobs - 1 WHERE status = old.status;
        INSERT INTO job_counts (status, jobs) VALUES (new.status, 1)
            ON CONFLICT (status) DO UPDATE SET jobs = jobs + 1;
    END;
    CREATE TRIGGER count_status_of_deleted_job AFTER DELETE ON jobs BEGIN
        UPDATE job_counts SET jobs = jobs - 1 WHERE status = old.status;
    END;
"""


def read(db: sqlite3.Connection) -> dict[str, int]:
    """Jobs by status, those that there are."""
    return dict(db.execute("SELECT status, jobs FROM job_counts WHERE jobs > 0"))
