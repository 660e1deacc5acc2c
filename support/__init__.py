"""What makes the program practical and has nothing to do with vBoN, one subject a file."""
