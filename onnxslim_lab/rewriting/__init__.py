"""What the exact passes share: facts about nodes and constants, and edits made of several steps."""
