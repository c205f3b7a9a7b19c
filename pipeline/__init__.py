"""The library under the stages: importing it runs nothing."""
