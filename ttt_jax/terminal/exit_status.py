"""What the exit status of a command tells whoever started it."""

DONE = 0
FAILED = 1  # the run cannot go on as it is: starting it again would fail again
REFUSED = 2  # the command or the config is wrong
RESTART = 75  # nothing is wrong with the run (EX_TEMPFAIL): the same command goes on where it stands
INTERRUPTED = 130  # by Ctrl-C
