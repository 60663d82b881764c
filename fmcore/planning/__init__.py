"""What a recipe would do: its steps by identity, which of them are done, and what the others cost."""
