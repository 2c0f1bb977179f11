"""The command line of promptcache: parses, calls the library, prints."""
