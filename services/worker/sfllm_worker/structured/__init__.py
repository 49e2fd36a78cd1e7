"""Output that follows a grammar: compiled beside the steps, and followed token by token."""
