"""Puts the doors in their frame: wiring and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from service.api import artifacts, catalogue, evaluations, events, health, merges, problems, schema, trim_log, workers
from service.api.deps import House, plain_parameters
from service.api.lookout import Lookout
from service.api.metrics import Metrics
from service.api.watch import Watch
from service.contract.settings import Connections
from service.dispatch import Dispatcher
from service.duty import Duty
from service.housekeeping import Housekeeper, Keeping
from service.settings import Settings
from service.stores.database import Database
from service.stores.duties import DutyStore
from service.stores.ended import EndedJobs
from service.stores.jobs import JobStore
from service.stores.objects import open_objects
from service.stores.parts import PartStore
from service.stores.placing import Placement
from service.stores.workers import WorkerStore
from service.sweeper import Sweeper

# The trim log and the list of artifacts come before the artifact whose name may be any path.
ROUTERS = (
    merges.router,
    events.router,
    trim_log.router,
    artifacts.router,
    evaluations.router,
    catalogue.router,
    workers.router,
    health.router,
)


def create_app(connections: Connections, settings: Settings) -> FastAPI:
    """The API. It reaches for the database when it starts, not before."""
    house = _house(connections, settings)
    app = FastAPIOffline(  # /docs brings its own scripts: browsers behind a firewall reach no one else's
        title="catmerge",
        version=version("catmerge"),
        description=schema.DESCRIPTION.strip(),
        lifespan=lambda _: _open(house),
        dependencies=[Depends(plain_parameters)],
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,
        redoc_url=None,
        static_url="/docs/static",
    )
    app.state.house = house
    app.add_middleware(Watch, metrics=house.metrics)
    for kind in problems.HANDLED:
        app.add_exception_handler(kind, problems.respond)
    for router in ROUTERS:
        app.include_router(router, responses=schema.REFUSED)
    app.openapi = lambda: schema.describe(app)  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


def _house(connections: Connections, settings: Settings) -> House:
    database = Database(connections.database_url)
    jobs = JobStore(database, max_active_jobs=settings.max_active_jobs)
    closing = threading.Event()
    parts = PartStore(database, lease_seconds=connections.lease_seconds, part_attempts=connections.part_attempts)
    workers = WorkerStore(database, lease_seconds=connections.lease_seconds)
    return House(
        connections=connections,
        settings=settings,
        database=database,
        objects=open_objects(connections),
        jobs=jobs,
        parts=parts,
        workers=workers,
        dispatcher=Dispatcher(connections.broker_url),
        metrics=Metrics(jobs, parts, workers),
        closing=closing,
        lookout=Lookout(jobs.marks, closing),
    )


@asynccontextmanager
async def _open(house: House) -> AsyncIterator[None]:
    if house.settings.migrate_at_start:
        await run_in_threadpool(house.database.migrate)
    duties = _duties(house)
    for duty in duties:
        duty.start()
    lookout = asyncio.create_task(house.lookout.watch())
    try:
        yield
    finally:
        house.closing.set()
        await lookout
        for duty in duties:
            await run_in_threadpool(duty.stop)
        house.dispatcher.close()
        house.database.close()


def _duties(house: House) -> tuple[Duty, ...]:
    """What one of the API's processes does for all; stores can be slow, so clearing up has a thread of its own."""
    store, settings = DutyStore(house.database), house.settings
    sweeper, housekeeper = _sweeper(house), _housekeeper(house)
    return (
        Duty(
            "sweep",
            store,
            lambda _: sweeper.sweep(),
            every_seconds=settings.sweep_seconds,
            patience_seconds=30,
        ),
        Duty(
            "housekeeping",
            store,
            housekeeper.clear_up,
            every_seconds=settings.housekeeping_seconds,
            patience_seconds=5,
        ),
    )


def _sweeper(house: House) -> Sweeper:
    placement = Placement(
        house.database,
        lease_seconds=house.connections.lease_seconds,
        patience_seconds=house.settings.placement_seconds,
    )
    return Sweeper(house.parts, placement, house.dispatcher, house.settings.resend_after_seconds)


def _housekeeper(house: House) -> Housekeeper:
    settings = house.settings
    keeping = Keeping(
        quiet_seconds=2 * house.connections.lease_seconds,
        keep_keys_seconds=settings.idempotency_seconds,
        expire_artifacts=settings.expire_artifacts,
        cache_bytes=settings.cache_bytes,
    )
    ended, workspace = EndedJobs(house.database), house.connections.workspace
    return Housekeeper(house.jobs, house.parts, house.workers, ended, house.objects, workspace, keeping)


def _operation_id(route: APIRoute) -> str:
    return route.name
