"""Where preferences come from: the story world, reviews, and adapters for public formats. Imports nothing from the rest of the project."""
