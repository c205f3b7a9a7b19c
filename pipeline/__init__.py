"""The library under the stages: importing it runs nothing."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported: nothing calls home
