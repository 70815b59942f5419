"""Metered windows kept on disk: SQLite in WAL mode, written by one thread, read and exported by anyone."""
