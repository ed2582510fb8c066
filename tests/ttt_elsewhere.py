"""Let another process run a command of ttt: ``python tests/ttt_elsewhere.py SOCKET ARGUMENTS``."""

import sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as client:
    client.send(sys.argv[2:])
    text, status = client.recv()
print(text, end="")
sys.exit(status)
