"""HTTP: requests, checked and authorized, and their answers."""
