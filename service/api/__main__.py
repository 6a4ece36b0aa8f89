"""Starts the API: ``python -m service.api``, with its settings in ``CATMERGE_`` variables."""

from __future__ import annotations

import logging
import os
import sys

import pydantic

from service.api.serving import serve
from service.contract.settings import Connections, SettingsError, variable
from service.settings import Settings


def main() -> int:
    """Serve; the exit status is 2 where a setting can't be used."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        connections, settings = Connections.from_environment(os.environ), Settings()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except pydantic.ValidationError as error:
        for fault in error.errors():
            print(f"{variable(str(fault['loc'][0]))}: {fault['msg']}", file=sys.stderr)
        return 2
    serve(connections, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
