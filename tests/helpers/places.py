"""Where tests put files."""

import os

# A folder in memory where that can be had, for many small stores: what a sync of one
# of their files would wait for is not tried there.
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
