"""Pure mathematics: one family of merge methods per file, found by discovery."""
