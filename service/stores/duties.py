"""Who has which duty: of processes that could all do the same, one does, and another takes over if it dies."""

from __future__ import annotations

from sqlalchemy import delete, or_, select, update

from service.stores.database import Database, now
from service.stores.schema import leaders


class DutyStore:
    """Elections by rows; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def elect(self, duty: str, owner: str, seconds: float) -> bool:
        """Whether ``owner`` has the duty for the next ``seconds``."""
        with self._database.write() as connection:
            self._database.serialize(connection, f"duty:{duty}")
            row = connection.execute(select(leaders).where(leaders.c.duty == duty)).one_or_none()
            values = {"owner": owner, "until": now() + seconds}
            if row is None:
                connection.execute(leaders.insert().values(duty=duty, **values))
                return True
            free = or_(leaders.c.owner == owner, leaders.c.until < now())
            return bool(connection.execute(update(leaders).where(leaders.c.duty == duty, free).values(values)).rowcount)

    def resign(self, duty: str, owner: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(leaders).where(leaders.c.duty == duty, leaders.c.owner == owner))
