"""One file per command; a command parses, calls one library function and prints."""
