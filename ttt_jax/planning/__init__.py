"""What a run will need of the machines it is meant for, without them."""
