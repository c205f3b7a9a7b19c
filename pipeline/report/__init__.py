"""What a run came to: gathered from its files, drawn, and laid out as a page."""
