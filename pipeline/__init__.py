"""The library under the stages. Importing it starts nothing; it only switches the hub's telemetry off."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported: nothing calls home
