"""``python tests/ttt_elsewhere.py SOCKET ARGUMENTS``: let the process that listens there run a command of ttt."""

import sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as client:
    client.send(sys.argv[2:])
    text, status = client.recv()
print(text, end="")
sys.exit(status)
