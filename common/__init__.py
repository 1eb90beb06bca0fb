"""What both models' commands share."""
