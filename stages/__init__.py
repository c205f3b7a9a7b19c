"""One module a stage; each runs alone: `python -m stages.sft --config configs/stories/sft.yaml`."""
