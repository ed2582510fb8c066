"""Start the processes of a run, let them agree, and lay arrays out over their devices."""
