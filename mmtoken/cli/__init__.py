"""The `mmtoken` command: thin sub-commands, each imported only when it is called."""
