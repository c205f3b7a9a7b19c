"""Where preferences come from: the story world, reviews, adapters for public formats.

The ground floor: imports nothing from the rest of the project.
"""
