"""`python -m local_hub`: serve a folder as a Hub. One line of JSON says where, once it listens."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from .calls import STALLS, Hub
from .server import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local_hub", description=__doc__)
    parser.add_argument(
        "--root", type=Path, required=True, help="folder that holds everything; the same one again has it all again"
    )
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--token", action="append", default=[], metavar="NAME=TOKEN[:read]")
    parser.add_argument("--org", action="append", default=[], metavar="ORG=NAME", help="once for each member")
    parser.add_argument(
        "--stall", choices=STALLS, help="stop at this point until killed; the file `stalled` in the root tells"
    )
    parser.add_argument("--attached", action="store_true", help="end when the standard input does")
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    hub = Hub(options.root, options.token, options.org, options.stall)
    told = {"attached": options.attached, "ready": lambda: print(json.dumps({"endpoint": hub.endpoint}), flush=True)}
    asyncio.run(serve(hub, options.port, **told))


if __name__ == "__main__":
    main()
