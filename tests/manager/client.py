"""SAVE, CHK, LIST and DEL with the client that openapi-python-client has made; arguments: address, session."""

import datetime
import sys
import time

from upperdeck_client.api.images import delete, images
from upperdeck_client.api.saves import check, submit
from upperdeck_client.client import AuthenticatedClient
from upperdeck_client.models import ImageName, Problem, SaveRequest, State

address, session = sys.argv[1:]
client = AuthenticatedClient(base_url=address, token="token-alice", raise_on_unexpected_status=True)

body = SaveRequest(session=session, image=ImageName(name="torch", tag="v1"), message="by a made client")
save = submit.sync(client=client, body=body)
assert not isinstance(save, Problem), save
assert save.state == State.QUEUED, save
assert isinstance(save.created, datetime.datetime) and save.created.tzinfo, save

while save.state not in (State.SUCCEEDED, State.FAILED, State.CANCELLED):
    time.sleep(0.05)
    save = check.sync(save.id, client=client)
assert save.state == State.SUCCEEDED, save
assert isinstance(save.finished, datetime.datetime), save

listed = images.sync(client=client)
assert [(image.name, [tag.name for tag in image.tags]) for image in listed.images] == [("torch", ["v1"])], listed

deleted = delete.sync("torch", "v1", client=client)
assert deleted.tags == ["v1"] and deleted.image_deleted, deleted
assert images.sync(client=client).total == 0

missing = delete.sync("torch", "v1", client=client)
assert isinstance(missing, Problem) and missing.code == "not_found", missing
print("saved, checked, listed, deleted")
