"""A Hub for tests: the real protocol over real HTTP, for the real client, with real files behind it.

`HubServer` runs it as a process, `Client` runs code in a process that is its client. It speaks git LFS and not Xet:
clients must have `HF_HUB_DISABLE_XET=1`, which `HubServer.environment` sees to. Checked with huggingface_hub 2.4.

It stands beside the tests, knows nothing of deeparc_hf, and serves by itself too: `python -m local_hub --root FOLDER`.

    with HubServer(folder, tokens=["owner=hf_owner"]) as hub, Client(hub.environment("hf_owner")) as client:
        client.run("from huggingface_hub import HfApi; result = HfApi().create_repo('owner/model').repo_id")
        assert hub.files("owner/model").keys() == {".gitattributes"}
"""

from .client import Client, ClientError
from .process import HubServer

__all__ = ["Client", "ClientError", "HubServer"]
