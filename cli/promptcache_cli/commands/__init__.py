"""The commands: one file each, with the options it takes and what it prints."""
