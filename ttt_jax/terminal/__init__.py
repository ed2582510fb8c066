"""Write to terminals, and react to signals with exit statuses."""
