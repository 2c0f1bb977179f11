"""The command line of promptcache: parses, calls the library, prints."""

# The exit code: as a shell reports a process that SIGINT ended.
INTERRUPTED = 130
