"""The commands, one file each; a command is imported when it is called."""
