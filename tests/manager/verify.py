"""Verifies a webhook with the library of Standard Webhooks; stdin: a JSON object with secret, headers and body."""

import json
import sys

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

message = json.load(sys.stdin)
event = Webhook(message["secret"]).verify(message["body"], message["headers"])
try:
    Webhook(message["secret"]).verify(message["body"] + " ", message["headers"])
    sys.exit("a changed body is accepted")
except WebhookVerificationError:
    print(event["type"])
