"""What a person at a terminal sees and sends: text, a live line, signals, exit statuses."""
