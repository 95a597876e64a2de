"""What a policy is made of: stages as data."""
