"""The command line: ``jupyterhub-upperdeck key`` and ``jupyterhub-upperdeck serve``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from . import keys
from .manager import Manager


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jupyterhub-upperdeck", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    key = verbs.add_parser("key", help="make the key of the hub, and the key set for the manager's --jwks")
    key.add_argument("directory", type=Path)
    serve = verbs.add_parser("serve", help="run the hub's service; JupyterHub starts it and sets its environment")
    serve.add_argument("--manager", default=os.environ.get("UPPERDECK_MANAGER_URL"), help="URL of upperdeck's manager")
    serve.add_argument("--key", default=os.environ.get("UPPERDECK_SIGNING_KEY_FILE"), help="file with the private key")
    serve.add_argument("--listen", help="ADDRESS:PORT; by default that of the service's URL")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if given.verb == "key":
            private, public = keys.make(given.directory)
            print(f"{private}: for the hub and its service\n{public}: for the manager: --jwks {public}")
            print(f"  --jwt-issuer {keys.ISSUER} --jwt-audience {keys.AUDIENCE} --jwt-groups-claim groups")
            return 0
        if not given.manager or not given.key:
            parser.error("serve needs --manager and --key")
        if "JUPYTERHUB_SERVICE_PREFIX" not in os.environ:
            parser.error("this is a service of JupyterHub, which sets JUPYTERHUB_SERVICE_PREFIX and its token")
        from .service import serve

        asyncio.run(serve(Manager(given.manager, keys.Signer.read(Path(given.key))), given.listen))
    except (keys.KeyProblem, OSError) as error:
        print(f"jupyterhub-upperdeck: {error}", file=sys.stderr)
        return 1
    return 0
