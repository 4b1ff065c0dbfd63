"""The command `saap`: `app` puts it together, one file a group of commands, `terminal` shows."""
