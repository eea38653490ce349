"""What prepares and looks at runs."""
