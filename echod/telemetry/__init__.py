"""What operators read: statistics and the log."""
