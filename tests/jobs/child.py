"""A process with a manager, there to be killed.

`python -m tests.jobs.child DATA ROOT REQUESTS` prints a line per event of the first job, then how
each job ended and what files are left.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pydantic import TypeAdapter

from service.engine.config import QuantizationConfig
from service.jobs.events import Event
from service.jobs.manager import JobManager
from service.jobs.request import JobRequest
from tests.jobs.models import files_below

_REQUESTS: TypeAdapter[list[JobRequest]] = TypeAdapter(list[JobRequest])


async def main(data_dir: str, root: str, requests: str) -> None:
    manager = JobManager(
        data_dir=Path(data_dir),
        model_roots=[Path(root)],
        config_defaults=QuantizationConfig(backend="reference", method="minmax"),
        block_bytes=1 << 18,
        max_running_jobs=1,
    )
    await manager.start()
    for request in _REQUESTS.validate_json(requests):
        await manager.submit(request)
    jobs, _ = await manager.jobs.find()
    first = jobs[-1].id
    print(first, flush=True)
    async for item in manager.jobs.follow(first):
        if isinstance(item, Event):
            print(item.type, flush=True)
    for job in reversed((await manager.jobs.find())[0]):
        done = await manager.jobs.wait(job.id, 60)
        print("ended", done.status, done.error.code if done.error else "", flush=True)
    print("work", *files_below(Path(data_dir) / "work"), flush=True)
    print("artifacts", *(path.name for path in (Path(data_dir) / "artifacts").iterdir()), flush=True)
    await manager.drain(10)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
