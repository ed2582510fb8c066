"""Plan runs: predict memory, communication, time and price on machines that need not be present."""
